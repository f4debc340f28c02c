// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include "fabric/optim/bucket.hpp"

namespace fabric::optim {

/// Shows each tensor that an optimizer keeps for one parameter, as a reference; undefined ones are left out. Knows the
/// optimizers of fabric::optim and the elementwise ones of torch::optim; returns false for others.
template <class Visit>
bool each_state_tensor(torch::optim::OptimizerParamState& state, const Visit& visit) {
  const auto show = [&](auto&... tensors) {
    const auto one = [&](at::Tensor& tensor) {
      if (tensor.defined()) {
        visit(tensor);
      }
    };
    (one(const_cast<at::Tensor&>(tensors)), ...);
    return true;
  };
  using namespace torch::optim;
  if (auto* own = dynamic_cast<ParamState*>(&state)) {
    for (at::Tensor& tensor : own->tensors) show(tensor);
    return true;
  }
  if (auto* adamw = dynamic_cast<AdamWParamState*>(&state)) {
    return show(adamw->exp_avg(), adamw->exp_avg_sq(), adamw->max_exp_avg_sq());
  }
  if (auto* adam = dynamic_cast<AdamParamState*>(&state)) {
    return show(adam->exp_avg(), adam->exp_avg_sq(), adam->max_exp_avg_sq());
  }
  if (auto* sgd = dynamic_cast<SGDParamState*>(&state)) return show(sgd->momentum_buffer());
  if (auto* adagrad = dynamic_cast<AdagradParamState*>(&state)) return show(adagrad->sum());
  if (auto* rmsprop = dynamic_cast<RMSpropParamState*>(&state)) {
    return show(rmsprop->square_avg(), rmsprop->momentum_buffer(), rmsprop->grad_avg());
  }
  return false;
}

/// Brings what an optimizer keeps already, as `torch::optim::Adagrad` does from the beginning, to where its parameters
/// are. A template for fabric/separate.hpp.
template <class = void>
void follow_parameters(torch::optim::Optimizer& optimizer) {
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& parameter : group.params()) {
      const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      each_state_tensor(*found->second, [&](at::Tensor& tensor) {
        if (tensor.sizes() == parameter.sizes()) tensor = tensor.to(parameter.device());
      });
    }
  }
}

}  // namespace fabric::optim
