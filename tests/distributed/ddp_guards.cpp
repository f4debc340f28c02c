// SPDX-License-Identifier: Apache-2.0
//
// No way of writing the loop lets the ranks drift apart unnoticed, and none that is right is refused.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;

torch::nn::Linear make_linear() {
  torch::manual_seed(3);
  return torch::nn::Linear(4, 2);
}

/// This rank's own rows.
template <class F>
at::Tensor rows(const F& fabric) {
  torch::manual_seed(70 + static_cast<std::uint64_t>(fabric.global_rank()));
  return torch::randn({8, 4});
}

/// One weight under two names.
struct TiedImpl : torch::nn::Module {
  at::Tensor first{register_parameter("first", torch::randn({4, 4}))};
  at::Tensor second{register_parameter("second", first)};
  at::Tensor forward(const at::Tensor& x) { return x.mm(first).mm(second); }
};

/// Two parts for two optimizers; the forward goes through one of them or both.
struct TwoPartsImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(4, 2))};
  torch::nn::Linear second{register_module("second", torch::nn::Linear(4, 2))};
  at::Tensor forward(const at::Tensor& x, bool both) {
    return both ? first->forward(x) + second->forward(x) : second->forward(x);
  }
};

}  // namespace

TEST_CASE("[issue-3.6] zero_grad may stand before the forward or between forward and backward") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    for (int step = 0; step < 4; ++step) {
      if (step % 2 == 0) optimizer.zero_grad();
      const auto loss = model(rows(fabric)).pow(2).mean();
      if (step % 2 == 1) optimizer.zero_grad();
      fabric.backward(loss);
      optimizer.step();
      REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
    }
  });
}

TEST_CASE("[issue-3.6] a step right after a backward under no_backward_sync is refused, whatever went before") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    fabric.backward(model(rows(fabric)).pow(2).mean());
    {
      const auto guard = fabric.no_backward_sync(model);
      fabric.backward(model(rows(fabric)).pow(2).mean());
    }
    REQUIRE_THROWS_WITH(optimizer.step(), ContainsSubstring("no_backward_sync"));
    fabric.backward(model(rows(fabric)).pow(2).mean());  // averages all that has accumulated
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}

TEST_CASE("[issue-3.6] local gradients of another optimizer are in a step's way until that one has dropped them") {
  on_ranks<F32>([](auto& fabric) {
    torch::manual_seed(5);
    auto parts = std::make_shared<TwoPartsImpl>();
    auto [model, of_first, of_second] = fabric.setup(parts, torch::optim::SGD(parts->first->parameters(), 0.1),
                                                     torch::optim::SGD(parts->second->parameters(), 0.1));
    fabric.backward(model(rows(fabric), true).pow(2).mean());
    {
      const auto guard = fabric.no_backward_sync(model);
      fabric.backward(model(rows(fabric), false).pow(2).mean());
    }
    REQUIRE_THROWS_WITH(of_first.step(), ContainsSubstring("no_backward_sync"));
    of_second.zero_grad();
    const at::Tensor before = parts->first->weight.detach().clone();
    of_first.step();  // by gradients that were averaged
    REQUIRE_FALSE(parts->first->weight.equal(before));
    REQUIRE(same_on_all_ranks(fabric.world(), parts->first->weight));

    {
      const auto guard = fabric.no_backward_sync(model);
      fabric.backward(model(rows(fabric), true).pow(2).mean());
    }
    of_second.zero_grad();
    REQUIRE_THROWS_WITH(of_first.step(), ContainsSubstring("no_backward_sync"));  // its own are local as well
  });
}

TEST_CASE("[issue-3.6] calling past the wrapper is noticed though the caller's own optimizer clears the gradients") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    torch::optim::SGD sgd(linear->parameters(), 0.1);
    auto [model, optimizer] = fabric.setup(linear, sgd);
    fabric.backward(model(rows(fabric)).pow(2).mean());
    optimizer.step();
    sgd.zero_grad();
    fabric.backward(linear->forward(rows(fabric)).pow(2).mean());
    REQUIRE_THROWS_WITH(optimizer.step(), ContainsSubstring("mark_forward_method"));
  });
}

TEST_CASE("[issue-3.6] an optimizer with one stranger among its parameters is refused, and a module set up twice") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    auto stranger = make_linear();
    auto model = fabric.setup(linear);
    std::vector<at::Tensor> both = linear->parameters();
    both.push_back(stranger->weight);
    REQUIRE_THROWS_WITH(fabric.setup(torch::optim::SGD(both, 0.1)), ContainsSubstring("parameter 2"));
    REQUIRE_THROWS_WITH(fabric.setup(linear), ContainsSubstring("set up already"));
  });
}

TEST_CASE("[issue-3.6] a module whose setup was refused can be set up again, once it is as on the other ranks") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    if (fabric.global_rank() == 1) linear->bias.set_requires_grad(false);
    REQUIRE_THROWS_WITH(fabric.setup(linear),
                        ContainsSubstring("the ranks do not agree") && ContainsSubstring("bias: Float [2], trained"));
    linear->bias.set_requires_grad(true);
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    fabric.backward(model(rows(fabric)).pow(2).mean());
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}

TEST_CASE("[issue-3.3] tied weights are averaged once") {
  on_ranks<F32>([](auto& fabric) {
    torch::manual_seed(5);
    auto tied = std::make_shared<TiedImpl>();
    auto model = fabric.setup(tied);
    const auto x = rows(fabric);
    fabric.backward(model(x).pow(2).mean());
    const auto averaged = tied->first.grad().clone();
    tied->zero_grad();
    tied->forward(x).pow(2).mean().backward();
    REQUIRE(at::allclose(averaged, fabric.all_reduce(tied->first.grad()), 1e-5, 1e-5));
  });
}

TEST_CASE("[issue-3.3] after a step BatchNorm evaluates alike on all ranks, without communication") {
  on_ranks<F32>([](auto& fabric) {
    torch::manual_seed(1);
    torch::nn::Sequential net(torch::nn::Linear(4, 3), torch::nn::BatchNorm1d(3));
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    fabric.backward(model(rows(fabric)).pow(2).mean());
    optimizer.step();
    net->eval();
    const at::NoGradGuard no_grad;
    const auto answer = fabric.is_global_zero() ? model(torch::ones({2, 4})) : at::Tensor();  // rank 0 alone may ask
    REQUIRE(same_on_all_ranks(fabric.world(), net->buffers()[0]));
    REQUIRE(same_on_all_ranks(fabric.world(), net->buffers()[1]));
  });
}

TEST_CASE("[issue-3.3] a number by itself is reduced like a tensor") {
  on_ranks<F32>([](auto& fabric) {
    const int n = fabric.world_size();
    REQUIRE(fabric.all_reduce(static_cast<double>(fabric.global_rank()), ReduceOp::sum) == n * (n - 1) / 2);
    REQUIRE(fabric.all_reduce(fabric.global_rank(), ReduceOp::max) == n - 1);
    REQUIRE_THROWS_WITH(fabric.all_reduce(1, ReduceOp::mean), ContainsSubstring("ReduceOp::sum"));
  });
}

TEST_CASE("[issue-3.6] a second Fabric of another size is refused at once") {
  on_ranks<F32>([](auto& fabric) {
    Fabric<Cpu, Ddp, F32> other({.devices = fabric.world_size() + 1});
    REQUIRE_THROWS_WITH(other.launch(), ContainsSubstring("make both agree"));
  });
}

TEST_CASE("[issue-3.6] before launch() nothing pretends to be the whole world") {
  Fabric<Cpu, Ddp, F32> fabric({.devices = 2});
  REQUIRE_THROWS_WITH(fabric.all_reduce(torch::ones({1})), ContainsSubstring("launch"));
  REQUIRE_THROWS_WITH(fabric.broadcast(1.0), ContainsSubstring("launch"));
  REQUIRE_THROWS_WITH(fabric.barrier(), ContainsSubstring("launch"));
  REQUIRE_THROWS_WITH(fabric.rank_zero_first([] {}), ContainsSubstring("launch"));
}
