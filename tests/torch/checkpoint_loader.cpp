// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint torch
//
// A data loader goes on where it was saved.
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using OnCpu = Fabric<Cpu, SingleDevice, F32>;
using Rows = std::vector<std::int64_t>;

/// Rows 0, 1, 2, ...; the one that is to fail throws.
class Counting : public torch::data::datasets::Dataset<Counting> {
 public:
  explicit Counting(std::size_t rows, std::size_t fails_at = 1000) : rows_(rows), fails_at_(fails_at) {}
  torch::data::Example<> get(std::size_t row) override {
    if (row == fails_at_) throw std::runtime_error("row " + std::to_string(row) + " cannot be read");
    return {torch::zeros({1}), torch::tensor(static_cast<std::int64_t>(row))};
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return rows_; }

 private:
  std::size_t rows_;
  std::size_t fails_at_;
};
auto stacked(std::size_t rows, std::size_t fails_at = 1000) {
  return Counting(rows, fails_at).map(torch::data::transforms::Stack<>());
}

/// The rows of the next `batches` batches, over the ends of epochs; the state after each.
template <class Loader>
std::vector<Rows> take(Loader& loader, std::size_t batches, std::vector<Value>* states = nullptr) {
  std::vector<Rows> taken;
  while (taken.size() < batches) {
    for (auto& batch : loader) {
      Rows rows;
      for (std::int64_t i = 0; i < batch.target.size(0); ++i)
        rows.push_back(batch.target[i].template item<std::int64_t>());
      taken.push_back(rows);
      if (states != nullptr) states->push_back(loader.state_dict());
      if (taken.size() == batches) break;
    }
  }
  return taken;
}

}  // namespace

TEST_CASE("[issue-7.4] from each batch of two epochs a new loader goes on with the next one") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 2U}) {
    for (const bool drop_last : {false, true}) {
      const LoaderOptions options{
          .batch_size = 4, .shuffle = true, .seed = 9, .drop_last = drop_last, .workers = workers};
      auto loader = fabric.setup_dataloader(stacked(18), options);
      std::vector<Value> states;
      const auto whole = take(loader, 12, &states);
      for (std::size_t done = 0; done <= 8; ++done) {
        auto other = fabric.setup_dataloader(stacked(18), options);
        if (done > 0) other.load_state_dict(states[done - 1]);
        const auto rest = take(other, 12 - done);
        CHECK(rest == std::vector<Rows>(whole.begin() + static_cast<std::ptrdiff_t>(done), whole.end()));
      }
    }
  }
}

TEST_CASE("[issue-7.4] a loop that was left early is over: the state is the beginning of the next epoch") {
  OnCpu fabric;
  auto loader = fabric.setup_dataloader(stacked(12), {.batch_size = 4, .shuffle = true});
  take(loader, 2);
  auto other = fabric.setup_dataloader(stacked(12), {.batch_size = 4, .shuffle = true});
  other.load_state_dict(loader.state_dict());
  CHECK(other.epoch() == 1);
  CHECK(take(other, 3) == take(loader, 3));
}

TEST_CASE("[issue-7.3] rows in another order are refused, all differences at once, and nothing changes") {
  OnCpu fabric;
  auto loader = fabric.setup_dataloader(stacked(12), {.batch_size = 4, .shuffle = true, .seed = 1});
  const Value state = loader.state_dict();
  auto other = fabric.setup_dataloader(stacked(13), {.batch_size = 3, .seed = 2});
  other.set_epoch(5);
  CHECK_THROWS_WITH(other.load_state_dict(state),
                    ContainsSubstring("rows was 12 and is 13") && ContainsSubstring("batch_size was 4 and is 3") &&
                        ContainsSubstring("shuffle was 1 and is 0") && ContainsSubstring("seed was 1 and is 2"));
  CHECK(other.epoch() == 5);
  Value beyond = state;
  std::get<Dict>(beyond.data())["batches"] = 4;
  CHECK_THROWS_WITH(loader.load_state_dict(beyond), ContainsSubstring("3 batches cannot go on at batch 4"));
  CHECK_THROWS_AS(loader.load_state_dict(Dict{}), Error);
}

TEST_CASE("[issue-7.6] what a worker throws reaches the loop with its text") {
  OnCpu fabric;
  for (const std::size_t workers : {0U, 2U}) {
    auto loader = fabric.setup_dataloader(stacked(12, /*fails_at=*/7), {.batch_size = 4, .workers = workers});
    CHECK_THROWS_WITH(take(loader, 3), ContainsSubstring("row 7 cannot be read"));
  }
}
