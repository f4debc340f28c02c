// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

namespace fabric::optim {

/// LibTorch's options of an optimizer, plus the one that Python has besides: `maximize` climbs the loss instead of
/// descending. `AdamW(parameters, Maximize(AdamWOptions(1e-3)))`, or for one group alone,
/// `OptimizerParamGroup(parameters, std::make_unique<Maximize<AdamWOptions>>(AdamWOptions(1e-3)))`.
template <class Options>
class Maximize : public Options {
 public:
  explicit Maximize(const Options& options, bool maximize = true) : Options(options), maximize(maximize) {}
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override { return std::make_unique<Maximize>(*this); }

  bool maximize;
};

namespace detail {

/// Shows each option that LibTorch has of an optimizer, by Python's name: `visit(name, reference)`.
template <class Options, class Visit>
void each_option(Options& o, Visit&& visit) {
  using Own = std::remove_const_t<Options>;
  visit("lr", o.lr());
  if constexpr (std::derived_from<Own, torch::optim::SGDOptions>) {
    visit("momentum", o.momentum());
    visit("dampening", o.dampening());
    visit("weight_decay", o.weight_decay());
    visit("nesterov", o.nesterov());
  } else if constexpr (std::derived_from<Own, torch::optim::AdagradOptions>) {
    visit("lr_decay", o.lr_decay());
    visit("eps", o.eps());
    visit("weight_decay", o.weight_decay());
    visit("initial_accumulator_value", o.initial_accumulator_value());
  } else if constexpr (std::derived_from<Own, torch::optim::RMSpropOptions>) {
    visit("momentum", o.momentum());
    visit("alpha", o.alpha());
    visit("eps", o.eps());
    visit("centered", o.centered());
    visit("weight_decay", o.weight_decay());
  } else {
    static_assert(std::derived_from<Own, torch::optim::AdamOptions> ||
                  std::derived_from<Own, torch::optim::AdamWOptions>);
    visit("betas", o.betas());
    visit("eps", o.eps());
    visit("weight_decay", o.weight_decay());
    visit("amsgrad", o.amsgrad());
  }
}

/// Says what is wrong with one option after the other. Python's rules: no number is negative, but for `dampening`, and
/// decay rates are below 1.
class CheckOption {
 public:
  void operator()(const std::string& name, double value) {
    if (!(value >= 0) && name != "dampening") add(name, value, "zero or more");
  }
  void operator()(const std::string& name, const std::tuple<double, double>& betas) {
    for (const double beta : {std::get<0>(betas), std::get<1>(betas)}) {
      if (!(beta >= 0 && beta < 1)) add(name, beta, "from 0 to below 1");
    }
  }
  void operator()(const std::string& /*name*/, bool /*value*/) {}

  std::string problems;

 private:
  void add(const std::string& name, double value, const char* legal) {
    problems += "\n  " + name + " is " + std::to_string(value) + ": " + legal + " is legal";
  }
};

}  // namespace detail
}  // namespace fabric::optim
