// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <utility>

#include <torch/torch.h>

#include "fabric/data/distributed_sampler.hpp"
#include "fabric/error.hpp"
#include "fabric/tree.hpp"

namespace fabric {

/// How `setup_dataloader` reads a dataset.
struct LoaderOptions {
  std::size_t batch_size = 1;  ///< Rows per rank and step.
  bool shuffle = false;        ///< Differently in each epoch, alike on all ranks.
  std::uint64_t seed = 0;
  bool drop_last = false;   ///< Leave out a last batch that is not full.
  bool pad = true;          ///< Repeat rows so that all ranks have equally many batches; see `Shares`.
  std::size_t workers = 0;  ///< Threads that read ahead.
};

/// Batches of this rank's rows, on its device. Each `begin()` starts the next epoch, with an order of its own if
/// shuffled: `for (auto& batch : loader)`.
template <class Dataset>
class DataLoader {
 public:
  using Loader = decltype(torch::data::make_data_loader(std::declval<Dataset>(), std::declval<DistributedSampler>(),
                                                        torch::data::DataLoaderOptions()));
  using TorchIterator = decltype(std::declval<Loader&>()->begin());
  using Batch = typename Dataset::BatchType;

  /// Throws fabric::Error for a dataset without a size or a batch size of zero.
  DataLoader(Dataset dataset, const Shares& shares, const LoaderOptions& options, at::Device device)
      : options_(options), device_(device), dataset_(std::move(dataset)), sampler_(rows_of(dataset_), shares) {
    if (options.batch_size == 0) throw Error("fabric: setup_dataloader: batch_size is 0; one or more is legal");
  }

  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Batch;
    using difference_type = std::ptrdiff_t;
    using pointer = Batch*;
    using reference = Batch&;

    Iterator(TorchIterator at, TorchIterator end, at::Device device)
        : at_(std::move(at)), end_(std::move(end)), device_(device) {
      take();
    }
    Batch& operator*() { return batch_; }
    Batch* operator->() { return &batch_; }
    Iterator& operator++() {
      ++at_;
      take();
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(const Iterator& other) const { return at_ == other.at_; }

   private:
    void take() {
      if (at_ != end_) {
        batch_ = tree::map(std::move(*at_), [this](const at::Tensor& tensor) { return tensor.to(device_); });
      }
    }
    TorchIterator at_;
    TorchIterator end_;
    at::Device device_;
    Batch batch_{};
  };

  /// Begins the next epoch, or the one that `set_epoch` named, with threads of its own: a loop that was left early
  /// leaves nothing behind.
  Iterator begin() {
    sampler_.set_epoch(next_epoch_++);
    loader_ = torch::data::make_data_loader(
        dataset_, sampler_,
        torch::data::DataLoaderOptions(options_.batch_size).workers(options_.workers).drop_last(options_.drop_last));
    return {loader_->begin(), loader_->end(), device_};
  }
  /// The end of the epoch that `begin` began.
  Iterator end() { return {loader_->end(), loader_->end(), device_}; }

  /// Batches per epoch on this rank.
  [[nodiscard]] std::size_t size() const {
    const std::size_t rows = sampler_.size();
    return options_.drop_last ? rows / options_.batch_size : (rows + options_.batch_size - 1) / options_.batch_size;
  }
  /// Rows per epoch on this rank.
  [[nodiscard]] std::size_t rows() const { return sampler_.size(); }

  /// The next `begin()` begins that epoch.
  void set_epoch(std::uint64_t epoch) { next_epoch_ = epoch; }

 private:
  static std::size_t rows_of(const Dataset& dataset) {
    const auto rows = dataset.size();
    if (!rows)
      throw Error("fabric: setup_dataloader needs a dataset that knows its size, to deal its rows to the ranks");
    return *rows;
  }

  LoaderOptions options_;
  at::Device device_;
  std::uint64_t next_epoch_ = 0;
  Dataset dataset_;
  DistributedSampler sampler_;
  Loader loader_;
};

}  // namespace fabric
