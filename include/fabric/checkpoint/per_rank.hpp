// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/state.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// An object that differs by rank, such as a sum over this rank's own batches: `{"sum", PerRank(sum)}`. The checkpoint
/// has all of them, and each rank gets its own back. (Of other objects it has rank 0's, and all ranks get that.) For
/// small ones: they travel through the store.
template <class T>
class PerRank {
 public:
  /// The object must outlive this.
  explicit PerRank(T& object) : object_(&object) {}

  /// On rank 0 a list of what the ranks have.
  [[nodiscard]] Value state_dict(Ranks& ranks) const {
    detail::MemoryFile file;
    Spread spread;
    Saving saving{ranks, spread};
    TorchFile::write(file, detail::to_value(*object_, "", saving), {});
    List all;
    for (std::string& bytes : ranks.gather(file.bytes)) {
      const auto owner = std::make_shared<std::string>(std::move(bytes));
      all.items.push_back(TorchFile::read({owner, owner->data(), owner->size()}, "the state of a rank").state);
    }
    return all;
  }

  /// Takes this rank's. Throws fabric::Error if the job had another number of ranks, or for another kind of object.
  void load_state_dict(const Value& state, const World& world, bool check_only) {
    const auto& all = state.as<List>("what differs by rank").items;
    detail::check_ranks(all.size(), world);
    LoadPlan plan(world, /*strict=*/true);
    detail::plan_load(*object_, all[static_cast<std::size_t>(world.global_rank)], std::to_string(world.global_rank),
                      plan);
    if (const std::string problems = plan.problems(); !problems.empty()) throw Error("fabric: " + problems);
    if (!check_only) plan.run([](const std::exception_ptr& /*error*/) {});
  }

 private:
  T* object_;
};

}  // namespace fabric
