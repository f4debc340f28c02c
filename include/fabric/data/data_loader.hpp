// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <torch/data/dataloader.h>

#include "fabric/data/batches.hpp"
#include "fabric/data/device_copies.hpp"
#include "fabric/data/distributed_sampler.hpp"
#include "fabric/error.hpp"

namespace fabric {

class Value;  // fabric/checkpoint.hpp

/// How `setup_dataloader` reads a dataset.
struct LoaderOptions {
  std::size_t batch_size = 1;  ///< Rows per rank and step.
  bool shuffle = false;        ///< Differently in each epoch, alike on all ranks.
  std::uint64_t seed = 0;
  bool drop_last = false;  ///< Leave out a last batch that is not full.
  bool pad = true;         ///< Repeat rows so that all ranks have equally many batches; see `Shares`.
  /// Threads that read ahead. They call the dataset at the same time as the loop runs: a precision whose `init_module`
  /// and forward change LibTorch's default dtype changes it for them too, so a dataset names the dtype of what it
  /// makes.
  std::size_t workers = 0;
  /// On a CUDA device, copy each batch by way of pinned memory and a stream of its own while the loop has the one
  /// before. Elsewhere it changes nothing.
  bool prefetch = true;
};

/// Batches of this rank's rows, on its device. Each `begin()` starts the next epoch, with an order of its own if
/// shuffled: `for (auto& batch : loader)`.
template <class Dataset>
class DataLoader {
 public:
  using Batch = typename Dataset::BatchType;

  /// Throws fabric::Error for a dataset without a size or a batch size of zero.
  DataLoader(Dataset dataset, const Shares& shares, const LoaderOptions& options, at::Device device)
      : options_(options),
        copies_(std::make_shared<detail::DeviceCopies>(device, options.prefetch)),
        dataset_(std::move(dataset)),
        sampler_(rows_of(dataset_), shares) {
    if (options.batch_size == 0) throw Error("fabric: setup_dataloader: batch_size is 0; one or more is legal");
  }

  DataLoader(DataLoader&&) noexcept = default;
  DataLoader& operator=(DataLoader&&) noexcept = default;
  DataLoader(const DataLoader&) = delete;
  DataLoader& operator=(const DataLoader&) = delete;
  ~DataLoader() = default;

  /// How far the loop has come: batches that it got in the epoch.
  struct Given {
    std::uint64_t epoch = 0;
    std::size_t batches = 0;
  };

  using Iterator = BatchIterator<Batch>;

  /// Begins the next epoch, or the one that `set_epoch` named, with threads of its own: a loop that was left early
  /// leaves nothing behind, and one inside another is an epoch of its own. After `load_state_dict`, it goes on with the
  /// epoch in which the state was saved.
  Iterator begin() {
    const auto given = std::make_shared<Given>(next_);
    std::erase_if(loops_, [](const auto& loop) { return loop.expired(); });
    loops_.push_back(given);
    sampler_.set_epoch(next_.epoch, next_.batches * options_.batch_size);
    next_ = {next_.epoch + 1, 0};
    std::shared_ptr loader = torch::data::make_data_loader(
        dataset_, sampler_,
        torch::data::DataLoaderOptions(options_.batch_size).workers(options_.workers).drop_last(options_.drop_last));
    const auto gave = [given](bool more) {
      *given = more ? Given{given->epoch, given->batches + 1} : Given{given->epoch + 1, 0};
    };
    auto read = [loader, next = detail::batches_of<Batch>(*loader)]() mutable { return next(); };
    return Iterator(
        std::make_shared<detail::Batches<Batch>>(std::move(read), gave, copies_, /*ahead=*/copies_->beside()));
  }
  /// The end of the epoch that `begin` began.
  Iterator end() { return {}; }

  /// Batches per epoch on this rank.
  [[nodiscard]] std::size_t size() const {
    const std::size_t rows = sampler_.size();
    return options_.drop_last ? rows / options_.batch_size : (rows + options_.batch_size - 1) / options_.batch_size;
  }
  [[nodiscard]] const LoaderOptions& options() const { return options_; }
  [[nodiscard]] const DistributedSampler& sampler() const { return sampler_; }
  /// Rows per epoch on this rank.
  [[nodiscard]] std::size_t rows() const { return sampler_.size(); }

  /// The next `begin()` begins that epoch.
  void set_epoch(std::uint64_t epoch) {
    next_ = {epoch, 0};
    loops_.clear();
  }
  /// The epoch that the loop is in, or that the next one will be.
  [[nodiscard]] std::uint64_t epoch() const { return place().epoch; }

  /// Where the loop is: the epoch, and the batches of it that the loop has got, the present one included. So save after
  /// the step that a batch was for. All ranks are at the same place.
  [[nodiscard]] Value state_dict() const;
  /// The next `begin()` goes on from there. Throws fabric::Error when rows would come in another order than in the job
  /// that saved it: another dataset size, batch size, seed, shuffling, padding or number of ranks.
  void load_state_dict(const Value& state);

 private:
  /// That of the innermost loop. One that was left early is over: nobody holds its iterator any more.
  [[nodiscard]] Given place() const {
    for (auto loop = loops_.rbegin(); loop != loops_.rend(); ++loop) {
      if (const auto given = loop->lock()) return *given;
    }
    return next_;
  }

  static std::size_t rows_of(const Dataset& dataset) {
    const auto rows = dataset.size();
    if (!rows)
      throw Error("fabric: setup_dataloader needs a dataset that knows its size, to deal its rows to the ranks");
    return *rows;
  }

  LoaderOptions options_;
  std::shared_ptr<detail::DeviceCopies> copies_;
  Given next_;
  std::vector<std::weak_ptr<const Given>> loops_;  // that run, each inside the one before
  Dataset dataset_;
  DistributedSampler sampler_;
};

}  // namespace fabric
