// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <torch/data/dataloader.h>
#include <torch/data/datasets/base.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/data/data_loader.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// A data set that is asked for a number of rows instead of for certain ones: LibTorch's `StreamDataset`, whose epoch
/// has `size()` rows or no end, and `StatefulDataset`, which tells the end itself; also those made from them by `map`
/// or `make_shared_dataset`.
template <class Dataset>
concept StreamsRows = (Dataset::is_stateful ||
                       !std::is_convertible_v<std::vector<std::size_t>, typename Dataset::BatchRequestType>);

namespace detail {

/// The data set that reads, below transforms and sharing: the one whose members `StreamLoader` looks for.
template <class Dataset>
auto& source_of(Dataset& dataset) {
  if constexpr (requires {
                  typename Dataset::TransformType;
                  dataset.dataset();
                }) {
    // MapDataset shows a const reference only, to a member that is not const.
    return source_of(const_cast<typename Dataset::DatasetType&>(dataset.dataset()));  // NOLINT(*-const-cast)
  } else if constexpr (requires { *dataset; }) {
    return source_of(*dataset);
  } else {
    return dataset;
  }
}

/// A data set as its loader and the thread that reads it share it.
template <class Dataset>
struct Stream {
  using Source = std::remove_reference_t<decltype(source_of(std::declval<Dataset&>()))>;
  static constexpr bool saves = requires(Source & source) { source.load_state_dict(source.state_dict()); };
  static constexpr bool resets = requires(Source & source) { source.reset(); };
  static constexpr bool shards = requires(Source & source) { source.shard(std::size_t(), std::size_t()); };

  static auto state_of(const Source& source) {
    if constexpr (saves) {
      return source.state_dict();
    } else {
      return std::monostate();
    }
  }
  using State = decltype(state_of(std::declval<const Source&>()));

  template <class T>
  static T unwrapped(const std::optional<T>& batch);
  template <class T>
  static T unwrapped(const T& batch);
  using Batch = decltype(unwrapped(std::declval<typename Dataset::BatchType>()));

  explicit Stream(Dataset data) : dataset(std::move(data)) {}
  Source& source() { return source_of(dataset); }

  /// The next batch of at most `rows` rows, nothing at the end.
  std::optional<Batch> read(std::size_t rows, bool drop_last) {
    if (std::exchange(over, true)) return std::nullopt;  // and so it stays if the data set throws
    std::optional<Batch> batch;
    if constexpr (Dataset::is_stateful) {
      batch = dataset.get_batch(rows);
    } else {
      const auto size = dataset.size();
      const std::size_t left = size ? *size - std::min(*size, rows_read) : rows;
      if (left == 0 || (left < rows && drop_last)) return std::nullopt;
      batch = dataset.get_batch(std::min(rows, left));
      rows_read += rows;
    }
    if (!batch) return batch;
    over = false;
    const std::lock_guard lock(mutex);
    states.push_back(state_of(source()));
    return batch;
  }
  /// How the data set was after the first batch that was read and not yet taken off here.
  State pop_state() {
    const std::lock_guard lock(mutex);
    State state = std::move(states.front());
    states.pop_front();
    return state;
  }

  Dataset dataset;
  bool touched = false;  ///< Has an epoch begun?
  bool over = false;
  std::size_t rows_read = 0;  ///< In the epoch.
  std::mutex mutex;           ///< Of the states.
  std::deque<State> states;
};

/// What LibTorch's loader takes for the data set.
template <class Dataset>
class StreamReader
    : public torch::data::datasets::BatchDataset<StreamReader<Dataset>, std::optional<typename Stream<Dataset>::Batch>,
                                                 std::size_t> {
 public:
  StreamReader(std::shared_ptr<Stream<Dataset>> stream, bool drop_last)
      : stream_(std::move(stream)), drop_last_(drop_last) {}
  std::optional<typename Stream<Dataset>::Batch> get_batch(std::size_t rows) override {
    return stream_->read(rows, drop_last_);
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return stream_->dataset.size(); }
  void reset() {}

 private:
  std::shared_ptr<Stream<Dataset>> stream_;
  bool drop_last_;
};

}  // namespace detail

/// Batches of a data set that streams its rows (see `StreamsRows`), on this rank's device. Its order is its own; each
/// rank reads its own part. Of the data set (below `map`) these members are used where they are there:
/// - `void shard(std::size_t rank, std::size_t replicas)`, called once before all else: read only that part, of which
///   `size()` then tells the rows. Needed where there are several ranks.
/// - `void reset()` and, before it, `void set_epoch(std::uint64_t)` at the begin of an epoch. Without `reset()` each
///   epoch goes on behind what was read for the one before.
/// - `Value state_dict() const` and `void load_state_dict(const Value&)`: its place inside an epoch. It is asked after
///   each batch. Without them, going on in the middle of an epoch reads its first batches once more and drops them.
///
/// An epoch ends on all ranks together, as soon as one of them has no more batches; what the others had read for that
/// step is left out. Ranks tell each other so with an all_reduce of one number per batch, for which the host waits;
/// only a stream without `size()` has no end, and so no such cost.
template <class Dataset>
class StreamLoader {
  using Stream = detail::Stream<Dataset>;
  using Loader = torch::data::StatefulDataLoader<detail::StreamReader<Dataset>>;

 public:
  using Batch = typename Stream::Batch;
  using Iterator = BatchIterator<Batch>;

  /// Throws fabric::Error for options that such a data set cannot follow, and for several ranks without `shard`.
  StreamLoader(Dataset dataset, const World& world, const LoaderOptions& options, at::Device device)
      : options_(options),
        world_(world),
        copies_(std::make_shared<detail::DeviceCopies>(device, options.prefetch)),
        stream_(std::make_shared<Stream>(std::move(dataset))) {
    std::string wrong;
    if (options.batch_size == 0) wrong += "; batch_size is 0: one or more is legal";
    if (options.shuffle) wrong += "; shuffle: a data set that streams its rows must shuffle them itself";
    if (options.workers > 1) {
      wrong += "; workers is " + std::to_string(options.workers) +
               ": 0 and 1 are legal, since several threads would read a stream in an order left to chance";
    }
    if (options.drop_last && Dataset::is_stateful)
      wrong += "; drop_last: a stateful data set says itself which batch is its last";
    if (world.size > 1 && !Stream::shards) {
      wrong += "; the data set has no void shard(std::size_t rank, std::size_t replicas), so that all " +
               std::to_string(world.size) + " ranks would read the same rows: give it that member";
    }
    if (!wrong.empty()) throw Error("fabric: setup_dataloader: " + wrong.substr(2));
    if constexpr (Stream::shards) {
      stream_->source().shard(static_cast<std::size_t>(world.global_rank), static_cast<std::size_t>(world.size));
    }
  }

  StreamLoader(StreamLoader&&) noexcept = default;
  StreamLoader& operator=(StreamLoader&&) noexcept = default;
  StreamLoader(const StreamLoader&) = delete;  // a stream is in one place only
  StreamLoader& operator=(const StreamLoader&) = delete;
  ~StreamLoader() = default;

  /// Begins the next epoch, or the one that `set_epoch` named. After `load_state_dict`, it goes on with the epoch in
  /// which the state was saved; throws fabric::Error if the data set cannot go back there. A stream is in one place
  /// only: a loop that was not over then cannot go on, and says so.
  Iterator begin() {
    loader_.reset();  // so that its thread reads no more
    given_ = std::make_shared<Given>(std::exchange(next_, {next_.epoch + 1, 0, {}}));
    rewind(*given_);
    loader_ =
        torch::data::make_data_loader(detail::StreamReader<Dataset>(stream_, options_.drop_last),
                                      torch::data::DataLoaderOptions(options_.batch_size).workers(options_.workers));
    // Owned here alone, for as long as no other loop begins.
    const auto require_current = [current = std::weak_ptr(loader_)] {
      if (!current.expired()) return;
      throw Error(
          "fabric: setup_dataloader: another loop over this stream has begun inside this one, which cannot go on: end "
          "one before the next, or set up a second loader");
    };
    const auto gave = [given = given_, stream = stream_, require_current](bool more) {
      require_current();  // for what was read ahead
      *given = more ? Given{given->epoch, given->batches + 1, stream->pop_state()} : Given{given->epoch + 1, 0, {}};
    };
    auto read = [world = world_, require_current, ends = ends(), next = detail::batches_of<Batch>(*loader_)]() mutable {
      require_current();
      return ends ? together(world, next) : next();
    };
    return Iterator(
        std::make_shared<detail::Batches<Batch>>(std::move(read), gave, copies_, /*ahead=*/copies_->beside()));
  }
  /// The end of the epoch that `begin` began.
  Iterator end() { return {}; }

  [[nodiscard]] const LoaderOptions& options() const { return options_; }
  [[nodiscard]] const World& world() const { return world_; }

  /// The next `begin()` begins that epoch.
  void set_epoch(std::uint64_t epoch) {
    next_ = {epoch, 0, {}};
    given_.reset();
  }
  /// The epoch that the loop is in, or that the next one will be.
  [[nodiscard]] std::uint64_t epoch() const { return place().epoch; }

  /// Where the loop is: the epoch, the batches of it that the loop has got, and how the data set was after the last of
  /// them, if it tells. Save after the step that a batch was for; with several ranks and a data set that tells, save
  /// `PerRank(loader)`, since each rank's data set is somewhere else.
  [[nodiscard]] Value state_dict() const;
  /// The next `begin()` goes on from there. Throws fabric::Error for another batch size, `drop_last`, number of ranks
  /// or rank's data set.
  void load_state_dict(const Value& state);

 private:
  struct Given {
    std::uint64_t epoch = 0;
    std::size_t batches = 0;
    std::optional<typename Stream::State> after{};  ///< The data set's state after these batches.
  };

  /// A loop that was left early is over: nobody holds its iterator any more.
  [[nodiscard]] Given place() const { return given_.use_count() > 1 ? *given_ : next_; }

  [[nodiscard]] bool ends() const { return Dataset::is_stateful || stream_->dataset.size().has_value(); }

  /// Brings the data set to `place`.
  void rewind(const Given& place) {
    auto& source = stream_->source();
    stream_->over = false;
    stream_->states.clear();
    stream_->rows_read = place.after ? place.batches * options_.batch_size : 0;
    if constexpr (requires { source.set_epoch(place.epoch); }) source.set_epoch(place.epoch);
    if constexpr (Stream::resets) source.reset();
    if constexpr (Stream::saves) {
      if (place.after) {
        source.load_state_dict(*place.after);
        stream_->touched = true;
        return;
      }
    }
    if (place.batches > 0 && !Stream::resets && (stream_->touched || place.epoch > 0)) {
      throw Error("fabric: a data loader cannot go on at batch " + std::to_string(place.batches) + " of epoch " +
                  std::to_string(place.epoch) +
                  ": the data set has no reset(), nor state_dict() and load_state_dict(), to get there");
    }
    stream_->touched = true;
    for (std::size_t skipped = 0; skipped < place.batches; ++skipped) {
      if (stream_->read(options_.batch_size, options_.drop_last)) (void)stream_->pop_state();
    }
  }

  /// The next batch if all ranks have one.
  template <class Next>
  static std::optional<Batch> together(const World& world, Next& next) {
    if (!world.group) return next();
    std::optional<Batch> batch;
    std::exception_ptr failure;
    try {
      batch = next();
    } catch (...) {
      failure = std::current_exception();
    }
    const int least = all_reduce(world, failure ? -1 : (batch ? 1 : 0), ReduceOp::min);
    if (failure) std::rethrow_exception(failure);
    if (least < 0) throw Error("fabric: another rank's data set failed, so that this epoch cannot go on");
    if (least == 0) batch.reset();
    return batch;
  }

  LoaderOptions options_;
  World world_;
  std::shared_ptr<detail::DeviceCopies> copies_;
  Given next_;
  std::shared_ptr<Given> given_;  // of the loop that runs, or ran last
  std::shared_ptr<Stream> stream_;
  std::shared_ptr<Loader> loader_;
};

/// What `setup_dataloader` makes of a data set.
template <class Dataset>
struct LoaderFor {
  using type = DataLoader<Dataset>;
};
template <StreamsRows Dataset>
struct LoaderFor<Dataset> {
  using type = StreamLoader<Dataset>;
};

}  // namespace fabric
