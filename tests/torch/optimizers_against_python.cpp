// SPDX-License-Identifier: Apache-2.0
//
// fabric::optim step by step against what Python's fused optimizers did: tests/reference/optimizers.py.
#include <memory>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"

namespace {

using namespace fabric;
using namespace fabric::tests;

torch::optim::AdamWOptions read(torch::optim::AdamWOptions options, const Json& json) {
  options.lr(json.value("lr", options.lr())).eps(json.value("eps", options.eps()));
  options.weight_decay(json.value("weight_decay", options.weight_decay()));
  if (json.contains("betas")) options.betas({json["betas"][0], json["betas"][1]});
  options.amsgrad(json.value("amsgrad", options.amsgrad()));
  return options;
}
torch::optim::AdamOptions read(torch::optim::AdamOptions options, const Json& json) {
  options.lr(json.value("lr", options.lr())).eps(json.value("eps", options.eps()));
  options.weight_decay(json.value("weight_decay", options.weight_decay()));
  if (json.contains("betas")) options.betas({json["betas"][0], json["betas"][1]});
  options.amsgrad(json.value("amsgrad", options.amsgrad()));
  return options;
}
torch::optim::SGDOptions read(torch::optim::SGDOptions options, const Json& json) {
  options.lr(json.value("lr", options.lr())).momentum(json.value("momentum", options.momentum()));
  options.dampening(json.value("dampening", options.dampening()));
  options.weight_decay(json.value("weight_decay", options.weight_decay()));
  options.nesterov(json.value("nesterov", options.nesterov()));
  return options;
}
torch::optim::AdagradOptions read(torch::optim::AdagradOptions options, const Json& json) {
  options.lr(json.value("lr", options.lr())).lr_decay(json.value("lr_decay", options.lr_decay()));
  options.eps(json.value("eps", options.eps())).weight_decay(json.value("weight_decay", options.weight_decay()));
  options.initial_accumulator_value(json.value("initial_accumulator_value", options.initial_accumulator_value()));
  return options;
}

/// One of the traces, and an optimizer made as Python's was.
template <class O>
struct Run {
  using Options = typename O::Options;
  using Climbing = optim::Maximize<Options>;

  Run(const Json& trace, Options options) : trace(trace) {
    const Json& own = trace["options"];
    options = read(options, own);
    for (const at::Tensor& tensor : tensors_of(trace["parameters"])) parameters.push_back(tensor.requires_grad_());
    std::vector<torch::optim::OptimizerParamGroup> groups;
    auto next = parameters.begin();
    for (const Json& group : trace["groups"]) {
      const auto end = next + group["count"].get<std::ptrdiff_t>();
      std::unique_ptr<torch::optim::OptimizerOptions> group_options;
      const Options changed = read(options, group["options"]);
      if (group["options"].contains("maximize")) {
        group_options = std::make_unique<Climbing>(changed);
      } else if (!group["options"].empty()) {
        group_options = std::make_unique<Options>(changed);
      }
      groups.emplace_back(std::vector<at::Tensor>(next, end));
      if (group_options) groups.back().set_options(std::move(group_options));
      next = end;
    }
    if (own.value("maximize", false)) {
      optimizer = std::make_unique<O>(groups, Climbing(options));
    } else {
      optimizer = std::make_unique<O>(groups, options);
    }
    // LibTorch 2.15 takes an option of a group that is the class's default for one that was not given.
    for (std::size_t i = 0; i < groups.size(); ++i) {
      auto& group_options = static_cast<Options&>(optimizer->param_groups()[i].options());
      group_options = read(options, trace["groups"][i]["options"]);
    }
  }

  /// Parameters and state as Python had them before this step.
  void restart_at(std::size_t step) {
    const at::NoGradGuard no_grad;
    const Json& source = step == 0 ? trace["parameters"] : trace["steps"][step - 1]["parameters"];
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].copy_(tensor_of(source[i]));
    if (step > 0) optimizer->load_state_dict(value_of(trace["steps"][step - 1]["state_dict"]));
  }

  /// One step; returns how far everything is from what Python had after it.
  double step(std::size_t number) {
    const Json& expected = trace["steps"][number];
    const auto gradients = tensors_of(expected["gradients"]);
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = gradients[i];
    for (std::size_t i = 0; i < optimizer->param_groups().size(); ++i) {
      optimizer->param_groups()[i].options().set_lr(expected["lr"][i]);
    }
    if (expected["found_inf"].is_null()) {
      optimizer->step();
    } else {
      StepScale scale;
      if (!expected["grad_scale"].is_null()) scale.grad_scale = at::full({}, expected["grad_scale"].get<float>());
      scale.found_inf = at::full({}, expected["found_inf"].get<float>());
      optimizer->step(scale);
    }
    double distance = 0;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      distance = std::max(distance, ulps_between(parameters[i], tensor_of(expected["parameters"][i])));
      if (!expected["gradients_after"].is_null()) {
        const at::Tensor gradient = tensor_of(expected["gradients_after"][i]);
        distance = std::max(distance, ulps_between(parameters[i].grad(), gradient));
      }
    }
    return std::max(distance, ulps_between(optimizer->state_dict(), value_of(expected["state_dict"])));
  }

  const Json& trace;
  std::vector<at::Tensor> parameters;
  std::unique_ptr<O> optimizer;
};

/// Calls `body` with each trace of an optimizer, made ready; returns how many there were.
template <class O, class Body>
int for_each_trace(const char* name, const typename O::Options& defaults, Body body) {
  static const Json reference = read_reference("optimizers.json.gz");
  int traces = 0;
  for (const Json& trace : reference["optimizers"]) {
    if (trace["optimizer"] != name) continue;
    INFO(name << ": " << trace["name"].get<std::string>());
    Run<O> run(trace, defaults);
    body(run);
    ++traces;
  }
  return traces;
}

/// Calls `body` with the traces of all optimizers.
template <class Body>
void for_all_traces(Body body) {
  CHECK(for_each_trace<optim::AdamW>("AdamW", {}, body) == 14);
  CHECK(for_each_trace<optim::Adam>("Adam", {}, body) == 14);
  CHECK(for_each_trace<optim::SGD>("SGD", {1e-3}, body) == 15);
  CHECK(for_each_trace<optim::Adagrad>("Adagrad", {}, body) == 12);
}

}  // namespace

TEST_CASE("[issue-5.3] each step is within one unit in the last place of Python's, from Python's state before it") {
  for_all_traces([](auto& run) {
    for (std::size_t step = 0; step < run.trace["steps"].size(); ++step) {
      INFO("step " << step);
      run.restart_at(step);
      CHECK(run.step(step) <= 1);
    }
  });
}

TEST_CASE("[issue-5.3] a run of steps stays with Python's") {
  for_all_traces([](auto& run) {
    for (std::size_t step = 0; step < run.trace["steps"].size(); ++step) {
      INFO("step " << step);
      CHECK(run.step(step) <= 1 + 2.0 * static_cast<double>(step));
    }
  });
}
