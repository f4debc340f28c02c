// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace fabric {

/// What a gradient scaler tells an optimizer that can scale and skip by itself: one-element float32 tensors on the
/// device.
struct StepScale {
  at::Tensor grad_scale;  ///< What the gradients are multiplied by; undefined when they were unscaled already.
  at::Tensor found_inf;   ///< Not zero when a gradient holds an infinity or NaN: the step is to change nothing.
};

/// An optimizer whose step takes a `StepScale`, so that nobody has to wait for the device to know whether to skip.
template <class O>
concept TakesStepScale = requires(O& optimizer, const StepScale& scale) {
  optimizer.step(scale);
};

}  // namespace fabric
