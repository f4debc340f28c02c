// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <utility>

#include <torch/types.h>

#include "fabric/side_stream.hpp"
#include "fabric/tree.hpp"

namespace fabric::detail {

/// Brings batches to a device: on a CUDA device with `prefetch` by way of pinned memory and a stream of its own, beside
/// the kernels that run on the current one.
class DeviceCopies {
 public:
  DeviceCopies(at::Device device, bool prefetch) : device_(device) {
    if (prefetch && device.is_cuda()) side_.emplace(device);
  }

  /// Do copies run beside the kernels, so that it pays to begin them one batch ahead?
  [[nodiscard]] bool beside() const { return side_.has_value(); }

  /// The batch on the device, not to be used before `finish`.
  template <class Batch>
  [[nodiscard]] Batch start(Batch batch) {
    if (!side_) return tree::map(std::move(batch), [this](const at::Tensor& tensor) { return tensor.to(device_); });
    Batch copy = tree::map(std::move(batch), [this](const at::Tensor& tensor) {
      if (!tensor.is_cpu() || tensor.layout() != at::kStrided) return tensor.to(device_);
      return side_->run([&] {
        // Pinned memory has the same strides, and none can be written to where elements share a place.
        const at::Tensor whole = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
        return whole.pin_memory().to(device_, /*non_blocking=*/true);
      });
    });
    side_->mark();
    return copy;
  }

  /// Makes the batch that was started last safe to use on the current stream.
  template <class Batch>
  void finish(const Batch& batch) const {
    if (!side_) return;
    const c10::Stream current = side_->join();
    // The memory belongs to the side stream, which must not take it back before the current one has done with it.
    tree::for_each(batch, [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.layout() == at::kStrided) tensor.record_stream(current);
    });
  }

 private:
  at::Device device_;
  std::optional<SideStream> side_;
};

}  // namespace fabric::detail
