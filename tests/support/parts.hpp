// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>

#include <torch/torch.h>

namespace fabric::tests {

/// One of the equal parts of a network, which may be looked into while it computes.
struct PartImpl : torch::nn::Module {
  torch::nn::Linear up{register_module("up", torch::nn::Linear(8, 24))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(24, 8))};
  std::function<void()> inside = [] {};
  std::function<void()> inside_backward{};

  at::Tensor forward(const at::Tensor& x) {
    auto hidden = torch::tanh(up(x));
    inside();
    if (inside_backward && hidden.requires_grad())
      hidden.register_hook([this](const at::Tensor&) { inside_backward(); });
    return x + down(hidden);
  }
};
TORCH_MODULE(Part);

/// Five of them, one after the other.
struct NetImpl : torch::nn::Module {
  torch::nn::ModuleList parts{register_module("parts", torch::nn::ModuleList())};
  explicit NetImpl(int number = 5) {
    for (int i = 0; i < number; ++i) parts->push_back(Part());
  }
  PartImpl& part(std::size_t i) { return *parts->ptr<PartImpl>(i); }
  at::Tensor forward(at::Tensor x) {
    for (const auto& part : *parts) x = part->as<PartImpl>()->forward(x);
    return x;
  }
};
TORCH_MODULE(Net);

inline Net make_net() {
  torch::manual_seed(5);
  return {};
}

}  // namespace fabric::tests
