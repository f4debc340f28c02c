// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/torch.h>

#include "fabric/fabric.hpp"

namespace fabric {

namespace tests {

/// What `F16Mixed` is on GPUs, on CPUs, where the rules refuse `F16Mixed` itself: so that scaling is tested without
/// one.
struct F16MixedOnCpu {
  static constexpr PrecisionFacts facts{.name = "F16MixedOnCpu", .flag = "", .compute = Scalar::f16};
};

}  // namespace tests

template <>
class PrecisionPlugin<tests::F16MixedOnCpu> : public detail::MixedPrecision<at::kHalf> {};

}  // namespace fabric
