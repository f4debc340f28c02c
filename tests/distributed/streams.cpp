// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint
//
// How ranks share a data set that streams its rows.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using Rows = std::vector<std::int64_t>;

/// Rows 0, 1, 2, ... as a tensor. Only the one that shards is a legal data set of several ranks.
class Everywhere : public torch::data::datasets::StatefulDataset<Everywhere, at::Tensor> {
 public:
  explicit Everywhere(std::int64_t rows, std::int64_t fails_at = -1) : rows_(rows), fails_at_(fails_at) {}
  std::optional<at::Tensor> get_batch(std::size_t rows) override {
    Rows batch;
    for (; batch.size() < rows && next_ < rows_; next_ += step_) {
      if (next_ == fails_at_) throw std::runtime_error("row " + std::to_string(next_) + " cannot be read");
      batch.push_back(next_);
    }
    if (batch.empty()) return std::nullopt;
    return torch::tensor(batch);
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return std::nullopt; }
  void reset() override { next_ = first_; }
  void save(torch::serialize::OutputArchive& /*archive*/) const override {}
  void load(torch::serialize::InputArchive& /*archive*/) override {}

 protected:
  std::int64_t first_ = 0;
  std::int64_t step_ = 1;
  std::int64_t next_ = 0;

 private:
  std::int64_t rows_;
  std::int64_t fails_at_;
};

class Sharded : public Everywhere {
 public:
  using SelfType = Sharded;
  using Everywhere::Everywhere;
  void shard(std::size_t rank, std::size_t replicas) {
    first_ = static_cast<std::int64_t>(rank);
    step_ = static_cast<std::int64_t>(replicas);
  }
  [[nodiscard]] Value state_dict() const { return Dict{{"next", next_}}; }
  void load_state_dict(const Value& state) { next_ = state.as<Dict>("the state").at("next").as<std::int64_t>("next"); }
};

template <class Loader>
std::vector<Rows> epoch_of(Loader& loader) {
  std::vector<Rows> batches;
  for (at::Tensor& batch : loader)
    batches.emplace_back(batch.data_ptr<std::int64_t>(), batch.data_ptr<std::int64_t>() + batch.numel());
  return batches;
}

}  // namespace

TEST_CASE("[issue-7.6] each rank reads its part, and all stop with the first that ends") {
  on_ranks<F32>([](auto& fabric) {
    for (const std::size_t workers : {0U, 1U}) {
      auto even = fabric.setup_dataloader(Sharded(8), {.batch_size = 2, .workers = workers});
      const std::int64_t r = fabric.global_rank();
      const std::vector<Rows> all{{r, r + 2}, {r + 4, r + 6}};
      REQUIRE(epoch_of(even) == all);
      REQUIRE(epoch_of(even) == all);
      // Rank 0 has a fifth row, rank 1 has none that goes with it.
      auto uneven = fabric.setup_dataloader(Sharded(9), {.batch_size = 2, .workers = workers});
      REQUIRE(epoch_of(uneven) == all);
      REQUIRE(uneven.epoch() == 1);
      REQUIRE(epoch_of(uneven) == all);
    }
  });
}

TEST_CASE("[issue-7.6] a stream that cannot be shared is refused on several ranks") {
  on_ranks<F32>([](auto& fabric) {
    REQUIRE_THROWS_WITH(fabric.setup_dataloader(Everywhere(8), {.batch_size = 2}),
                        ContainsSubstring("shard(std::size_t rank, std::size_t replicas)") &&
                            ContainsSubstring("all 2 ranks would read the same rows"));
  });
}

TEST_CASE("[issue-7.6] a data set that fails on one rank ends the epoch on all with an error") {
  on_ranks<F32>([](auto& fabric) {
    auto loader = fabric.setup_dataloader(Sharded(8, /*fails_at=*/5), {.batch_size = 2});  // rank 1's third row
    REQUIRE_THROWS_WITH(epoch_of(loader), ContainsSubstring(fabric.global_rank() == 1 ? "row 5 cannot be read"
                                                                                      : "another rank's data set"));
  });
}

TEST_CASE("[issue-7.6] each rank goes on at its own place, saved per rank") {
  on_ranks<F32>([](auto& fabric) {
    const std::string path = "streams.pt";
    auto loader = fabric.setup_dataloader(Sharded(12), {.batch_size = 2});
    for ([[maybe_unused]] at::Tensor& batch : loader) {
      fabric.save(path, State{{"loader", PerRank(loader)}});
      break;
    }
    auto other = fabric.setup_dataloader(Sharded(12), {.batch_size = 2});
    fabric.load(path, State{{"loader", PerRank(other)}});
    const std::int64_t r = fabric.global_rank();
    REQUIRE(epoch_of(other) == std::vector<Rows>{{r + 4, r + 6}, {r + 8, r + 10}});

    for ([[maybe_unused]] at::Tensor& batch : loader) {
      fabric.save(path, State{{"loader", loader}});  // rank 0's only
      break;
    }
    REQUIRE_THROWS_WITH(fabric.load(path, State{{"loader", other}}), ContainsSubstring("PerRank(loader)"));
    fabric.barrier();
    if (fabric.is_global_zero()) REQUIRE(std::remove(path.c_str()) == 0);
  });
}
