// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>

#include "fabric/error.hpp"
#include "fabric/optim/state_tensors.hpp"
#include "fabric/shard/file_store.hpp"

namespace fabric::detail {

/// What optimizers keep for one unit, in files.
class OffloadedState {
 public:
  /// See FileStore.
  OffloadedState(std::string folder, bool past_cache) : folder_(std::move(folder)), past_cache_(past_cache) {}

  /// Begins to bring what is there back into memory.
  void begin_fetch() {
    for (File& file : files_) {
      for (const at::Tensor& tensor : file.tensors) file.store.prefetch(tensor);
    }
  }
  void fetch() {
    for (File& file : files_) {
      for (const at::Tensor& tensor : file.tensors) file.store.fetch(tensor);
    }
  }
  /// Begins to move what an optimizer keeps for `masters` to files, and to give its memory back.
  void begin_putting_away(torch::optim::Optimizer& optimizer, const std::vector<at::Tensor>& masters) {
    const at::NoGradGuard no_grad;
    for (File& file : files_) {  // without what a checkpoint has replaced
      std::erase_if(file.tensors, [](const at::Tensor& tensor) { return tensor.use_count() == 1; });
    }
    std::erase_if(files_, [](const File& file) { return file.tensors.empty(); });
    std::int64_t bytes = 0;
    for_each_new(optimizer, masters, [&](const at::Tensor& tensor) {
      bytes += FileStore<>::rounded(static_cast<std::int64_t>(tensor.nbytes()));
    });
    if (bytes > 0) {
      File file{.store = FileStore<>(folder_, bytes, past_cache_)};
      for_each_new(optimizer, masters, [&](at::Tensor& tensor) {
        tensor = file.store.tensor(tensor.sizes(), tensor.scalar_type()).copy_(tensor);
        file.tensors.push_back(tensor);
      });
      files_.push_back(std::move(file));
    }
    for (File& file : files_) file.store.release(file.tensors);
  }
  void finish_putting_away() {
    for (File& file : files_) file.store.finish();
  }

 private:
  struct File {
    FileStore<> store;
    std::vector<at::Tensor> tensors{};
  };

  /// Calls `visit` with each tensor that an optimizer keeps for `masters` and that is in no file.
  template <class Visit>
  void for_each_new(torch::optim::Optimizer& optimizer, const std::vector<at::Tensor>& masters, const Visit& visit) {
    for (const at::Tensor& master : masters) {
      const auto found = optimizer.state().find(master.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      const bool known = optim::each_state_tensor(*found->second, [&](at::Tensor& tensor) {
        if (tensor.numel() > 0 && !is_in_file(tensor)) visit(tensor);
      });
      if (!known) {
        throw Error(
            "fabric: the optimizer's state is of a type that is not known, and so cannot be offloaded: use one of "
            "fabric::optim or torch::optim, or no offload to NVMe");
      }
    }
  }
  [[nodiscard]] bool is_in_file(const at::Tensor& tensor) const {
    for (const File& file : files_) {
      for (const at::Tensor& kept : file.tensors) {
        if (kept.const_data_ptr() == tensor.const_data_ptr()) return true;
      }
    }
    return false;
  }

  std::string folder_;
  bool past_cache_;
  std::vector<File> files_;
};

}  // namespace fabric::detail
