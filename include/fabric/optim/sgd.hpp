// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string>

#include <torch/optim/sgd.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/libtorch.hpp"
#include "fabric/optim/bucket.hpp"
#include "fabric/optim/fused_optimizer.hpp"

namespace fabric::optim {

using torch::optim::SGDOptions;

namespace detail {

struct SgdMethod {
  using Options = SGDOptions;
  static constexpr const char* name = "SGD";
  static constexpr std::array state_names{"momentum_buffer"};
  static constexpr double default_lr = 1e-3;
  static constexpr bool counts_steps = false;
  static constexpr bool has_first_step = true;  // it takes the gradient for the momentum, without dampening
  static constexpr bool right_in_16_bits = libtorch::fused_sgd_is_right_in_16_bits;
  static constexpr bool state_from_the_start = false;

  static std::size_t states(const Options& options) { return options.momentum() == 0 ? 0 : 1; }
  static double initial_state(const Options& /*defaults*/) { return 0; }

  static Dict python_only() { return {{"foreach", {}}, {"differentiable", false}, {"fused", true}}; }
  static std::string problem(const Options& options, const Dict& /*group*/) {
    if (!options.nesterov() || (options.momentum() > 0 && options.dampening() == 0)) return {};
    return "nesterov needs a momentum above zero and no dampening";
  }

  static void update(const Bucket& bucket, const Options& options, bool maximize, const StepScale& scale) {
    at::_fused_sgd_(bucket.parameters, bucket.gradients, bucket.states[0], options.weight_decay(), options.momentum(),
                    options.lr(), options.dampening(), options.nesterov(), maximize, bucket.first_step,
                    optional(scale.grad_scale), optional(scale.found_inf));
  }
};

}  // namespace detail

/// Stochastic gradient descent, with momentum (Nesterov's too) if asked, in one kernel for all parameters:
/// `torch::optim::SGD`, faster, with the numbers of Python's `SGD(fused=True)`.
class SGD : public FusedOptimizer<detail::SgdMethod> {
  using FusedOptimizer::FusedOptimizer;
};

}  // namespace fabric::optim
