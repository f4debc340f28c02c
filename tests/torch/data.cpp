// SPDX-License-Identifier: Apache-2.0
//
// How rows are dealt to ranks. The literal orders are those of Python's torch.utils.data.DistributedSampler.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <set>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using Rows = std::vector<std::size_t>;

/// All rows that a sampler gives in an epoch, asked for in batches of 3.
Rows rows_of(DistributedSampler& sampler, std::uint64_t epoch = 0) {
  sampler.set_epoch(epoch);
  sampler.reset();
  Rows all;
  while (const auto batch = sampler.next(3)) all.insert(all.end(), batch->begin(), batch->end());
  return all;
}
Rows rows_of(std::size_t rows, const Shares& shares, std::uint64_t epoch = 0) {
  DistributedSampler sampler(rows, shares);
  Rows all = rows_of(sampler, epoch);
  CHECK(all.size() == sampler.size());
  return all;
}

/// Rows 0, 1, 2, ..., the target of each being its number.
class Counting : public torch::data::datasets::Dataset<Counting> {
 public:
  explicit Counting(std::size_t rows) : rows_(rows) {}
  torch::data::Example<> get(std::size_t row) override {
    return {torch::full({2}, static_cast<double>(row)), torch::tensor(static_cast<std::int64_t>(row))};
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return rows_; }

 private:
  std::size_t rows_;
};

auto stacked(std::size_t rows) { return Counting(rows).map(torch::data::transforms::Stack<>()); }

template <class Loader>
Rows targets(Loader& loader) {
  Rows all;
  for (auto& batch : loader) {
    for (std::int64_t i = 0; i < batch.target.size(0); ++i) {
      all.push_back(static_cast<std::size_t>(batch.target[i].template item<std::int64_t>()));
    }
  }
  return all;
}

}  // namespace

TEST_CASE("[issue-3.6] shuffled rows come in the order of Python's sampler") {
  const Shares first{.replicas = 2, .rank = 0, .shuffle = true, .seed = 0};
  const Shares second{.replicas = 2, .rank = 1, .shuffle = true, .seed = 0};
  CHECK(rows_of(10, first, 0) == Rows{4, 7, 3, 0, 6});
  CHECK(rows_of(10, second, 0) == Rows{1, 5, 9, 8, 2});
  CHECK(rows_of(10, first, 1) == Rows{5, 1, 0, 9, 7});
  CHECK(rows_of(10, second, 1) == Rows{6, 2, 8, 3, 4});
}

TEST_CASE("[issue-3.6] the order is a permutation by seed + epoch, dealt in turn") {
  for (const std::uint64_t seed : {0, 42}) {
    for (const std::uint64_t epoch : {0, 1, 7}) {
      const auto order = at::randperm(103, at::make_generator<at::CPUGeneratorImpl>(seed + epoch), at::kLong);
      for (std::size_t rank = 0; rank < 4; ++rank) {
        const Rows mine = rows_of(103, {.replicas = 4, .rank = rank, .shuffle = true, .seed = seed}, epoch);
        REQUIRE(mine.size() == 26);
        for (std::size_t i = 0; i < mine.size(); ++i) {
          REQUIRE(mine[i] == static_cast<std::size_t>(
                                 order[static_cast<std::int64_t>((rank + 4 * i) % 103)].item<std::int64_t>()));
        }
      }
    }
  }
}

TEST_CASE("[issue-3.6] the global generator neither matters nor changes") {
  const Shares shares{.shuffle = true, .seed = 5};
  torch::manual_seed(1);
  const Rows before = rows_of(20, shares);
  const auto next = torch::rand({1}).item<double>();
  torch::manual_seed(1);
  CHECK(torch::rand({1}).item<double>() == next);
  CHECK(rows_of(20, shares) == before);
}

TEST_CASE("[issue-3.6] padding repeats rows from the front until all ranks have equally many") {
  CHECK(rows_of(7, {.replicas = 2, .rank = 0}) == Rows{0, 2, 4, 6});
  CHECK(rows_of(7, {.replicas = 2, .rank = 1}) == Rows{1, 3, 5, 0});
  const std::vector<Rows> few{{0, 4}, {1, 0}, {2, 1}, {3, 2}};
  for (std::size_t rank = 0; rank < 4; ++rank) CHECK(rows_of(5, {.replicas = 4, .rank = rank}) == few[rank]);
  for (std::size_t rank = 0; rank < 8; ++rank) CHECK(rows_of(3, {.replicas = 8, .rank = rank}) == Rows{rank % 3});
}

TEST_CASE("[issue-3.6] without padding the ranks share all rows and none twice") {
  for (const std::size_t rows : {0, 1, 5, 8, 10}) {
    for (const bool shuffle : {false, true}) {
      Rows all;
      for (std::size_t rank = 0; rank < 4; ++rank) {
        const Rows mine = rows_of(rows, {.replicas = 4, .rank = rank, .shuffle = shuffle, .pad = false});
        CHECK(mine.size() == rows / 4 + (rank < rows % 4 ? 1 : 0));
        all.insert(all.end(), mine.begin(), mine.end());
      }
      std::sort(all.begin(), all.end());
      Rows expected(rows);
      std::iota(expected.begin(), expected.end(), 0U);
      CHECK(all == expected);
    }
  }
}

TEST_CASE("[issue-3.6] a sampler goes on where it was saved") {
  const Shares shares{.shuffle = true, .seed = 9};
  DistributedSampler sampler(10, shares);
  sampler.set_epoch(3);
  sampler.reset();
  (void)sampler.next(4);
  torch::serialize::OutputArchive written;
  sampler.save(written);
  std::stringstream bytes;
  written.save_to(bytes);

  DistributedSampler other(10, shares);
  torch::serialize::InputArchive read;
  read.load_from(bytes);
  other.load(read);
  CHECK(other.next(10) == sampler.next(10));
}

TEST_CASE("[issue-3.6] a loader deals batches, each epoch in an order of its own") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  auto loader = fabric.setup_dataloader(stacked(10), {.batch_size = 4, .shuffle = true, .seed = 0});
  CHECK(loader.size() == 3);
  CHECK(loader.rows() == 10);
  std::set<Rows> orders;
  for (const std::uint64_t epoch : {0, 1, 2}) {
    const Rows order = targets(loader);
    CHECK(order == rows_of(10, {.shuffle = true, .seed = 0}, epoch));
    orders.insert(order);
  }
  CHECK(orders.size() == 3);

  loader.set_epoch(0);
  CHECK(targets(loader) == *std::find(orders.begin(), orders.end(), rows_of(10, {.shuffle = true, .seed = 0}, 0)));
  CHECK(targets(loader) == rows_of(10, {.shuffle = true, .seed = 0}, 1));
}

TEST_CASE("[issue-3.6] a loop inside another is an epoch of its own, and leaves the outer one as it is") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  for (const std::size_t workers : {0U, 2U}) {
    auto loader =
        fabric.setup_dataloader(stacked(10), {.batch_size = 4, .shuffle = true, .seed = 0, .workers = workers});
    Rows outer;
    std::vector<Rows> inner;
    for (auto& batch : loader) {
      inner.push_back(targets(loader));
      CHECK(loader.epoch() == 0);  // again that of this loop
      for (std::int64_t i = 0; i < batch.target.size(0); ++i) {
        outer.push_back(static_cast<std::size_t>(batch.target[i].item<std::int64_t>()));
      }
    }
    const Shares shares{.shuffle = true, .seed = 0};
    CHECK(outer == rows_of(10, shares, 0));
    CHECK(inner == std::vector<Rows>{rows_of(10, shares, 1), rows_of(10, shares, 2), rows_of(10, shares, 3)});
  }
}

TEST_CASE("[issue-3.6] not shuffled means in order, in every epoch") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  auto loader = fabric.setup_dataloader(stacked(5), {.batch_size = 2});
  CHECK(targets(loader) == Rows{0, 1, 2, 3, 4});
  CHECK(targets(loader) == Rows{0, 1, 2, 3, 4});
}

TEST_CASE("[issue-3.6] the size of a loader is the number of batches that come") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  for (const std::size_t rows : {1, 7, 8, 9}) {
    for (const bool drop_last : {false, true}) {
      auto loader = fabric.setup_dataloader(stacked(rows), {.batch_size = 4, .drop_last = drop_last});
      std::size_t batches = 0;
      for (auto& batch : loader) {
        ++batches;
        CHECK(batch.data.sizes() == at::IntArrayRef{batch.target.size(0), 2});
        if (drop_last) CHECK(batch.target.size(0) == 4);
      }
      CHECK(batches == loader.size());
      CHECK(batches == (drop_last ? rows / 4 : (rows + 3) / 4));
    }
  }
}

TEST_CASE("[issue-3.6] reading ahead in threads gives the same batches in the same order") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  auto loader = fabric.setup_dataloader(stacked(50), {.batch_size = 4, .shuffle = true, .seed = 1, .workers = 2});
  CHECK(targets(loader) == rows_of(50, {.shuffle = true, .seed = 1}, 0));
  CHECK(targets(loader) == rows_of(50, {.shuffle = true, .seed = 1}, 1));
}

TEST_CASE("[issue-3.6] a dataset without a stack gives batches of examples") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  auto loader = fabric.setup_dataloader(Counting(5), {.batch_size = 2});
  Rows all;
  for (std::vector<torch::data::Example<>>& batch : loader) {
    for (const auto& example : batch) all.push_back(static_cast<std::size_t>(example.target.item<std::int64_t>()));
  }
  CHECK(all == Rows{0, 1, 2, 3, 4});
}
