// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <torch/torch.h>

#include "support/loop.hpp"

namespace bench {

/// The shape of a transformer that predicts tokens, like GPT-2.
struct GptSize {
  int layers = 12;
  std::int64_t width = 768;
  std::int64_t heads = 12;
  std::int64_t vocabulary = 50257;
  std::int64_t positions = 1024;
  std::int64_t tokens = 64;  ///< In the one sequence of a batch: few, so that a step takes about a second on one core.

  [[nodiscard]] std::int64_t parameters() const {
    return (vocabulary + positions) * width + layers * (12 * width * width + 13 * width) + 2 * width;
  }
  [[nodiscard]] std::string name() const {
    const auto millions = static_cast<double>(parameters()) / 1e6;
    return std::to_string(std::lround(millions)) + "M";
  }
};

/// As in Python: `torch::nn::Linear` itself adds the bias to a batch of matrices apart, which takes longer.
inline at::Tensor product(const torch::nn::Linear& linear, const at::Tensor& x) {
  return at::linear(x, linear->weight, linear->bias);
}

/// Attention and a feed-forward network, each on a normalised copy of its input.
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const GptSize& size) : heads_(size.heads) {
    const std::int64_t width = size.width;
    register_module("norm1", norm1_ = torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    register_module("qkv", qkv_ = torch::nn::Linear(width, 3 * width));
    register_module("proj", proj_ = torch::nn::Linear(width, width));
    register_module("norm2", norm2_ = torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    register_module("up", up_ = torch::nn::Linear(width, 4 * width));
    register_module("down", down_ = torch::nn::Linear(4 * width, width));
  }

  /// (batch, tokens, width) to the same.
  at::Tensor forward(at::Tensor x) {
    const auto heads =
        product(qkv_, norm1_(x)).view({x.size(0), x.size(1), 3, heads_, -1}).permute({2, 0, 3, 1, 4}).unbind(0);
    const at::Tensor mixed = at::scaled_dot_product_attention(heads[0], heads[1], heads[2], {}, 0.0, true);
    x = x + product(proj_, mixed.transpose(1, 2).reshape(x.sizes()));
    return x + product(down_, torch::gelu(product(up_, norm2_(x))));
  }

 private:
  std::int64_t heads_;
  torch::nn::LayerNorm norm1_{nullptr}, norm2_{nullptr};
  torch::nn::Linear qkv_{nullptr}, proj_{nullptr}, up_{nullptr}, down_{nullptr};
};
TORCH_MODULE(Block);

/// Tokens to the logits of the next ones. The embedding of tokens is the output's weight too.
class GptImpl : public torch::nn::Module {
 public:
  explicit GptImpl(const GptSize& size) {
    register_module("tokens", tokens_ = torch::nn::Embedding(size.vocabulary, size.width));
    register_module("positions", positions_ = torch::nn::Embedding(size.positions, size.width));
    register_module("blocks", blocks_);
    for (int i = 0; i < size.layers; ++i) blocks_->push_back(Block(size));
    register_module("norm", norm_ = torch::nn::LayerNorm(torch::nn::LayerNormOptions({size.width})));
    const at::NoGradGuard no_grad;
    for (at::Tensor& parameter : parameters()) {
      if (parameter.dim() > 1) parameter.normal_(0, 0.02);
    }
  }

  /// (batch, tokens) to (batch, tokens, vocabulary).
  at::Tensor forward(const at::Tensor& tokens) {
    const at::Tensor x = tokens_(tokens) + positions_(at::arange(tokens.size(1), tokens.options()));
    return torch::linear(norm_(blocks_->forward(x)), tokens_->weight);
  }

 private:
  torch::nn::Embedding tokens_{nullptr}, positions_{nullptr};
  torch::nn::Sequential blocks_;
  torch::nn::LayerNorm norm_{nullptr};
};
TORCH_MODULE(Gpt);

/// The networks, batches and losses that the loops train, by size.
inline torch::nn::Sequential make_net(const Size& size) { return make_mlp(size); }
inline Gpt make_net(const GptSize& size) { return Gpt(size); }

inline Batch make_data(const Size& size) { return make_batch(size); }
inline Batch make_data(const GptSize& size) {
  const at::Tensor text = torch::randint(size.vocabulary, {1, size.tokens + 1});
  return {text.slice(1, 0, size.tokens), text.slice(1, 1)};
}

inline at::Tensor loss_of(const Size& /*size*/, const at::Tensor& outputs, const at::Tensor& targets) {
  return torch::mse_loss(outputs, targets);
}
inline at::Tensor loss_of(const GptSize& size, const at::Tensor& outputs, const at::Tensor& targets) {
  return torch::cross_entropy_loss(outputs.view({-1, size.vocabulary}), targets.flatten());
}

}  // namespace bench
