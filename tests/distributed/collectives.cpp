// SPDX-License-Identifier: Apache-2.0
//
// Collectives, and what else ranks do together, on 2 and 4 processes.
// ranks: 4
// also: cuda
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;

/// Rank r's tensor: (r + 1) * [1, 2].
at::Tensor mine(int rank, at::ScalarType dtype = at::kDouble) {
  return (torch::tensor({1, 2}, torch::kLong) * (rank + 1)).to(dtype);
}
at::Tensor values(double first, double second) { return torch::tensor({first, second}, torch::kDouble); }

}  // namespace

TEST_CASE("[issue-3.3] all_reduce combines on all ranks and leaves its input alone") {
  on_ranks<F32>([](auto& fabric) {
    const int n = fabric.world_size();
    const auto before = mine(fabric.global_rank());
    const auto input = before.clone();
    const double sum = n * (n + 1) / 2.0;
    double factorial = 1;
    for (int i = 2; i <= n; ++i) factorial *= i;
    REQUIRE(fabric.all_reduce(input, ReduceOp::sum).equal(values(sum, 2 * sum)));
    REQUIRE(fabric.all_reduce(input).equal(values(sum / n, 2 * sum / n)));  // the mean is the default
    REQUIRE(fabric.all_reduce(input, ReduceOp::min).equal(values(1, 2)));
    REQUIRE(fabric.all_reduce(input, ReduceOp::max).equal(values(n, 2 * n)));
    REQUIRE(fabric.all_reduce(input, ReduceOp::product).equal(values(factorial, factorial * (1 << n))));
    REQUIRE(input.equal(before));
    REQUIRE(fabric.all_reduce(mine(fabric.global_rank(), at::kLong), ReduceOp::sum)[0].template item<std::int64_t>() ==
            n * (n + 1) / 2);
  });
}

TEST_CASE("[issue-3.3] all_reduce takes views and tensors in the graph, and gives tensors without one") {
  on_ranks<F32>([](auto& fabric) {
    const auto wide = torch::arange(6, torch::kDouble).view({2, 3});
    REQUIRE(fabric.all_reduce(wide.t(), ReduceOp::max).equal(wide.t()));
    const auto in_graph = torch::ones({2}, torch::requires_grad()) * 2;
    REQUIRE_FALSE(fabric.all_reduce(in_graph).requires_grad());
  });
}

TEST_CASE("[issue-3.3] numbers are reduced in 64 bits") {
  on_ranks<F32>([](auto& fabric) {
    const double tenth = 0.1;
    const std::int64_t odd = (std::int64_t{1} << 60) + 1;
    REQUIRE(fabric.all_reduce(tenth, ReduceOp::max) == tenth);
    REQUIRE(fabric.all_reduce(16777217.0, ReduceOp::max) == 16777217.0);
    REQUIRE(fabric.all_reduce(odd, ReduceOp::max) == odd);
    const std::uint64_t large = ~std::uint64_t{0};  // the same on all ranks comes back, bit for bit
    REQUIRE(fabric.all_reduce(large, ReduceOp::max) == large);
  });
}

TEST_CASE("[issue-3.3] the mean of integers is refused before anything is sent") {
  on_ranks<F32>([](auto& fabric) {
    REQUIRE_THROWS_WITH(fabric.all_reduce(mine(0, at::kLong)),
                        ContainsSubstring("Long") && ContainsSubstring("ReduceOp::sum"));
    REQUIRE_THROWS_AS(fabric.reduce(mine(0, at::kInt)), Error);
    REQUIRE(fabric.all_reduce(torch::ones({1})).template item<float>() == 1);  // the ranks are still in step
  });
}

TEST_CASE("[issue-3.3] reduce gives the result to the root alone, whichever that is") {
  on_ranks<F32>([](auto& fabric) {
    const int n = fabric.world_size();
    const double sum = n * (n + 1) / 2.0;
    for (const int root : {0, n - 1}) {
      const auto own = mine(fabric.global_rank());
      const bool is_root = fabric.global_rank() == root;
      REQUIRE(fabric.reduce(own, ReduceOp::sum, root).equal(is_root ? values(sum, 2 * sum) : own));
      REQUIRE(fabric.reduce(own, ReduceOp::mean, root).equal(is_root ? values(sum / n, 2 * sum / n) : own));
    }
  });
}

TEST_CASE("[issue-3.3] all_gather stacks the ranks' tensors along a new first dimension") {
  on_ranks<F32>([](auto& fabric) {
    const int n = fabric.world_size();
    const auto gathered = fabric.all_gather(mine(fabric.global_rank()));
    REQUIRE(gathered.sizes() == at::IntArrayRef{n, 2});
    for (int rank = 0; rank < n; ++rank) REQUIRE(gathered[rank].equal(mine(rank)));
    const auto scalars = fabric.all_gather(torch::tensor(fabric.global_rank()));
    REQUIRE(scalars.equal(torch::arange(n, torch::kInt)));
    REQUIRE(fabric.all_gather(torch::zeros({0, 3})).sizes() == at::IntArrayRef{n, 0, 3});
  });
}

TEST_CASE("[issue-3.3] broadcast sends tensors, texts and numbers from any root") {
  on_ranks<F32>([](auto& fabric) {
    const int rank = fabric.global_rank();
    for (const int root : {0, fabric.world_size() - 1}) {
      REQUIRE(fabric.broadcast(mine(rank), root).equal(mine(root)));
      const std::string text = "rank " + std::to_string(rank) + std::string(1, '\0') +
                               std::string(static_cast<std::size_t>(rank) * 1000, 'x');
      REQUIRE(fabric.broadcast(text, root) == "rank " + std::to_string(root) + std::string(1, '\0') +
                                                  std::string(static_cast<std::size_t>(root) * 1000, 'x'));
      REQUIRE(fabric.broadcast(rank + 0.1, root) == root + 0.1);
      REQUIRE(fabric.broadcast(std::numeric_limits<std::int64_t>::max() - rank, root) ==
              std::numeric_limits<std::int64_t>::max() - root);
      REQUIRE(fabric.broadcast(rank == root, root));
    }
    REQUIRE(fabric.broadcast(rank == 0 ? "" : "something").empty());
  });
}

TEST_CASE("[issue-3.3] collectives go through nested containers and keep what is no tensor") {
  on_ranks<F32>([](auto& fabric) {
    struct Statistics {
      at::Tensor loss;
      std::map<std::string, std::vector<at::Tensor>> more;
      std::optional<at::Tensor> maybe;
      std::string note;
    };
    const int n = fabric.world_size();
    const auto own = mine(fabric.global_rank());
    const Statistics given{own, {{"a", {own, own * 2}}}, own * 3, "note"};
    const double sum = n * (n + 1) / 2.0;
    const Statistics reduced = fabric.all_reduce(given, ReduceOp::sum);
    REQUIRE(reduced.loss.equal(values(sum, 2 * sum)));
    REQUIRE(reduced.more.at("a")[1].equal(values(2 * sum, 4 * sum)));
    REQUIRE(reduced.maybe->equal(values(3 * sum, 6 * sum)));
    REQUIRE(reduced.note == "note");
    REQUIRE(fabric.all_gather(given).more.at("a")[1].sizes() == at::IntArrayRef{n, 2});
    REQUIRE(fabric.broadcast(given, 1).maybe->equal(mine(1) * 3));
    const auto [first, second] = fabric.reduce(std::tuple{own, own * 2}, ReduceOp::max);
    if (fabric.is_global_zero()) REQUIRE(second.equal(values(2 * n, 4 * n)));
  });
}

TEST_CASE("[issue-3.6] ranks know who they are") {
  on_ranks<F32>([](auto& fabric) {
    const auto ranks =
        fabric.all_gather(torch::tensor({fabric.global_rank(), fabric.local_rank(), fabric.node_rank()}));
    for (int rank = 0; rank < fabric.world_size(); ++rank) {
      const auto expected = tests::apart() ? torch::tensor({rank, 0, rank}) : torch::tensor({rank, rank, 0});
      REQUIRE(ranks[rank].equal(expected));
    }
    REQUIRE(fabric.is_global_zero() == (fabric.global_rank() == 0));
  });
}

TEST_CASE("[issue-3.6] barrier holds the first until the last has come") {
  on_ranks<F32>([](auto& fabric) {
    // The last rank is late; when the others are past the barrier, it must have been there.
    const auto now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
    const bool late = fabric.global_rank() == fabric.world_size() - 1;
    if (late) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const double before = now();
    fabric.barrier();
    const double after = now();
    REQUIRE(after >= fabric.broadcast(before, fabric.world_size() - 1));  // one clock on one host
  });
}

TEST_CASE("[issue-3.6] rank_zero_first lets rank 0 go first") {
  on_ranks<F32>([](auto& fabric) {
    const auto file =
        std::filesystem::temp_directory_path() / ("fabric-first-" + std::to_string(fabric.broadcast(getpid())));
    const bool found = fabric.rank_zero_first([&] {
      const bool there = std::filesystem::exists(file);
      if (!there) {
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        std::ofstream{file} << "made";
      }
      return there;
    });
    REQUIRE(found == !fabric.is_global_zero());
    fabric.barrier();
    if (fabric.is_global_zero()) std::filesystem::remove(file);
    int calls = 0;
    fabric.rank_zero_first([&] { ++calls; }, /*local=*/true);
    REQUIRE(calls == 1);
  });
}

TEST_CASE("[issue-3.6] only rank 0 logs") {
  on_ranks<F32>([](auto& fabric) {
    struct Counter : Logger {
      int rows = 0;
      void log_metrics(const Metrics&, std::optional<std::int64_t>) override { ++rows; }
    };
    const auto counter = std::make_shared<Counter>();
    Fabric<tests::Tested, Ddp, F32> logging(fabric.selection(), {.loggers = {counter}});
    logging.launch();
    logging.log("loss", 1.0);
    logging.log("loss", torch::ones({1}), 2);
    REQUIRE(counter->rows == (fabric.is_global_zero() ? 2 : 0));
  });
}

TEST_CASE("[issue-3.3] all of this on four ranks") { tests::again_on_ranks(4); }
