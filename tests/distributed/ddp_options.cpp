// SPDX-License-Identifier: Apache-2.0
//
// What Ddp offers beyond averaging, and the mistakes that it catches.
#include <cstdint>
#include <string>
#include <vector>

#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;

/// Uses `spare` only when it is told to.
struct ChoosyImpl : torch::nn::Module {
  torch::nn::Linear used{register_module("used", torch::nn::Linear(4, 2))};
  torch::nn::Linear spare{register_module("spare", torch::nn::Linear(4, 2))};

  at::Tensor forward(const at::Tensor& x, bool both) { return both ? used(x) + spare(x) : used(x); }
};
TORCH_MODULE(Choosy);

torch::nn::Linear make_linear() {
  torch::manual_seed(21);
  return torch::nn::Linear(4, 2);
}

/// This rank's own rows.
template <class F>
at::Tensor rows(const F& fabric) {
  torch::manual_seed(50 + static_cast<std::uint64_t>(fabric.global_rank()));
  return torch::randn({8, 4});
}

/// The gradient that a step of Ddp leaves in the weight.
template <class F>
at::Tensor averaged_gradient(F& fabric) {
  auto linear = make_linear();
  auto model = fabric.setup(linear);
  fabric.backward(model(rows(fabric)).pow(2).mean());
  REQUIRE(same_on_all_ranks(fabric.world(), linear->weight.grad()));
  return linear->weight.grad().clone();
}

}  // namespace

TEST_CASE("[issue-3.3] parameters that took no part in the loss are named, with what to do") {
  on_ranks<F32>([](auto& fabric) {
    Choosy net;
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    fabric.backward(model(rows(fabric), false).sum());
    REQUIRE_THROWS_AS(optimizer.step(), Error);
    REQUIRE_THROWS_WITH(optimizer.step(),
                        ContainsSubstring("spare.weight") && ContainsSubstring("spare.bias") &&
                            !ContainsSubstring("used.weight") &&
                            ContainsSubstring("DdpFindUnusedParameters (ddp_find_unused_parameters_true)"));
    // A forward instead of the step says the same.
    REQUIRE_THROWS_WITH(model(rows(fabric), false), ContainsSubstring("spare.weight"));
  });
}

TEST_CASE("[issue-3.3] DdpFindUnusedParameters trains when ranks use different parameters, and all stay equal") {
  on_ranks<F32, DdpFindUnusedParameters>([](auto& fabric) {
    torch::manual_seed(1);
    Choosy net;
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    const auto untouched = net->spare->weight.detach().clone();
    for (int step = 0; step < 3; ++step) {  // nobody uses it
      optimizer.zero_grad();
      fabric.backward(model(rows(fabric), false).sum());
      optimizer.step();
    }
    REQUIRE(net->spare->weight.equal(untouched));
    for (int step = 0; step < 3; ++step) {  // one rank does
      optimizer.zero_grad();
      fabric.backward(model(rows(fabric), fabric.is_global_zero()).sum());
      optimizer.step();
    }
    REQUIRE_FALSE(net->spare->weight.equal(untouched));
    for (const auto& parameter : net->parameters()) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
  });
}

TEST_CASE("[issue-3.3] a static graph may leave parameters unused") {
  on_ranks<F32>({.static_graph = true}, [](auto& fabric) {
    torch::manual_seed(1);
    Choosy net;
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(rows(fabric), false).sum());
      optimizer.step();
    }
    REQUIRE(same_on_all_ranks(fabric.world(), net->used->weight));
  });
}

TEST_CASE("[issue-3.3] BatchNorm's statistics are rank 0's, unless that is turned off") {
  for (const bool broadcast : {true, false}) {
    on_ranks<F32>({.broadcast_buffers = broadcast}, [&](auto& fabric) {
      torch::nn::BatchNorm1d norm(4);
      auto model = fabric.setup(norm);
      const auto x = rows(fabric) + fabric.global_rank();
      fabric.backward(model(x).sum());
      const auto own = norm->running_mean.clone();
      REQUIRE_FALSE(same_on_all_ranks(fabric.world(), own));
      const auto batches = norm->num_batches_tracked.clone();
      (void)fabric.backward(model(x).sum());  // starts from rank 0's or from its own
      const auto start = broadcast ? fabric.broadcast(own) : own;
      REQUIRE(norm->running_mean.allclose(start * 0.9 + x.mean(0) * 0.1));
      REQUIRE(norm->num_batches_tracked.equal(batches + 1));
      norm->eval();
      REQUIRE(model(x).defined());
    });
  }
}

TEST_CASE("[issue-3.3] half-float gradients are close to whole ones, but not the same") {
  on_ranks<F32>([](auto& fabric) {
    const auto exact = averaged_gradient(fabric);
    for (const auto compression : {GradientCompression::f16, GradientCompression::bf16}) {
      Fabric<Cpu, Ddp, F32> half({.devices = fabric.world_size(), .strategy = {.compression = compression}});
      half.launch();
      const auto gradient = averaged_gradient(half);
      const double digits = compression == GradientCompression::f16 ? 2e-3 : 2e-2;
      REQUIRE(gradient.allclose(exact, digits, digits));
      REQUIRE_FALSE(gradient.equal(exact));
      // What came back is a number of the narrow type.
      REQUIRE(gradient.equal(
          gradient.to(compression == GradientCompression::f16 ? torch::kHalf : torch::kBFloat16).to(torch::kFloat)));
    }
  });
}

TEST_CASE("[issue-3.3] a large gradient survives half floats, since it is divided before it is added") {
  on_ranks<F32>({.compression = GradientCompression::f16}, [](auto& fabric) {
    auto linear = make_linear();
    auto model = fabric.setup(linear);
    fabric.backward(model(torch::full({1, 4}, 40000.0)).sum());
    REQUIRE(linear->weight.grad().equal(torch::full({2, 4}, 40000.0)));
  });
}

TEST_CASE("[issue-3.3] a module that is called past its wrapper is noticed at step") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    fabric.backward(linear(rows(fabric)).sum());
    REQUIRE_THROWS_AS(optimizer.step(), Error);
    REQUIRE_THROWS_WITH(optimizer.step(),
                        ContainsSubstring("not averaged") && ContainsSubstring("mark_forward_method"));
    optimizer.zero_grad();
    fabric.backward(model(rows(fabric)).sum());
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}

TEST_CASE("[issue-3.6] an optimizer of parameters that were never set up is refused") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    REQUIRE_THROWS_WITH(fabric.setup(torch::optim::SGD(linear->parameters(), 0.1)),
                        ContainsSubstring("belong to no module"));
    auto model = fabric.setup(linear);
    auto optimizer = fabric.setup(torch::optim::SGD(linear->parameters(), 0.1));  // after its module
    fabric.backward(model(rows(fabric)).sum());
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}

TEST_CASE("[issue-3.3] modules of different parameter counts on the ranks are refused on every rank") {
  on_ranks<F32>([](auto& fabric) {
    torch::nn::Sequential layers(torch::nn::Linear(2, 2));
    if (!fabric.is_global_zero()) layers->push_back(torch::nn::Linear(2, 2));
    REQUIRE_THROWS_WITH(fabric.setup(layers), ContainsSubstring("rank 0 has nothing more, rank 1 has '1.weight"));
  });
}

TEST_CASE("[issue-3.3] a frozen module is replicated, and then needs no averaging") {
  on_ranks<F32>([](auto& fabric) {
    torch::manual_seed(static_cast<std::uint64_t>(fabric.global_rank()));
    torch::nn::Linear frozen(4, 4);
    for (auto& parameter : frozen->parameters()) parameter.set_requires_grad(false);
    auto linear = make_linear();
    auto [features, model, optimizer] = fabric.setup(frozen, linear, torch::optim::SGD(linear->parameters(), 0.1));
    REQUIRE(same_on_all_ranks(fabric.world(), frozen->weight));
    fabric.backward(model(features(rows(fabric))).sum());
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}

TEST_CASE("[issue-3.6] a GAN on several ranks: the generator's gradient flows through the critic") {
  on_ranks<F32>([](auto& fabric) {
    auto generator = make_linear();
    torch::nn::Linear critic(2, 1);
    auto [g, d, g_optimizer, d_optimizer] =
        fabric.setup(generator, critic, torch::optim::SGD(generator->parameters(), 0.1),
                     torch::optim::SGD(critic->parameters(), 0.1));
    for (int step = 0; step < 3; ++step) {
      d_optimizer.zero_grad();
      fabric.backward(d(g(rows(fabric)).detach()).mean());
      d_optimizer.step();
      g_optimizer.zero_grad();
      fabric.backward(-d(g(rows(fabric))).mean());
      g_optimizer.step();
    }
    REQUIRE(same_on_all_ranks(fabric.world(), generator->weight));
    REQUIRE(same_on_all_ranks(fabric.world(), critic->weight));
  });
}

TEST_CASE("[issue-3.6] clipping under Ddp sees the averaged gradients: one norm on all ranks") {
  on_ranks<F32>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    fabric.backward(model(rows(fabric)).pow(2).sum());
    const auto norm = fabric.clip_gradients(model, ClipNorm{0.1});
    REQUIRE(same_on_all_ranks(fabric.world(), norm));
    REQUIRE(norm.template item<double>() > 0.1);
    REQUIRE(linear->weight.grad().norm().template item<double>() <= 0.1);
    optimizer.step();
    REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  });
}
