// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include "fabric/error.hpp"

namespace fabric::detail {

/// Decides what becomes of the tensors that operators save for their backward.
class SavedTensors {
 public:
  SavedTensors() = default;
  SavedTensors(const SavedTensors&) = delete;
  SavedTensors& operator=(const SavedTensors&) = delete;
  virtual ~SavedTensors() = default;
  /// For one tensor that is about to be saved: takes it, and gives it back in backward.
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> hooks() = 0;

  /// While alive, `keeper` decides on this thread. Guards may be nested: the innermost decides.
  class Guard {
   public:
    explicit Guard(SavedTensors& keeper) {
      install();
      keepers().push_back(&keeper);
    }
    ~Guard() { keepers().pop_back(); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
  };

 private:
  /// LibTorch asks its engine for the hooks of each saved tensor. The engine itself has none, but it can be replaced,
  /// which is how Python gets its own in.
  class Engine : public torch::autograd::Engine {
   public:
    std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
      return keepers().empty() ? nullptr : keepers().back()->hooks();
    }
    static torch::autograd::Engine& instance() {
      static Engine engine;
      return engine;
    }
  };

  static std::vector<SavedTensors*>& keepers() {
    thread_local std::vector<SavedTensors*> stack;
    return stack;
  }
  static void install() {
    static const bool once = [] {
      if (&torch::autograd::Engine::get_default_engine() != &torch::autograd::Engine::get_base_engine()) {
        throw Error(
            "fabric: recompute: this process uses an autograd engine that is not LibTorch's own, such as Python's: "
            "saved tensors cannot be watched there; use ActivationCheckpointing::none()");
      }
      torch::autograd::set_default_engine_stub(&Engine::instance);
      return true;
    }();
    static_cast<void>(once);
  }
};

}  // namespace fabric::detail
