// SPDX-License-Identifier: Apache-2.0
#include "digits.hpp"

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <vector>

Digits::Digits(const std::filesystem::path& file, Part part) {
  std::ifstream input(file);
  if (!input) throw std::runtime_error("cannot read " + file.string());
  constexpr int pixels = 64;
  std::vector<float> images;
  std::vector<std::int64_t> labels;
  int row = 0;
  for (std::string line; std::getline(input, line); ++row) {
    if ((row % 5 == 4) != (part == Part::held_out)) continue;
    std::istringstream numbers(line);
    int number = 0;
    int count = 0;
    for (char comma = ','; comma == ',' && numbers >> number; ++count) {
      count < pixels ? images.push_back(static_cast<float>(number) / 16.0F) : labels.push_back(number);
      if (!(numbers >> comma)) comma = '\n';
    }
    if (count != pixels + 1) {
      throw std::runtime_error(file.string() + ":" + std::to_string(row + 1) +
                               ": 65 numbers with commas between were expected");
    }
  }
  images_ = torch::tensor(images).view({-1, 1, 8, 8});
  labels_ = torch::tensor(labels);
}

torch::data::Example<> Digits::get_batch(c10::ArrayRef<std::size_t> rows) {
  const auto index = torch::tensor(std::vector<std::int64_t>(rows.begin(), rows.end()));
  return {images_.index_select(0, index), labels_.index_select(0, index)};
}

DigitNetImpl::DigitNetImpl()
    : first(register_module("first", torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 32, 3).padding(1)))),
      second(register_module("second", torch::nn::Conv2d(torch::nn::Conv2dOptions(32, 64, 3).padding(1)))),
      hidden(register_module("hidden", torch::nn::Linear(64 * 4 * 4, 128))),
      logits(register_module("logits", torch::nn::Linear(128, 10))) {}

at::Tensor DigitNetImpl::forward(const at::Tensor& images) {
  at::Tensor x = torch::relu(first(images));
  x = torch::max_pool2d(torch::relu(second(x)), 2);
  return logits(torch::relu(hidden(x.flatten(1))));
}
