// SPDX-License-Identifier: Apache-2.0
#include "task.hpp"

#include <fabric/separate_source.hpp>

Mlp::Mlp(const Settings& settings) : layers(register_module("layers", torch::nn::ModuleList())) {
  for (int i = 0; i < settings.layers; ++i) layers->push_back(torch::nn::Linear(settings.width, settings.width));
}

at::Tensor Mlp::forward(at::Tensor x) {
  for (const auto& layer : *layers) x = layer->as<torch::nn::Linear>()->forward(x).relu();
  return x;
}

Batch make_batch(const Settings& settings) {
  return {torch::randn({settings.batch_size, settings.width}), torch::rand({settings.batch_size, settings.width})};
}

std::shared_ptr<torch::optim::SGD> make_optimizer(const torch::nn::Module& module) {
  return std::make_shared<torch::optim::SGD>(module.parameters(), 0.01);
}
