// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <utility>

#include "fabric/data/device_copies.hpp"

namespace fabric {

namespace detail {

/// The batches of one epoch, on their way from a LibTorch loader to the loop.
template <class Batch>
class Batches {
 public:
  using Read = std::function<std::optional<Batch>()>;
  using Gave = std::function<void(bool)>;

  /// `read` gives the next batch, nothing at the end. `gave` is told of each batch that the loop gets (true) and of the
  /// end (false). With `ahead`, each batch is read and its copy begun while the loop has the one before.
  Batches(Read read, Gave gave, std::shared_ptr<DeviceCopies> copies, bool ahead)
      : read_(std::move(read)), gave_(std::move(gave)), copies_(std::move(copies)), ahead_(ahead) {}

  /// The next batch, on the device; nothing at the end. What `read` throws comes where its batch would have come.
  std::optional<Batch> next() {
    if (!ahead_ || !began_) fetch();
    began_ = true;
    if (failure_) std::rethrow_exception(failure_);
    std::optional<Batch> batch = std::exchange(waiting_, std::nullopt);
    if (batch) copies_->finish(*batch);
    gave_(batch.has_value());
    if (ahead_ && batch) fetch();
    return batch;
  }

 private:
  void fetch() {
    try {
      waiting_ = read_();
      if (waiting_) waiting_ = copies_->start(std::move(*waiting_));
    } catch (...) {
      waiting_.reset();
      failure_ = std::current_exception();
    }
  }

  Read read_;
  Gave gave_;
  std::shared_ptr<DeviceCopies> copies_;
  bool ahead_;
  bool began_ = false;
  std::optional<Batch> waiting_;
  std::exception_ptr failure_;
};

/// What reads a LibTorch loader from the beginning, as long as that lives: a `Batches::Read`.
template <class Batch, class Loader>
auto batches_of(Loader& loader) {
  return [at = loader.begin(), end = loader.end(), first = true]() mutable -> std::optional<Batch> {
    if (!std::exchange(first, false)) ++at;
    if (at == end) return std::nullopt;
    return std::move(*at);
  };
}

}  // namespace detail

/// Where a loop over a loader is. It has the batch, which the loop may change or move away.
template <class Batch>
class BatchIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = Batch;
  using difference_type = std::ptrdiff_t;
  using pointer = Batch*;
  using reference = Batch&;

  /// The end.
  BatchIterator() = default;
  /// At the first batch of `from`.
  explicit BatchIterator(std::shared_ptr<detail::Batches<Batch>> from) : from_(std::move(from)) { take(); }

  Batch& operator*() { return *batch_; }
  Batch* operator->() { return &*batch_; }
  BatchIterator& operator++() {
    take();
    return *this;
  }
  void operator++(int) { take(); }
  bool operator==(const BatchIterator& other) const { return from_ == other.from_; }

 private:
  void take() {
    batch_ = from_->next();
    if (!batch_) from_.reset();
  }

  std::shared_ptr<detail::Batches<Batch>> from_;
  std::optional<Batch> batch_;
};

}  // namespace fabric
