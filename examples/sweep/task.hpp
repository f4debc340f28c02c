// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include <torch/torch.h>

#include "menu.hpp"

// What is trained, by all entries alike: compiled once, in task.cpp, so that an entry costs only what its policies
// change.

/// Linear layers with ReLU between them, all of one width.
struct Mlp : torch::nn::Module {
  explicit Mlp(const Settings& settings);
  at::Tensor forward(at::Tensor x);

  torch::nn::ModuleList layers;
};

/// One batch of each process: (batch size, width).
struct Batch {
  at::Tensor inputs;
  at::Tensor targets;
};

Batch make_batch(const Settings& settings);
std::shared_ptr<torch::optim::SGD> make_optimizer(const torch::nn::Module& module);
