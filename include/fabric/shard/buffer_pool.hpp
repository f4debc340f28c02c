// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/device.hpp"

namespace fabric::detail {

/// Memory that units need for a while, one after the other: whole parameters, gradients on their way. On a CPU it goes
/// from hand to hand, since the allocator would put other things in between that stay for longer, so that a process's
/// memory would come to be a third more than what is in it. Allocators of other devices see to that themselves.
class BufferPool {
 public:
  /// One-dimensional, without values.
  [[nodiscard]] at::Tensor take(std::int64_t elements, at::ScalarType dtype, at::Device device) {
    const c10::InferenceMode no_inference(false);  // the next user may be a backward
    const auto bytes = elements * static_cast<std::int64_t>(c10::elementSize(dtype));
    if (!device.is_cpu()) return at::empty({elements}, at::TensorOptions(device).dtype(dtype));
    const auto fits = [&](const at::Tensor& one) { return one.numel() >= bytes && one.numel() <= bytes + bytes / 4; };
    auto found = std::find_if(free_.begin(), free_.end(), fits);
    at::Tensor memory;
    if (found == free_.end()) {
      // Units of very different sizes must not keep memory of each size.
      while (!free_.empty() && bytes_free_ > bytes_taken_) drop(free_.begin());
      const OwnPages own_pages(device);
      memory = at::empty({bytes}, at::kByte);
    } else {
      memory = *found;
      drop(found);
    }
    bytes_taken_ += memory.numel();
    return memory.narrow(0, 0, bytes).view(dtype);
  }
  /// Takes back what `take` gave.
  void give(at::Tensor& buffer) {
    if (!buffer.defined()) return;
    if (buffer.is_cpu()) {
      const c10::InferenceMode no_inference(false);
      free_.push_back(at::empty({0}, at::kByte).set_(buffer.storage()));
      bytes_free_ += free_.back().numel();
      bytes_taken_ -= free_.back().numel();
    }
    buffer.reset();
  }

 private:
  void drop(std::vector<at::Tensor>::iterator one) {
    bytes_free_ -= one->numel();
    free_.erase(one);
  }

  std::vector<at::Tensor> free_;  // bytes, the longest unused first
  std::int64_t bytes_free_ = 0;
  std::int64_t bytes_taken_ = 0;
};

}  // namespace fabric::detail
