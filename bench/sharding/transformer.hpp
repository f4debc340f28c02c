// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <torch/torch.h>

namespace bench {

/// The shape of a transformer that predicts tokens.
struct Shape {
  int layers;
  std::int64_t width;
  std::int64_t heads;
  std::int64_t rows;  ///< Of each rank's batch.
  std::int64_t vocabulary = 128;
  std::int64_t tokens = 32;  ///< Of a row: few, so that what is not the model's is small.

  /// Of one block.
  [[nodiscard]] std::int64_t block_parameters() const { return 12 * width * width + 13 * width; }
  [[nodiscard]] std::int64_t parameters() const {
    return layers * block_parameters() + (2 * vocabulary + tokens) * width + 2 * width;
  }
};

/// `small` (3.2 million parameters), `medium` (42.8) or `large` (302.6). Throws std::runtime_error for another name.
[[nodiscard]] inline Shape shape_of(std::string_view name) {
  if (name == "small") return {.layers = 4, .width = 256, .heads = 4, .rows = 2};
  if (name == "medium") return {.layers = 6, .width = 768, .heads = 12, .rows = 2};
  if (name == "large") return {.layers = 24, .width = 1024, .heads = 16, .rows = 1};
  throw std::runtime_error("no model " + std::string(name) + ": small, medium or large");
}

/// Attention and a feed-forward network, each on a normalised copy of its input.
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const Shape& shape) : heads_(shape.heads) {
    const std::int64_t width = shape.width;
    norm1_ = register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    qkv_ = register_module("qkv", torch::nn::Linear(width, 3 * width));
    proj_ = register_module("proj", torch::nn::Linear(width, width));
    norm2_ = register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    up_ = register_module("up", torch::nn::Linear(width, 4 * width));
    down_ = register_module("down", torch::nn::Linear(4 * width, width));
  }

  /// (rows, tokens, width) to the same.
  at::Tensor forward(at::Tensor x) {
    const auto heads =
        product(qkv_, norm1_(x)).view({x.size(0), x.size(1), 3, heads_, -1}).permute({2, 0, 3, 1, 4}).unbind(0);
    const at::Tensor mixed = at::scaled_dot_product_attention(heads[0], heads[1], heads[2], {}, 0.0, true);
    x = x + product(proj_, mixed.transpose(1, 2).reshape(x.sizes()));
    return x + product(down_, torch::gelu(product(up_, norm2_(x))));
  }

 private:
  /// As in Python: `torch::nn::Linear` itself adds the bias to a batch of matrices in a pass of its own.
  static at::Tensor product(const torch::nn::Linear& linear, const at::Tensor& x) {
    return at::linear(x, linear->weight, linear->bias);
  }

  std::int64_t heads_;
  torch::nn::LayerNorm norm1_{nullptr}, norm2_{nullptr};
  torch::nn::Linear qkv_{nullptr}, proj_{nullptr}, up_{nullptr}, down_{nullptr};
};
TORCH_MODULE(Block);

/// Tokens to the logits of the next ones.
class TransformerImpl : public torch::nn::Module {
 public:
  explicit TransformerImpl(const Shape& shape) {
    tokens_ = register_module("tokens", torch::nn::Embedding(shape.vocabulary, shape.width));
    positions_ = register_module("positions", torch::nn::Embedding(shape.tokens, shape.width));
    register_module("blocks", blocks_);
    for (int i = 0; i < shape.layers; ++i) blocks_->push_back(Block(shape));
    norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({shape.width})));
    head_ =
        register_module("head", torch::nn::Linear(torch::nn::LinearOptions(shape.width, shape.vocabulary).bias(false)));
  }

  /// (rows, tokens) to (rows, tokens, vocabulary).
  at::Tensor forward(const at::Tensor& text) {
    const at::Tensor x = tokens_(text) + positions_(at::arange(text.size(1)));
    return head_(norm_(blocks_->forward(x)));
  }

 private:
  torch::nn::Embedding tokens_{nullptr}, positions_{nullptr};
  torch::nn::Sequential blocks_;
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(Transformer);

/// The one batch that a rank trains on: tokens, and those that follow.
struct Text {
  at::Tensor inputs;   // (rows, tokens)
  at::Tensor targets;  // (rows, tokens)
};
[[nodiscard]] inline Text make_text(const Shape& shape) {
  const at::Tensor text = torch::randint(shape.vocabulary, {shape.rows, shape.tokens + 1});
  return {text.slice(1, 0, shape.tokens), text.slice(1, 1)};
}

[[nodiscard]] inline at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& targets) {
  return torch::cross_entropy_loss(logits.flatten(0, 1), targets.flatten());
}

}  // namespace bench
