// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

#include <torch/torch.h>

namespace bench {

/// A training loop that is ready: runs that many steps more and returns the last loss.
using Loop = std::function<double(int steps)>;

/// The networks that loops are compared on: `layers` times Linear(width, width) and ReLU.
struct Size {
  int layers;
  std::int64_t width;
  [[nodiscard]] std::string name() const { return std::to_string(layers) + "x" + std::to_string(width); }
};
inline constexpr Size sizes[] = {{4, 64}, {8, 512}};

/// Throws std::invalid_argument for a name that no size has.
[[nodiscard]] inline const Size& size_named(std::string_view name) {
  for (const Size& size : sizes) {
    if (size.name() == name) return size;
  }
  throw std::invalid_argument("there is no size '" + std::string(name) + "', but 4x64 and 8x512");
}

inline constexpr double learning_rate = 0.01;

[[nodiscard]] inline torch::nn::Sequential make_mlp(const Size& size) {
  torch::nn::Sequential mlp;
  for (int i = 0; i < size.layers; ++i) {
    mlp->push_back(torch::nn::Linear(size.width, size.width));
    mlp->push_back(torch::nn::ReLU());
  }
  return mlp;
}

/// The one batch that a loop trains on: 32 random rows.
struct Batch {
  at::Tensor inputs;   // (32, width)
  at::Tensor targets;  // (32, width)
};
[[nodiscard]] inline Batch make_batch(const Size& size) {
  return {torch::randn({32, size.width}), torch::rand({32, size.width})};
}

}  // namespace bench
