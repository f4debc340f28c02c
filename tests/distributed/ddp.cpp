// SPDX-License-Identifier: Apache-2.0
//
// Ddp is one process on the joined batch: the same parameters, whatever the optimizer, on 2 and 4 processes.
// ranks: 4
// also: cuda
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;
using Optimizer = std::unique_ptr<torch::optim::Optimizer>;
using MakeOptimizer = std::function<Optimizer(const std::vector<at::Tensor>&)>;

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(6, 16))};
  torch::nn::Linear second{register_module("second", torch::nn::Linear(16, 2))};

  at::Tensor forward(const at::Tensor& x) { return second(torch::tanh(first(x))); }
  at::Tensor encode(const at::Tensor& x) { return first(x); }
};
TORCH_MODULE(Net);

Net make_net(std::uint64_t seed = 11) {
  torch::manual_seed(seed);
  return {};
}

constexpr int rows_per_rank = 8;

/// The joined batch of a step, the same on all ranks.
std::pair<at::Tensor, at::Tensor> joined_batch(int step, int ranks) {
  torch::manual_seed(1000 + static_cast<std::uint64_t>(step));
  const auto options = torch::TensorOptions(torch::kDouble);
  return {torch::randn({ranks * rows_per_rank, 6}, options), torch::randn({ranks * rows_per_rank, 2}, options)};
}
/// This rank's rows of it.
template <class F>
std::pair<at::Tensor, at::Tensor> own_batch(const F& fabric, int step) {
  const auto [x, y] = joined_batch(step, fabric.world_size());
  const auto first = fabric.global_rank() * rows_per_rank;
  return fabric.to_device(std::pair(x.narrow(0, first, rows_per_rank), y.narrow(0, first, rows_per_rank)));
}

/// Where a loop in one process, by hand, takes the parameters.
std::vector<at::Tensor> by_hand(const MakeOptimizer& make, int steps, int ranks) {
  Net net = make_net();
  net->to(torch::kDouble);
  auto optimizer = make(net->parameters());
  for (int step = 0; step < steps; ++step) {
    const auto [x, y] = joined_batch(step, ranks);
    optimizer->zero_grad();
    torch::mse_loss(net(x), y).backward();
    optimizer->step();
  }
  return net->parameters();
}

double distance(const at::Tensor& a, const at::Tensor& b) { return (a.cpu() - b.cpu()).abs().max().item<double>(); }
double distance(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, distance(a[i], b[i]));
  return largest;
}

const MakeOptimizer sgd = [](const std::vector<at::Tensor>& parameters) -> Optimizer {
  return std::make_unique<torch::optim::SGD>(parameters, torch::optim::SGDOptions(0.1).momentum(0.9));
};
const std::vector<std::pair<std::string, MakeOptimizer>> optimizers{
    {"SGD", sgd},
    {"Adam",
     [](const auto& parameters) -> Optimizer { return std::make_unique<torch::optim::Adam>(parameters, 0.01); }},
    {"AdamW",
     [](const auto& parameters) -> Optimizer { return std::make_unique<torch::optim::AdamW>(parameters, 0.01); }},
    {"RMSprop",
     [](const auto& parameters) -> Optimizer { return std::make_unique<torch::optim::RMSprop>(parameters, 0.01); }},
    {"Adagrad",
     [](const auto& parameters) -> Optimizer { return std::make_unique<torch::optim::Adagrad>(parameters, 0.1); }}};

constexpr int steps = 6;

/// Where Fabric takes them.
template <class F>
std::vector<at::Tensor> by_fabric(F& fabric, const MakeOptimizer& make) {
  // Rank 0's parameters count: the others start elsewhere.
  Net net = make_net(fabric.is_global_zero() ? 11 : 99);
  net->to(torch::kDouble);
  auto [model, optimizer] = fabric.setup(net, make(net->parameters()));
  for (int step = 0; step < steps; ++step) {
    const auto [x, y] = own_batch(fabric, step);
    optimizer.zero_grad();
    fabric.backward(torch::mse_loss(model(x), y));
    optimizer.step();
  }
  return net->parameters();
}

/// In which a forward returns what it computes in, so that 64-bit digits are compared and not 32-bit outputs.
struct DoubleOutputs {
  DoubleOutputs() { torch::set_default_dtype(caffe2::TypeMeta::Make<double>()); }
  ~DoubleOutputs() { torch::set_default_dtype(caffe2::TypeMeta::Make<float>()); }
};

/// A network that has learnt its rows of one batch: its loss has halved, and the ranks, which began apart, have the
/// same.
template <class F>
Net learn_one_batch(F& fabric) {
  Net net = make_net(fabric.is_global_zero() ? 11 : 99);
  auto [model, optimizer] = fabric.setup(net, torch::optim::Adam(net->parameters(), 0.02));
  const auto [x, y] = own_batch(fabric, 0);
  const auto input = x.to(torch::kFloat);
  const auto target = y.to(torch::kFloat);
  const auto loss_now = [&, &model = model] { return torch::mse_loss(model(input), target); };
  const double before = loss_now().template item<double>();
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    fabric.backward(loss_now());
    optimizer.step();
  }
  REQUIRE(loss_now().template item<double>() < before / 2);
  for (const auto& parameter : net->parameters()) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
  return net;
}

/// How many collectives the group has done.
template <class F>
std::uint64_t collectives(const F& fabric) {
  return fabric.world().group->getSequenceNumberForGroup();
}

}  // namespace

TEST_CASE("[issue-3.3] the parameters are those of one process on the joined batch, and the same bits on every rank") {
  const DoubleOutputs doubles;
  for (const bool view : {true, false}) {
    on_ranks<F64>({.gradient_as_bucket_view = view}, [&](auto& fabric) {
      for (const auto& [name, make] : optimizers) {
        INFO(name << " " << view);
        const auto parameters = by_fabric(fabric, make);
        REQUIRE(distance(parameters, by_hand(make, steps, fabric.world_size())) < 1e-12);
        for (const auto& parameter : parameters) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
      }
    });
  }
}

TEST_CASE(
    "[issue-3.3] many small buckets, a static graph and a search for unused parameters give the same parameters") {
  const DoubleOutputs doubles;
  const auto test = [](auto& fabric) {
    REQUIRE(distance(by_fabric(fabric, sgd), by_hand(sgd, steps, fabric.world_size())) < 1e-12);
  };
  on_ranks<F64>({.bucket_cap_mb = 1e-4}, test);
  on_ranks<F64>({.static_graph = true}, test);
  on_ranks<F64, DdpFindUnusedParameters>(test);
  on_ranks<F64, DdpFindUnusedParameters>({.static_graph = true}, test);
}

TEST_CASE("[issue-3.6] the caller's own zero_grad and a gradient that is filled with zeros serve as well") {
  const DoubleOutputs doubles;
  on_ranks<F64>([](auto& fabric) {
    Net net = make_net();
    torch::optim::SGD own(net->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
    auto [model, optimizer] = fabric.setup(net, own);
    for (int step = 0; step < steps; ++step) {
      const auto [x, y] = own_batch(fabric, step);
      step % 3 == 0   ? own.zero_grad()
      : step % 3 == 1 ? optimizer.zero_grad(/*set_to_none=*/false)
                      : own.zero_grad(/*set_to_none=*/false);
      fabric.backward(torch::mse_loss(model(x), y));
      optimizer.step();
    }
    REQUIRE(distance(net->parameters(), by_hand(sgd, steps, fabric.world_size())) < 1e-12);
  });
}

TEST_CASE(
    "[issue-3.3] no_backward_sync accumulates without a single collective, and then gives the big batch's gradient") {
  const DoubleOutputs doubles;
  for (const bool view : {true, false}) {
    on_ranks<F64>({.gradient_as_bucket_view = view}, [](auto& fabric) {
      Net net = make_net();
      auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
      for (int step = 0; step < 2; ++step) {  // the reducer settles its buckets in the first two steps
        const auto [x, y] = own_batch(fabric, step);
        optimizer.zero_grad();
        fabric.backward(torch::mse_loss(model(x), y));
      }
      Net reference = make_net();
      reference->to(torch::kDouble);
      for (std::size_t i = 0; i < net->parameters().size(); ++i) {
        const torch::NoGradGuard no_grad;
        reference->parameters()[i].copy_(net->parameters()[i]);
      }
      constexpr int parts = 4;
      for (int round = 0; round < 2; ++round) {
        optimizer.zero_grad();
        for (int part = 0; part < parts; ++part) {
          const auto before = collectives(fabric);
          const auto [x, y] = own_batch(fabric, part);
          const auto guard = fabric.no_backward_sync(model, part + 1 < parts);
          fabric.backward(torch::mse_loss(model(x), y) / parts);
          REQUIRE((collectives(fabric) > before) == (part + 1 == parts));
        }
        // One process on all parts of all ranks.
        reference->zero_grad();
        for (int part = 0; part < parts; ++part) {
          const auto [x, y] = joined_batch(part, fabric.world_size());
          (torch::mse_loss(reference(x), y) / parts).backward();
        }
        for (std::size_t i = 0; i < net->parameters().size(); ++i) {
          REQUIRE(distance(net->parameters()[i].grad(), reference->parameters()[i].grad()) < 1e-14);
        }
      }
      optimizer.step();
    });
  }
}

TEST_CASE("[issue-3.3] under no_backward_sync each rank keeps its own gradient") {
  const DoubleOutputs doubles;
  on_ranks<F64>([](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    const auto [x, y] = own_batch(fabric, 0);
    {
      const auto guard = fabric.no_backward_sync(model);
      fabric.backward(torch::mse_loss(model(x), y));
    }
    REQUIRE_FALSE(same_on_all_ranks(fabric.world(), net->first->weight.grad()));
    REQUIRE_THROWS_WITH(optimizer.step(), ContainsSubstring("not averaged"));
  });
}

TEST_CASE("[issue-3.3] a forward without gradients reduces nothing and leaves the next step as it is") {
  on_ranks<F32>([](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    const auto x = own_batch(fabric, 0).first.to(torch::kFloat);
    const auto before = collectives(fabric);
    {
      const torch::NoGradGuard no_grad;
      if (fabric.is_global_zero()) (void)model(x);  // not even on all ranks
    }
    REQUIRE(collectives(fabric) == before);
    fabric.backward(model(x).sum());
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), net->first->weight));
  });
}

TEST_CASE(
    "[issue-3.3] a batch count that does not divide evenly: padded ranks step together, all rows count once without "
    "padding") {
  struct Rows : torch::data::datasets::BatchDataset<Rows, torch::data::Example<>> {
    torch::data::Example<> get_batch(c10::ArrayRef<std::size_t> rows) override {
      const auto index = torch::tensor(std::vector<std::int64_t>(rows.begin(), rows.end()));
      return {index.to(torch::kFloat).unsqueeze(1).expand({-1, 6}), index};
    }
    [[nodiscard]] std::optional<std::size_t> size() const override { return 11; }
  };
  on_ranks<F32>([](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 1e-3));
    auto loader = fabric.setup_dataloader(Rows(), {.batch_size = 2, .shuffle = true, .seed = 4});
    auto seen = fabric.to_device(torch::zeros({11}, torch::kLong));
    std::size_t batches = 0;
    for (int epoch = 0; epoch < 2; ++epoch) {
      for (auto& batch : loader) {
        ++batches;
        seen.index_add_(0, batch.target, torch::ones_like(batch.target));
        optimizer.zero_grad();
        fabric.backward(model(batch.data).pow(2).mean());
        optimizer.step();
      }
    }
    REQUIRE(batches == 2 * loader.size());
    REQUIRE(fabric.all_reduce(torch::tensor(static_cast<std::int64_t>(batches)), ReduceOp::max)
                .template item<std::int64_t>() == static_cast<std::int64_t>(batches));
    const auto all = fabric.all_reduce(seen, ReduceOp::sum);
    REQUIRE(all.min().template item<std::int64_t>() >= 2);
    REQUIRE(all.sum().template item<std::int64_t>() == 2 * 12);  // 12 is the next number that 2 and 4 divide
    REQUIRE(same_on_all_ranks(fabric.world(), net->first->weight));

    auto once = fabric.setup_dataloader(Rows(), {.batch_size = 2, .shuffle = true, .seed = 4, .pad = false});
    auto counted = fabric.to_device(torch::zeros({11}, torch::kLong));
    for (auto& batch : once) counted.index_add_(0, batch.target, torch::ones_like(batch.target));
    REQUIRE(fabric.all_reduce(counted, ReduceOp::sum).cpu().equal(torch::ones({11}, torch::kLong)));
  });
}

TEST_CASE("[issue-3.3] several forwards before one backward, and methods marked as forward, are averaged") {
  const DoubleOutputs doubles;
  on_ranks<F64>([](auto& fabric) {
    const auto [x, y] = own_batch(fabric, 0);
    const auto [all_x, all_y] = joined_batch(0, fabric.world_size());
    Net reference = make_net();
    reference->to(torch::kDouble);
    (torch::mse_loss(reference(all_x), all_y) + torch::mse_loss(reference(2 * all_x), all_y)).backward();

    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    const auto first = model(x);
    const auto second = model(2 * x);
    fabric.backward(torch::mse_loss(first, y) + torch::mse_loss(second, y));
    REQUIRE(distance(net->first->weight.grad(), reference->first->weight.grad()) < 1e-14);
    optimizer.step();
  });
  on_ranks<F64, DdpFindUnusedParameters>([](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    auto encode = model.mark_forward_method(&NetImpl::encode);
    fabric.backward(encode(own_batch(fabric, 0).first).pow(2).mean());
    REQUIRE(same_on_all_ranks(fabric.world(), net->first->weight.grad()));
    REQUIRE(net->first->weight.grad().abs().max().template item<double>() > 0);
    optimizer.step();
  });
}

TEST_CASE("[issue-3.6] an optimizer that goes by the loss goes by that of all ranks") {
  const DoubleOutputs doubles;
  constexpr int evaluations = 5;
  const auto make = [](const std::vector<at::Tensor>& parameters) {
    return torch::optim::LBFGS(parameters,
                               torch::optim::LBFGSOptions(1).max_iter(evaluations).line_search_fn("strong_wolfe"));
  };
  on_ranks<F64>([&](auto& fabric) {
    Net net = make_net();
    net->to(torch::kDouble);
    auto [model, optimizer] = fabric.setup(net, make(net->parameters()));
    Net joined = make_net();
    joined->to(torch::kDouble);
    auto by_hand = make(joined->parameters());
    for (int step = 0; step < steps; ++step) {
      const auto [x, y] = own_batch(fabric, step);
      const at::Tensor loss = optimizer.step([&, &model = model, &optimizer = optimizer, &x = x, &y = y] {
        optimizer.zero_grad();
        at::Tensor own = torch::mse_loss(model(x), y);
        fabric.backward(own);
        return own;
      });
      const auto [all_x, all_y] = joined_batch(step, fabric.world_size());
      const at::Tensor joined_loss = by_hand.step([&, &all_x = all_x, &all_y = all_y] {
        by_hand.zero_grad();
        at::Tensor loss = torch::mse_loss(joined(all_x), all_y);
        loss.backward();
        return loss;
      });
      REQUIRE(distance(loss, joined_loss) < 1e-9);
    }
    REQUIRE(distance(net->parameters(), joined->parameters()) < 1e-9);
    for (const auto& parameter : net->parameters()) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
  });
}

TEST_CASE("[issue-3.4] bf16-true under Ddp: 16-bit parameters that are the same on every rank, and learn") {
  on_ranks<BF16>([](auto& fabric) {
    const Net net = learn_one_batch(fabric);
    REQUIRE(net->first->weight.scalar_type() == torch::kBFloat16);
    REQUIRE(net->first->weight.grad().scalar_type() == torch::kBFloat16);
  });
}

TEST_CASE("[issue-3.4] bf16-mixed under Ddp: float parameters that are the same on every rank, and learn") {
  on_ranks<BF16Mixed>(
      [](auto& fabric) { REQUIRE(learn_one_batch(fabric)->first->weight.scalar_type() == torch::kFloat); });
}

TEST_CASE("[issue-3.3] all of this on four ranks") { tests::again_on_ranks(4); }
