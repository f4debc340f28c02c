// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string>

#include <torch/optim/adagrad.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/libtorch.hpp"
#include "fabric/optim/bucket.hpp"
#include "fabric/optim/fused_optimizer.hpp"

namespace fabric::optim {

using torch::optim::AdagradOptions;

namespace detail {

struct AdagradMethod {
  using Options = AdagradOptions;
  static constexpr const char* name = "Adagrad";
  static constexpr std::array state_names{"sum"};
  static constexpr double default_lr = 1e-2;
  static constexpr bool counts_steps = true;
  static constexpr bool has_first_step = false;
  static constexpr bool right_in_16_bits = libtorch::fused_sgd_is_right_in_16_bits;
  static constexpr bool state_from_the_start = true;

  static std::size_t states(const Options& /*options*/) { return 1; }
  static double initial_state(const Options& defaults) { return defaults.initial_accumulator_value(); }

  static Dict python_only() { return {{"foreach", {}}, {"differentiable", false}, {"fused", true}}; }
  static std::string problem(const Options& /*options*/, const Dict& /*group*/) { return {}; }

  static void update(const Bucket& bucket, const Options& options, bool maximize, const StepScale& scale) {
    at::_fused_adagrad_(bucket.parameters, bucket.gradients, bucket.states[0], bucket.steps, options.lr(),
                        options.lr_decay(), options.weight_decay(), options.eps(), maximize, optional(scale.grad_scale),
                        optional(scale.found_inf));
  }
};

}  // namespace detail

/// Adagrad (Duchi, Hazan and Singer, 2011) in one kernel for all parameters: `torch::optim::Adagrad`, faster, with the
/// numbers of Python's `Adagrad(fused=True)`.
class Adagrad : public FusedOptimizer<detail::AdagradMethod> {
  using FusedOptimizer::FusedOptimizer;
};

}  // namespace fabric::optim
