// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/types.h>

namespace fabric {

/// The type in which gradients travel: half the bytes for fewer digits.
enum class GradientCompression : std::uint8_t { none, f16, bf16 };

/// Averages a bucket in a narrower type. It divides before it adds, since a half float overflows at 65,504.
template <at::ScalarType dtype>
class CompressionHook : public c10d::CppCommHookInterface<c10::intrusive_ptr<c10d::ProcessGroup>> {
 public:
  using CompressionHook::CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    const at::Tensor& wide = bucket.getBuffer();
    std::vector<at::Tensor> narrow{wide.div(state_->getSize()).to(dtype)};
    const auto reduced = state_->allreduce(narrow)->getFuture();
    return reduced->then(
        [wide, narrow = narrow[0]](c10::ivalue::Future& /*done*/) {
          wide.copy_(narrow);
          return c10::IValue(wide);
        },
        c10::TensorType::get());
  }
};

}  // namespace fabric
