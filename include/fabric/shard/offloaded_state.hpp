// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/error.hpp"
#include "fabric/optim/state_tensors.hpp"
#include "fabric/shard/file_store.hpp"

namespace fabric::detail {

/// What optimizers keep for one unit, in files.
class OffloadedState {
 public:
  explicit OffloadedState(std::string folder) : folder_(std::move(folder)) {}

  /// Begins to bring what is there back into memory.
  void begin_fetch() {
    for (Kept& kept : kept_) kept.store.prefetch(kept.tensor);
  }
  void fetch() {
    for (Kept& kept : kept_) kept.store.fetch(kept.tensor);
  }
  /// Moves what an optimizer keeps for `masters` to files, if it is not there, and gives its memory back.
  void put_away(torch::optim::Optimizer& optimizer, const std::vector<at::Tensor>& masters) {
    const at::NoGradGuard no_grad;
    std::erase_if(kept_, [](const Kept& kept) { return kept.tensor.use_count() == 1; });  // replaced by a checkpoint
    for (const at::Tensor& master : masters) {
      const auto found = optimizer.state().find(master.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      const bool known = optim::each_state_tensor(*found->second, [&](at::Tensor& tensor) {
        if (tensor.numel() > 0 && !is_kept(tensor)) keep(tensor);
      });
      if (!known) {
        throw Error(
            "fabric: the optimizer's state is of a type that is not known, and so cannot be offloaded: use one of "
            "fabric::optim or torch::optim, or no offload to NVMe");
      }
    }
    for (Kept& kept : kept_) kept.store.release(kept.tensor);
    for (Kept& kept : kept_) kept.store.finish();
  }

 private:
  struct Kept {
    at::Tensor tensor;
    FileStore<> store;
  };
  [[nodiscard]] bool is_kept(const at::Tensor& tensor) const {
    for (const Kept& kept : kept_) {
      if (kept.tensor.const_data_ptr() == tensor.const_data_ptr()) return true;
    }
    return false;
  }
  void keep(at::Tensor& tensor) {
    const auto bytes = static_cast<std::int64_t>(tensor.nbytes());
    FileStore<> store(folder_, FileStore<>::rounded(bytes));
    at::Tensor file = store.tensor(tensor.sizes(), tensor.scalar_type());
    file.copy_(tensor);
    tensor = file;
    kept_.push_back({file, std::move(store)});
  }

  std::string folder_;
  std::vector<Kept> kept_;
};

}  // namespace fabric::detail
