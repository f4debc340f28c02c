// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>

#include <torch/torch.h>

/// Which rows of the file: every fifth (row % 5 == 4) is held out.
enum class Part { training, held_out };

/// Handwritten digits: images (N, 1, 8, 8) from 0 to 1, labels (N).
class Digits : public torch::data::datasets::BatchDataset<Digits, torch::data::Example<>> {
 public:
  /// Throws std::runtime_error when the file cannot be read or is not 65 numbers a line.
  Digits(const std::filesystem::path& file, Part part);

  torch::data::Example<> get_batch(c10::ArrayRef<std::size_t> rows) override;
  [[nodiscard]] std::optional<std::size_t> size() const override { return static_cast<std::size_t>(labels_.size(0)); }

 private:
  at::Tensor images_;
  at::Tensor labels_;
};

/// A small convolutional network: two convolutions, a pooling, two linear layers; 10 logits.
struct DigitNetImpl : torch::nn::Module {
  DigitNetImpl();
  at::Tensor forward(const at::Tensor& images);

  torch::nn::Conv2d first{nullptr}, second{nullptr};
  torch::nn::Linear hidden{nullptr}, logits{nullptr};
};
TORCH_MODULE(DigitNet);
