// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

/// The networks that tests of sharding train, with weights and batches that tests/reference/fsdp2.py computes too, and
/// exactly: whole numbers divided by powers of two.
namespace fabric::tests::sharding {

inline constexpr std::int64_t rows = 4;         ///< Of each rank's batch.
inline constexpr std::int64_t batches = 4;      ///< They come again and again.
inline constexpr std::int64_t width = 32;       ///< Of the transformer, with two heads.
inline constexpr std::int64_t vocabulary = 29;  ///< No multiple of the number of ranks, as nothing says that it is.
inline constexpr std::int64_t tokens = 12;      ///< Of a sequence.

/// `count` whole numbers that look random, from -128 to 127.
inline at::Tensor numbers(std::int64_t count, std::int64_t salt) {
  at::Tensor result = at::empty({count}, at::kLong);
  auto* const values = result.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < count; ++i) {
    auto x = static_cast<std::uint32_t>(i) * 2654435761U + static_cast<std::uint32_t>(salt) * 40503U;
    x = (x ^ (x >> 15U)) * 2246822519U;
    values[i] = static_cast<std::int64_t>((x ^ (x >> 13U)) & 255U) - 128;
  }
  return result;
}

/// As in Python: `torch::nn::Linear` itself adds the bias to a batch of matrices apart, which rounds once more.
inline at::Tensor product(const torch::nn::Linear& linear, const at::Tensor& x) {
  return at::linear(x, linear->weight, linear->bias);
}

/// Attention and a feed-forward network, each on a normalised copy of its input.
struct BlockImpl : torch::nn::Module {
  torch::nn::LayerNorm norm1{register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))};
  torch::nn::Linear qkv{register_module("qkv", torch::nn::Linear(width, 3 * width))};
  torch::nn::Linear proj{register_module("proj", torch::nn::Linear(width, width))};
  torch::nn::LayerNorm norm2{register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))};
  torch::nn::Linear up{register_module("up", torch::nn::Linear(width, 4 * width))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(4 * width, width))};

  at::Tensor forward(at::Tensor x) {
    const auto heads = product(qkv, norm1(x)).view({x.size(0), x.size(1), 3, 2, -1}).permute({2, 0, 3, 1, 4}).unbind(0);
    const at::Tensor mixed = at::scaled_dot_product_attention(heads[0], heads[1], heads[2], {}, 0.0, true);
    x = x + product(proj, mixed.transpose(1, 2).reshape(x.sizes()));
    return x + product(down, torch::gelu(product(up, norm2(x))));
  }
};
TORCH_MODULE(Block);

/// Four blocks, from tokens to the logits of the next ones.
struct TransformerImpl : torch::nn::Module {
  torch::nn::Embedding embedding{register_module("tokens", torch::nn::Embedding(vocabulary, width))};
  torch::nn::Embedding positions{register_module("positions", torch::nn::Embedding(tokens, width))};
  torch::nn::Sequential blocks{register_module("blocks", torch::nn::Sequential(Block(), Block(), Block(), Block()))};
  torch::nn::LayerNorm norm{register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))};
  torch::nn::Linear head{
      register_module("head", torch::nn::Linear(torch::nn::LinearOptions(width, vocabulary).bias(false)))};

  at::Tensor forward(const at::Tensor& text) {
    const at::Tensor x = embedding(text) + positions(at::arange(text.size(1), text.options()));
    return product(head, norm(blocks->forward(x)));
  }

  /// What this rank's batch of a step is, and what should come out.
  static std::pair<at::Tensor, at::Tensor> batch(int step, int rank, at::ScalarType /*dtype*/) {
    const at::Tensor text =
        ((numbers(rows * (tokens + 1), 1000 + step % batches * 64 + rank) + 128) % vocabulary).view({rows, -1});
    return {text.narrow(1, 0, tokens), text.narrow(1, 1, tokens)};
  }
};
TORCH_MODULE(Transformer);

/// A convolution that halves the image, normalised over the batch.
struct StageImpl : torch::nn::Module {
  StageImpl(std::int64_t channels_in, std::int64_t channels_out)
      : conv(register_module(
            "conv", torch::nn::Conv2d(
                        torch::nn::Conv2dOptions(channels_in, channels_out, 3).stride(2).padding(1).bias(false)))),
        norm(register_module("norm", torch::nn::BatchNorm2d(channels_out))) {}

  at::Tensor forward(const at::Tensor& x) { return torch::relu(norm(conv(x))); }

  torch::nn::Conv2d conv;
  torch::nn::BatchNorm2d norm;
};
TORCH_MODULE(Stage);

/// Grey images of 16 x 16 to the logits of 10 classes.
struct CnnImpl : torch::nn::Module {
  torch::nn::Sequential blocks{
      register_module("blocks", torch::nn::Sequential(Stage(1, 6), Stage(6, 10), Stage(10, 16)))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(16 * 2 * 2, 10))};

  at::Tensor forward(const at::Tensor& x) { return product(head, blocks->forward(x).flatten(1)); }

  /// What this rank's batch of a step is, and what should come out.
  static std::pair<at::Tensor, at::Tensor> batch(int step, int rank, at::ScalarType dtype) {
    const std::int64_t salt = 5000 + step % batches * 64 + rank;
    return {numbers(rows * 256, salt).view({rows, 1, 16, 16}).to(dtype) / 128.0, (numbers(rows, salt + 7) + 128) % 10};
  }
};
TORCH_MODULE(Cnn);

/// Gives the n-th parameter the values `numbers(n)`, scaled to about LibTorch's own initialisation.
inline void set_weights(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  std::int64_t salt = 0;
  for (auto& item : module.named_parameters()) {
    at::Tensor& parameter = item.value();
    double bound = 0.125;
    if (parameter.dim() > 1) {
      bound = 1;
      while (bound * bound * static_cast<double>(parameter[0].numel()) > 1) bound /= 2;
    }
    at::Tensor values = numbers(parameter.numel(), salt++).view(parameter.sizes()).to(at::kFloat) * (bound / 128);
    const std::string& name = item.key();
    if (parameter.dim() == 1 && name.find("norm") != std::string::npos && name.ends_with("weight")) values += 1;
    parameter.copy_(values);
  }
}

/// The loss, in 64 bits, so that what is compared is the model's digits.
inline at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& targets) {
  return torch::cross_entropy_loss(logits.to(at::kDouble).flatten(0, -2), targets.flatten());
}

/// A sum in which each element has a weight of its own: of elements [begin, begin + size) of the `index`-th parameter
/// of a module, which has `all` of them. What ranks hold of a parameter adds up to the whole one's.
inline double checksum(const at::Tensor& elements, std::int64_t index, std::int64_t begin, std::int64_t all) {
  const at::Tensor weights = numbers(all, 7000 + index).narrow(0, begin, elements.numel());
  return (elements.detach().cpu().to(at::kDouble).flatten() * weights).sum().item<double>();
}
inline double checksum(const at::Tensor& parameter, std::int64_t index) {
  return checksum(parameter, index, 0, parameter.numel());
}

}  // namespace fabric::tests::sharding
