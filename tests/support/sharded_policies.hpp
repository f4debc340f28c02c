// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/torch.h>

#include "fabric/sharding.hpp"

namespace fabric::tests {

/// `DeepSpeed<stage>` and `ModelParallel` without the rules that refuse them 64-bit floats, in which they can be
/// compared to many digits.
template <int stage, Offload offload = Offload::none>
struct Zero {
  static constexpr StrategyFacts facts{.name = "Zero",
                                       .flag = "",
                                       .family = StrategyFamily::custom,
                                       .start_method = StartMethod::popen,
                                       .stage = stage,
                                       .optimizer_offload = offload,
                                       .parameter_offload = stage == 3 ? offload : Offload::none,
                                       .built_in = false};
};
struct Sharded {
  static constexpr StrategyFacts facts{
      .name = "Sharded", .flag = "", .start_method = StartMethod::popen, .built_in = false};
};

/// In which a forward returns what it computes in, so that 64-bit digits are compared and not 32-bit outputs.
struct DoubleOutputs {
  DoubleOutputs() { torch::set_default_dtype(caffe2::TypeMeta::Make<double>()); }
  ~DoubleOutputs() { torch::set_default_dtype(caffe2::TypeMeta::Make<float>()); }
  DoubleOutputs(const DoubleOutputs&) = delete;
  DoubleOutputs& operator=(const DoubleOutputs&) = delete;
};

}  // namespace fabric::tests

namespace fabric {

template <class A, int stage, Offload offload>
class Engine<A, tests::Zero<stage, offload>> : public detail::ShardedEngine<A, tests::Zero<stage, offload>> {
  using detail::ShardedEngine<A, tests::Zero<stage, offload>>::ShardedEngine;
};
template <class A>
class Engine<A, tests::Sharded> : public detail::ShardedEngine<A, tests::Sharded> {
  using detail::ShardedEngine<A, tests::Sharded>::ShardedEngine;
};

}  // namespace fabric
