// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <tuple>

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/optim/bucket.hpp"
#include "fabric/optim/fused_optimizer.hpp"

namespace fabric::optim {

using torch::optim::AdamOptions;
using torch::optim::AdamWOptions;

namespace detail {

/// Both of Adam's variants differ in what weight decay does: it is `decoupled` from the gradients, or added to them.
template <class AdamsOptions, bool decoupled>
struct AdamMethod {
  using Options = AdamsOptions;
  static constexpr const char* name = decoupled ? "AdamW" : "Adam";
  static constexpr std::array state_names{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr double default_lr = 1e-3;
  static constexpr bool counts_steps = true;
  static constexpr bool has_first_step = false;
  static constexpr bool right_in_16_bits = true;
  static constexpr bool state_from_the_start = false;

  static std::size_t states(const Options& options) { return options.amsgrad() ? 3 : 2; }
  static double initial_state(const Options& /*defaults*/) { return 0; }

  static Dict python_only() {
    return {{"foreach", {}},
            {"capturable", false},
            {"differentiable", false},
            {"fused", true},
            {"decoupled_weight_decay", decoupled}};
  }
  /// Python's Adam with `decoupled_weight_decay` is AdamW by another name.
  static std::string problem(const Options& /*options*/, const Dict& group) {
    const Value* flag = group.find("decoupled_weight_decay");
    if (decoupled || flag == nullptr || !flag->is<bool>() || !flag->as<bool>("")) return {};
    return "decoupled_weight_decay is true: this is the state of an AdamW";
  }

  static void update(const Bucket& bucket, const Options& options, bool maximize, const StepScale& scale) {
    const auto [beta1, beta2] = options.betas();
    constexpr auto kernel = [](auto&&... arguments) {
      decoupled ? at::_fused_adamw_(arguments...) : at::_fused_adam_(arguments...);
    };
    kernel(bucket.parameters, bucket.gradients, bucket.states[0], bucket.states[1], bucket.states[2], bucket.steps,
           options.lr(), beta1, beta2, options.weight_decay(), options.eps(), options.amsgrad(), maximize,
           optional(scale.grad_scale), optional(scale.found_inf));
  }
};

}  // namespace detail

/// AdamW (Loshchilov and Hutter, 2019) in one kernel for all parameters: `torch::optim::AdamW`, faster, with the
/// numbers of Python's `AdamW(fused=True)`.
class AdamW : public FusedOptimizer<detail::AdamMethod<AdamWOptions, true>> {
  using FusedOptimizer::FusedOptimizer;
};

/// Adam (Kingma and Ba, 2015), with weight decay added to the gradients: `torch::optim::Adam`, faster, with the numbers
/// of Python's `Adam(fused=True)`.
class Adam : public FusedOptimizer<detail::AdamMethod<AdamOptions, false>> {
  using FusedOptimizer::FusedOptimizer;
};

}  // namespace fabric::optim
