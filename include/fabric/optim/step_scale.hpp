// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace fabric {

/// What a gradient scaler hands to an optimizer that looks at it inside its kernel, so that the processor need not wait
/// for the device to say whether the step is to be skipped. Both are float32 tensors of one element.
struct StepScale {
  at::Tensor grad_scale;  ///< What the gradients are divided by, in place; undefined when they are unscaled already.
  at::Tensor found_inf;   ///< 1 skips the step, 0 does not; undefined never skips.
};

/// An optimizer that takes a `StepScale` along. Others are not to be called when a gradient is infinite.
template <class O>
concept TakesStepScale = requires(O& optimizer, const StepScale& scale) {
  optimizer.step(scale);
};

}  // namespace fabric
