// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <utility>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "fabric/comm/world.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/strategy/engine.hpp"

namespace fabric {

/// One process, one device: every step is what a hand-written loop does.
template <class A>
requires(std::same_as<A, Cpu> || std::same_as<A, Cuda>) class Engine<A, SingleDevice> {
 public:
  struct Options {};
  struct ModuleState {};
  struct SyncGuard {
    ~SyncGuard() {}  // not trivial, so that `auto guard = ...` is not an unused variable
  };

  explicit Engine(const Options& /*options*/) {}

  static World launch(const Selection& /*selection*/, at::Device /*device*/) { return {}; }
  static void setup(ModuleState& /*state*/, torch::nn::Module& /*module*/, const World& /*world*/) {}

  template <class Run>
  static decltype(auto) forward(ModuleState& /*state*/, Run&& run) {
    return std::forward<Run>(run)();
  }
  static void after_backward(ModuleState& /*state*/) {}
  static void before_step(ModuleState& /*state*/) {}
  static void after_zero_grad(ModuleState& /*state*/, const torch::optim::Optimizer& /*optimizer*/) {}
  static SyncGuard no_backward_sync(ModuleState& /*state*/, bool /*enabled*/) { return {}; }
};

}  // namespace fabric
