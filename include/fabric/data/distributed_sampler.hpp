// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/data/samplers/base.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

namespace fabric {

/// How a dataset's rows are dealt to the ranks.
struct Shares {
  std::size_t replicas = 1;  ///< Ranks.
  std::size_t rank = 0;
  bool shuffle = false;
  std::uint64_t seed = 0;  ///< The same on all ranks. Each epoch is shuffled by seed + epoch.
  bool pad = true;         ///< Repeat rows until all ranks have equally many; else the last rows go to the first ranks.
};

/// Deals row `rank`, `rank + replicas`, ... of the (shuffled) dataset to each rank: the order that Python's
/// `torch.utils.data.DistributedSampler` gives for the same seed and epoch. Copies share the epoch.
class DistributedSampler : public torch::data::samplers::Sampler<> {
 public:
  DistributedSampler(std::size_t rows, const Shares& shares)
      : rows_(rows), shares_(shares), start_(std::make_shared<Start>()) {
    deal();
  }

  /// Rows that this rank gets per epoch.
  [[nodiscard]] std::size_t size() const {
    if (shares_.pad) return (rows_ + shares_.replicas - 1) / shares_.replicas;
    return rows_ / shares_.replicas + (shares_.rank < rows_ % shares_.replicas ? 1 : 0);
  }

  [[nodiscard]] std::uint64_t epoch() const { return start_->epoch; }
  /// Of this sampler and its copies, from their next reset on. That one leaves out the first `given` rows of this rank,
  /// for an epoch that is taken up where it was left.
  void set_epoch(std::uint64_t epoch, std::size_t given = 0) { *start_ = {epoch, given}; }
  [[nodiscard]] const Shares& shares() const { return shares_; }
  /// Of the dataset.
  [[nodiscard]] std::size_t dataset_rows() const { return rows_; }

  /// Begins an epoch.
  void reset(std::optional<std::size_t> new_rows = std::nullopt) override {
    if (new_rows) rows_ = *new_rows;
    deal();
    position_ = std::min(std::exchange(start_->given, 0), indices_.size());
  }

  /// The next at most `batch_size` rows; nothing at the end.
  std::optional<std::vector<std::size_t>> next(std::size_t batch_size) override {
    const std::size_t n = std::min(batch_size, indices_.size() - position_);
    if (n == 0) return std::nullopt;
    const auto first = indices_.begin() + static_cast<std::ptrdiff_t>(position_);
    position_ += n;
    return std::vector<std::size_t>(first, first + static_cast<std::ptrdiff_t>(n));
  }

  void save(torch::serialize::OutputArchive& archive) const override {
    archive.write("epoch", torch::tensor(static_cast<int64_t>(start_->epoch)), /*is_buffer=*/true);
    archive.write("position", torch::tensor(static_cast<int64_t>(position_)), /*is_buffer=*/true);
  }
  void load(torch::serialize::InputArchive& archive) override {
    at::Tensor epoch;
    at::Tensor position;
    archive.read("epoch", epoch, /*is_buffer=*/true);
    archive.read("position", position, /*is_buffer=*/true);
    start_->epoch = static_cast<std::uint64_t>(epoch.item<int64_t>());
    deal();
    position_ = static_cast<std::size_t>(position.item<int64_t>());
  }

 private:
  void deal() {
    position_ = 0;
    indices_.clear();
    if (rows_ == 0) return;
    at::Tensor order;
    if (shares_.shuffle) {
      order = at::randperm(static_cast<int64_t>(rows_),
                           at::make_generator<at::CPUGeneratorImpl>(shares_.seed + start_->epoch),
                           at::TensorOptions().dtype(at::kLong));
    } else {
      order = at::arange(static_cast<int64_t>(rows_));
    }
    const auto* row = order.const_data_ptr<int64_t>();
    for (std::size_t i = shares_.rank; indices_.size() < size(); i += shares_.replicas) {
      indices_.push_back(static_cast<std::size_t>(row[i % rows_]));
    }
  }

  std::size_t rows_;
  Shares shares_;
  struct Start {
    std::uint64_t epoch = 0;
    std::size_t given = 0;
  };
  std::shared_ptr<Start> start_;
  std::vector<std::size_t> indices_;
  std::size_t position_ = 0;
};

}  // namespace fabric
