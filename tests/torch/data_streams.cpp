// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint torch
// also: cuda
//
// Data sets that stream their rows, and batches that come to the device one ahead.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
namespace datasets = torch::data::datasets;
using OnCpu = Fabric<Cpu, SingleDevice, F32>;
using Rows = std::vector<std::int64_t>;
using Examples = std::vector<torch::data::Example<>>;

torch::data::Example<> example(std::int64_t row) { return {torch::zeros({1}), torch::tensor(row)}; }

/// Counts up to `rows`, from 1000 times the epoch on; the row that is to fail throws.
class Counting : public datasets::StatefulDataset<Counting> {
 public:
  explicit Counting(std::int64_t rows, std::int64_t fails_at = -1) : rows_(rows), fails_at_(fails_at) {}

  std::optional<Examples> get_batch(std::size_t rows) override {
    Examples batch;
    for (; batch.size() < rows && next_ < rows_; ++next_, ++reads_) {
      if (next_ == fails_at_) throw std::runtime_error("row " + std::to_string(next_) + " cannot be read");
      batch.push_back(example(1000 * epoch_ + next_));
    }
    if (batch.empty()) return std::nullopt;
    return batch;
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return std::nullopt; }
  void reset() override { next_ = 0; }
  void set_epoch(std::uint64_t epoch) { epoch_ = static_cast<std::int64_t>(epoch); }
  void save(torch::serialize::OutputArchive& /*archive*/) const override {}
  void load(torch::serialize::InputArchive& /*archive*/) override {}

  [[nodiscard]] int reads() const { return reads_; }

 protected:
  std::int64_t next_ = 0;

 private:
  std::int64_t rows_;
  std::int64_t fails_at_;
  std::int64_t epoch_ = 0;
  int reads_ = 0;
};

/// The same, telling its place.
class Placed : public Counting {
 public:
  using SelfType = Placed;
  using Counting::Counting;
  [[nodiscard]] Value state_dict() const { return Dict{{"next", next_}}; }
  void load_state_dict(const Value& state) { next_ = state.as<Dict>("the state").at("next").as<std::int64_t>("next"); }
};

/// Counts on from where it is, with `size` rows in an epoch.
class Stream : public datasets::StreamDataset<Stream> {
 public:
  explicit Stream(std::optional<std::size_t> size) : size_(size) {}
  Examples get_batch(std::size_t rows) override {
    Examples batch;
    while (batch.size() < rows) batch.push_back(example(next_++));
    return batch;
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return size_; }

 private:
  std::optional<std::size_t> size_;
  std::int64_t next_ = 0;
};

template <class Dataset>
auto stacked(Dataset dataset) {
  return datasets::map(std::move(dataset), torch::data::transforms::Stack<>());
}

Rows rows_of(const at::Tensor& targets) {
  return {targets.const_data_ptr<std::int64_t>(), targets.const_data_ptr<std::int64_t>() + targets.numel()};
}

/// The rows of one epoch, at most `most` batches.
template <class Loader>
std::vector<Rows> epoch_of(Loader& loader, std::size_t most = 100) {
  std::vector<Rows> batches;
  for (auto& batch : loader) {
    batches.push_back(rows_of(batch.target));
    if (batches.size() == most) break;
  }
  return batches;
}

/// The next `number` batches over the ends of epochs; the state after each.
template <class Loader>
std::vector<Rows> take(Loader& loader, std::size_t number, std::vector<Value>* states = nullptr) {
  std::vector<Rows> taken;
  while (taken.size() < number) {
    for (auto& batch : loader) {
      taken.push_back(rows_of(batch.target));
      if (states != nullptr) states->push_back(loader.state_dict());
      if (taken.size() == number) break;
    }
  }
  return taken;
}

}  // namespace

TEST_CASE("[issue-7.6] a stateful data set says what a batch is and where an epoch ends") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 1U}) {
    auto loader = fabric.setup_dataloader(stacked(Counting(5)), {.batch_size = 2, .workers = workers});
    CHECK(epoch_of(loader) == std::vector<Rows>{{0, 1}, {2, 3}, {4}});
    CHECK(epoch_of(loader, 1) == std::vector<Rows>{{1000, 1001}});  // left early
    CHECK(epoch_of(loader) == std::vector<Rows>{{2000, 2001}, {2002, 2003}, {2004}});
    loader.set_epoch(7);
    CHECK(loader.epoch() == 7);
    CHECK(epoch_of(loader, 1) == std::vector<Rows>{{7000, 7001}});
    auto none = fabric.setup_dataloader(stacked(Counting(0)), {.batch_size = 2, .workers = workers});
    CHECK(epoch_of(none).empty());
  }
}

TEST_CASE("[issue-7.6] an epoch of a stream has as many rows as it says, and no end if it does not say") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 1U}) {
    auto loader = fabric.setup_dataloader(stacked(Stream(5)), {.batch_size = 2, .workers = workers});
    CHECK(epoch_of(loader) == std::vector<Rows>{{0, 1}, {2, 3}, {4}});
    CHECK(epoch_of(loader) == std::vector<Rows>{{5, 6}, {7, 8}, {9}});
    auto full = fabric.setup_dataloader(stacked(Stream(5)), {.batch_size = 2, .drop_last = true, .workers = workers});
    CHECK(epoch_of(full) == std::vector<Rows>{{0, 1}, {2, 3}});
    auto endless = fabric.setup_dataloader(stacked(Stream(std::nullopt)), {.batch_size = 2, .workers = workers});
    CHECK(epoch_of(endless, 50).back() == Rows{98, 99});
  }
}

TEST_CASE("[issue-7.6] a data set may be shared and need no transform") {
  OnCpu fabric;
  const auto shared = datasets::make_shared_dataset<Counting>(3);
  auto loader = fabric.setup_dataloader(shared, {.batch_size = 2});
  Rows rows;
  for (Examples& batch : loader) {
    for (const auto& one : batch) rows.push_back(one.target.item<std::int64_t>());
  }
  CHECK(rows == Rows{0, 1, 2});
}

TEST_CASE("[issue-7.6] from each batch of two epochs a new loader of a stream goes on with the next one") {
  OnCpu fabric;
  const auto check = [&](const auto& make) {
    for (const std::size_t workers : {0U, 1U}) {
      const LoaderOptions options{.batch_size = 4, .workers = workers};
      auto loader = fabric.setup_dataloader(make(), options);
      std::vector<Value> states;
      const auto whole = take(loader, 12, &states);
      for (std::size_t done = 1; done <= 8; ++done) {
        auto other = fabric.setup_dataloader(make(), options);
        other.load_state_dict(states[done - 1]);
        const auto rest = take(other, 12 - done);
        CHECK(rest == std::vector<Rows>(whole.begin() + static_cast<std::ptrdiff_t>(done), whole.end()));
      }
    }
  };
  check([] { return stacked(Counting(18)); });
  check([] { return stacked(datasets::make_shared_dataset<Placed>(18)); });
}

TEST_CASE("[issue-7.6] a data set that tells its place reads no row twice, one that does not reads and drops them") {
  OnCpu fabric;
  const auto reads_after_resume = [&](auto shared) {
    auto loader = fabric.setup_dataloader(stacked(shared), {.batch_size = 4});
    std::vector<Value> states;
    take(loader, 3, &states);
    const int before = shared->reads();
    loader.load_state_dict(states[2]);
    CHECK(take(loader, 1) == std::vector<Rows>{{12, 13, 14, 15}});
    return shared->reads() - before;
  };
  CHECK(reads_after_resume(datasets::make_shared_dataset<Placed>(20)) == 4);
  CHECK(reads_after_resume(datasets::make_shared_dataset<Counting>(20)) == 16);
}

TEST_CASE("[issue-7.6] the place in a stream goes through a checkpoint") {
  OnCpu fabric;
  const std::string path = "data_streams.pt";
  const LoaderOptions options{.batch_size = 4, .workers = 1};
  auto loader = fabric.setup_dataloader(stacked(datasets::make_shared_dataset<Placed>(18)), options);
  for (auto& batch : loader) {
    if (rows_of(batch.target).front() < 8) continue;
    fabric.save(path, State{{"loader", loader}});
    break;
  }
  auto other = fabric.setup_dataloader(stacked(datasets::make_shared_dataset<Placed>(18)), options);
  fabric.load(path, State{{"loader", other}});
  CHECK(take(other, 3) == std::vector<Rows>{{12, 13, 14, 15}, {16, 17}, {1000, 1001, 1002, 1003}});
  CHECK(std::remove(path.c_str()) == 0);
}

TEST_CASE("[issue-7.6] a place in a stream that cannot be reached again is refused") {
  OnCpu fabric;
  auto loader = fabric.setup_dataloader(stacked(Stream(20)), {.batch_size = 4});
  std::vector<Value> states;
  take(loader, 7, &states);
  auto other = fabric.setup_dataloader(stacked(Stream(20)), {.batch_size = 4});
  other.load_state_dict(states[2]);  // of the first epoch: it is enough to read on
  CHECK(take(other, 1) == std::vector<Rows>{{12, 13, 14, 15}});
  other.load_state_dict(states[6]);
  CHECK_THROWS_WITH(other.begin(), ContainsSubstring("batch 2 of epoch 1") && ContainsSubstring("no reset()"));
  auto smaller = fabric.setup_dataloader(stacked(Stream(20)), {.batch_size = 3, .drop_last = true});
  CHECK_THROWS_WITH(smaller.load_state_dict(states[0]),
                    ContainsSubstring("batch_size was 4 and is 3") && ContainsSubstring("drop_last was 0 and is 1"));
}

TEST_CASE("[issue-7.6] what a stream cannot do is refused, all of it at once") {
  OnCpu fabric;
  CHECK_THROWS_WITH(fabric.setup_dataloader(stacked(Counting(5)),
                                            {.batch_size = 0, .shuffle = true, .drop_last = true, .workers = 2}),
                    ContainsSubstring("batch_size is 0") && ContainsSubstring("shuffle") &&
                        ContainsSubstring("drop_last") && ContainsSubstring("workers is 2"));
}

TEST_CASE("[issue-7.6] a loop over a stream that another one interrupts cannot go on, and says so") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 1U}) {
    auto loader = fabric.setup_dataloader(stacked(Counting(12)), {.batch_size = 4, .workers = workers});
    std::vector<Rows> inner;
    const auto nested = [&] {
      for ([[maybe_unused]] auto& batch : loader) inner = epoch_of(loader);
    };
    CHECK_THROWS_WITH(nested(), ContainsSubstring("another loop over this stream has begun inside this one"));
    CHECK(inner == std::vector<Rows>{{1000, 1001, 1002, 1003}, {1004, 1005, 1006, 1007}, {1008, 1009, 1010, 1011}});
  }
}

TEST_CASE("[issue-7.6] what a stream's data set throws reaches the loop with its text, after the batches before") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 1U}) {
    auto loader = fabric.setup_dataloader(stacked(Counting(12, /*fails_at=*/9)), {.batch_size = 4, .workers = workers});
    std::size_t batches = 0;
    const auto loop = [&] {
      for ([[maybe_unused]] auto& batch : loader) ++batches;
    };
    CHECK_THROWS_WITH(loop(), ContainsSubstring("row 9 cannot be read"));
    CHECK(batches == 2);
  }
}

TEST_CASE("[issue-7.6] prefetching reads one batch ahead, in order, and an error waits for its turn") {
  const auto copies = std::make_shared<fabric::detail::DeviceCopies>(at::kCPU, /*prefetch=*/true);
  CHECK_FALSE(copies->beside());  // nothing to gain on a CPU
  for (const bool fails : {false, true}) {
    std::vector<std::string> log;
    int number = 0;
    const auto read = [&]() -> std::optional<at::Tensor> {
      log.push_back("read " + std::to_string(number));
      if (number == 3 && fails) throw std::runtime_error("no more");
      if (number == 3) return std::nullopt;
      return torch::tensor(number++);
    };
    const auto gave = [&](bool more) { log.emplace_back(more ? "gave" : "end"); };
    fabric::detail::Batches<at::Tensor> batches(read, gave, copies, /*ahead=*/true);
    for (int i = 0; i < 3; ++i) {
      const auto batch = batches.next();
      REQUIRE(batch.has_value());
      CHECK(batch->item<int>() == i);
      log.emplace_back("step");
    }
    if (fails) {
      CHECK_THROWS_WITH(batches.next(), ContainsSubstring("no more"));
    } else {
      CHECK_FALSE(batches.next().has_value());
      log.pop_back();  // the end
    }
    CHECK(log == std::vector<std::string>{"read 0", "gave", "read 1", "step", "gave", "read 2", "step", "gave",
                                          "read 3", "step"});
  }
}

namespace {

/// What is asked of a device that does nothing.
std::vector<std::string> device_log;
std::int64_t current_stream = 0;

struct LoggedDevice final : c10::impl::DeviceGuardImplInterface {
  using Stream = c10::Stream;
  [[nodiscard]] at::DeviceType type() const override { return at::kMAIA; }
  [[nodiscard]] at::Device exchangeDevice(at::Device /*device*/) const override { return getDevice(); }
  [[nodiscard]] at::Device getDevice() const override { return {at::kMAIA, 0}; }
  void setDevice(at::Device /*device*/) const override {}
  void uncheckedSetDevice(at::Device /*device*/) const noexcept override {}
  [[nodiscard]] at::DeviceIndex deviceCount() const noexcept override { return 1; }
  [[nodiscard]] Stream getStream(at::Device device) const override {
    return Stream(Stream::UNSAFE, device, current_stream);
  }
  [[nodiscard]] Stream getStreamFromGlobalPool(at::Device device, bool /*high*/) const override {
    return Stream(Stream::UNSAFE, device, 7);
  }
  [[nodiscard]] Stream exchangeStream(Stream stream) const override {
    return Stream(Stream::UNSAFE, stream.device(), std::exchange(current_stream, stream.id()));
  }
  void record(void** /*event*/, const Stream& stream, at::DeviceIndex /*device*/,
              c10::EventFlag /*flag*/) const override {
    device_log.push_back("record on " + std::to_string(stream.id()));
  }
  void block(void* /*event*/, const Stream& stream) const override {
    device_log.push_back("wait on " + std::to_string(stream.id()));
  }
};
C10_REGISTER_GUARD_IMPL(MAIA, LoggedDevice)

}  // namespace

TEST_CASE("[issue-7.6] work on a side stream is marked there and waited for on the current stream") {
  fabric::detail::SideStream side(at::Device(at::kMAIA, 0));
  current_stream = 3;
  side.run([] { device_log.push_back("copy on " + std::to_string(current_stream)); });
  CHECK(current_stream == 3);
  side.mark();
  CHECK(side.join().id() == 3);
  CHECK(device_log == std::vector<std::string>{"copy on 7", "record on 7", "wait on 3"});
}

#ifdef USE_C10D_NCCL  // a build for GPUs
TEST_CASE("[issue-7.6] on a CUDA device each batch has its own values, however busy the streams are") {
  if (!torch::cuda::is_available()) return;
  const at::Device device(at::kCUDA, 0);
  const auto copies = std::make_shared<fabric::detail::DeviceCopies>(device, /*prefetch=*/true);
  REQUIRE(copies->beside());
  constexpr std::int64_t size = 1 << 20;
  int number = 0;
  const auto read = [&]() -> std::optional<at::Tensor> {
    return number == 100 ? std::nullopt : std::optional(torch::full({size}, number++, at::kLong));
  };
  fabric::detail::Batches<at::Tensor> batches(
      read, [](bool /*more*/) {}, copies, /*ahead=*/true);
  std::vector<at::Tensor> sums;
  const auto slow = torch::rand({2048, 2048}, device);
  while (const auto batch = batches.next()) {
    CHECK(batch->device() == device);
    (void)slow.mm(slow);  // so that the batch is read long after the loop has let go of it
    sums.push_back(batch->sum());
  }
  REQUIRE(sums.size() == 100);
  for (std::size_t i = 0; i < sums.size(); ++i)
    CHECK(sums[i].item<std::int64_t>() == size * static_cast<std::int64_t>(i));
}
#endif
