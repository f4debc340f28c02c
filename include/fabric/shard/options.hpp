// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <torch/nn/module.h>

#include "fabric/connector/flags.hpp"
#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/shard/module_patterns.hpp"
#include "fabric/shard/tensor_parallel.hpp"

namespace fabric {

/// Which parameters form a unit, the portion in which parameters are gathered and gradients reduced.
class Units {
 public:
  /// Does the module of this name form a unit? The innermost one that does has the parameter; parameters outside are
  /// grouped as they are registered.
  using Predicate = std::function<bool(std::string_view name, const torch::nn::Module& module)>;

  /// Modules of any size, in the order of registration, together until `elements` would be exceeded. By default that is
  /// an eighth of all, and no more than 8 million.
  static Units by_size(std::int64_t elements) {
    Units units;
    units.elements_ = elements;
    return units;
  }
  /// Each module of one of these types (`Block` or `BlockImpl`) or derived from them: `Units::by_type<Block>()`.
  template <class... Modules>
  static Units by_type() {
    return by([](std::string_view /*name*/, const torch::nn::Module& module) {
      return (... || (dynamic_cast<const typename detail::ImplOf<Modules>::type*>(&module) != nullptr));
    });
  }
  /// Each module of one of these names; `*` stands for any letters of one component: `Units::by_name({"blocks.*"})`.
  static Units by_name(std::vector<std::string> patterns) {
    return by([patterns = std::move(patterns)](std::string_view name, const torch::nn::Module& /*module*/) {
      return std::any_of(patterns.begin(), patterns.end(),
                         [&](const std::string& pattern) { return detail::matches_module(pattern, name); });
    });
  }
  /// Each module of which the predicate says so.
  static Units by(Predicate predicate) {
    Units units;
    units.predicate_ = std::move(predicate);
    return units;
  }

  /// Empty where size decides.
  [[nodiscard]] const Predicate& predicate() const { return predicate_; }
  /// The limit for a module with so many elements.
  [[nodiscard]] std::int64_t elements_of(std::int64_t all) const {
    return elements_ > 0 ? elements_ : std::clamp<std::int64_t>(all / 8, 1, 8'000'000);
  }

 private:
  Predicate predicate_;
  std::int64_t elements_ = 0;
};

/// What may be tuned of the strategies that shard.
struct ShardingOptions {
  Sharding sharding = Sharding::full;    ///< Of Fsdp and ModelParallel; DeepSpeed's stage says it otherwise.
  int shard_group_size = 0;              ///< Of Sharding::hybrid; by default the processes of one node.
  TensorParallelPlan tensor_parallel{};  ///< ModelParallel: layers that are divided before the rest is sharded.
  int tensor_parallel_size = 0;          ///< Over how many ranks; 0: with a plan, over the processes of one node.
  Units units{};                         ///< What is gathered and reduced together.
  bool reshard_after_forward = true;     ///< Give a unit's memory back between its forward and its backward.
  bool prefetch = true;                  ///< Gather the next unit, known from the step before, while this one computes.
  int units_in_flight = 2;               ///< How many units may be whole at once, with the one that is being fetched.
  std::optional<ActivationCheckpointing>
      activation_checkpointing{};       ///< Of the blocks that forward marks; see recompute.
  bool find_unused_parameters = false;  ///< Allow parameters without a part in the loss; one more small collective.
  bool broadcast_buffers = true;        ///< Buffers (BatchNorm's statistics) are rank 0's in each step and after it.
  std::optional<at::ScalarType> reduce_dtype{};  ///< Of gradients on their way; by default as the precision says.
  std::string nvme_path =
      "/local_nvme";  ///< DeepSpeed<3, Offload::nvme>: the folder for files of parameters and state.
  bool nvme_direct =
      false;  ///< Read and write them past the kernel's cache, so that all memory is bounded; see FileStore.
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};  ///< Of each collective.
  bool detect_desync = false;                                   ///< See LaunchOptions, as for the next one.
  std::string log_dir{};  ///< A folder for one file a rank of what it prints; empty: none.
};

}  // namespace fabric
