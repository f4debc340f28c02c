// SPDX-License-Identifier: Apache-2.0
//
// The surface of Fabric in one process.
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using OnCpu = Fabric<Cpu, SingleDevice, F32>;

struct Output {
  at::Tensor mean;
  std::vector<at::Tensor> layers;
  int calls = 0;
};

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(2, 3))};
  torch::nn::Linear second{register_module("second", torch::nn::Linear(3, 1))};
  int calls = 0;

  at::Tensor forward(const at::Tensor& x) { return second(torch::tanh(first(x))); }
  at::Tensor encode(const at::Tensor& x, double scale) { return first(x) * scale; }
};
TORCH_MODULE(Net);

struct ManyArgumentsImpl : torch::nn::Module {
  torch::nn::Linear linear{register_module("linear", torch::nn::Linear(2, 2))};
  int calls = 0;

  Output forward(const at::Tensor& x, std::pair<at::Tensor, double> scaled, const std::string& mode, int add) {
    auto y = linear(x) + scaled.first * scaled.second + add;
    return {y.mean(), {y, mode == "twice" ? 2 * y : y}, ++calls};
  }
};
TORCH_MODULE(ManyArguments);

struct TupleImpl : torch::nn::Module {
  std::tuple<at::Tensor, at::Tensor, int> forward(const at::Tensor& x) { return {x + 1, x + 2, 3}; }
};
TORCH_MODULE(Tuple);

at::Tensor input() { return torch::tensor({{1.0F, 2.0F}, {3.0F, 4.0F}}); }

}  // namespace

TEST_CASE("[issue-3.6] setup takes a module in every form that owns or names one") {
  OnCpu fabric;
  Net net;
  const auto expected = net(input());
  SECTION("holder") { CHECK(fabric.setup(net)(input()).equal(expected)); }
  SECTION("shared_ptr") { CHECK(fabric.setup(net.ptr())(input()).equal(expected)); }
  SECTION("reference") {
    auto model = fabric.setup(*net);
    CHECK(model(input()).equal(expected));
    CHECK(&model.module() == net.get());
  }
  SECTION("unique_ptr") {
    auto model = fabric.setup(std::make_unique<NetImpl>());
    CHECK(model(input()).sizes() == expected.sizes());
  }
  SECTION("value") {
    torch::nn::Sequential layers(torch::nn::Linear(2, 3), torch::nn::Tanh(), torch::nn::Linear(3, 1));
    auto model = fabric.setup(layers);
    CHECK(model(input()).equal(layers->forward(input())));
    CHECK(fabric.setup(torch::nn::Sequential(torch::nn::Identity()))(input()).equal(input()));
    CHECK(fabric.setup(torch::nn::BatchNorm1d(2))(input()).sizes() == input().sizes());
    CHECK(fabric.setup(NetImpl())(input()).sizes() == expected.sizes());
  }
  SECTION("what comes back shares the module and leads to it") {
    auto model = fabric.setup(net);
    const auto copy = model;  // NOLINT(performance-unnecessary-copy-initialization): copies are what this is about
    CHECK(copy.ptr() == net.ptr());
    CHECK(model->first->weight.is_same(net->first->weight));
    model->eval();
    CHECK_FALSE(net->is_training());
  }
}

TEST_CASE("[issue-3.6] forward takes any arguments and returns structures and tuples") {
  OnCpu fabric;
  ManyArguments net;
  auto model = fabric.setup(net);
  const Output out = model(input(), std::pair{input(), 0.5}, "twice", 4);
  CHECK(out.layers[0].allclose(net->linear(input()) + input() * 0.5 + 4));
  CHECK(out.layers[1].equal(out.layers[0] * 2));
  CHECK(out.calls == 1);
  fabric.backward(out.mean);
  CHECK(net->linear->weight.grad().defined());

  const auto [one, two, three] = fabric.setup(Tuple())(input());
  CHECK(one.equal(input() + 1));
  CHECK(two.equal(input() + 2));
  CHECK(three == 3);

  Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
  const Output half = mixed.setup(ManyArguments())(input(), std::pair{input(), 0.5}, "once", 0);
  CHECK(half.mean.scalar_type() == at::kFloat);
  CHECK(half.layers[1].scalar_type() == at::kFloat);
}

TEST_CASE("[issue-3.6] other methods run like forward when they are marked") {
  Fabric<Cpu, SingleDevice, BF16Mixed> fabric;
  Net net;
  auto model = fabric.setup(net);
  auto encode = model.mark_forward_method(&NetImpl::encode);
  const auto encoded = encode(input(), 2.0);
  CHECK(encoded.scalar_type() == at::kFloat);
  const auto exact = net->encode(input(), 2.0);
  CHECK(encoded.allclose(exact, 0.05, 0.05));
  CHECK_FALSE(encoded.equal(exact));  // computed by autocast
}

TEST_CASE("[issue-3.6] setup returns modules and optimizers in the order of the arguments") {
  OnCpu fabric;
  Net a;
  Net b;
  auto [model_a, optimizer_a, optimizer_b, model_b] = fabric.setup(
      a, torch::optim::SGD(a->parameters(), 0.1), std::make_unique<torch::optim::Adam>(b->parameters()), b);
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(optimizer_a.optimizer())>, torch::optim::SGD>);
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(optimizer_b.optimizer())>, torch::optim::Adam>);
  CHECK(model_a.ptr() == a.ptr());
  CHECK(model_b.ptr() == b.ptr());
  fabric.backward((model_a(input()) + model_b(input())).sum());
  const auto before_a = a->first->weight.detach().clone();
  const auto before_b = b->first->weight.detach().clone();
  optimizer_a.step();
  CHECK_FALSE(a->first->weight.equal(before_a));
  CHECK(b->first->weight.equal(before_b));
  optimizer_b.step();
  CHECK_FALSE(b->first->weight.equal(before_b));
  optimizer_a.zero_grad();
  CHECK_FALSE(a->first->weight.grad().defined());
  optimizer_b.zero_grad(/*set_to_none=*/false);
  CHECK(b->first->weight.grad().abs().sum().item<double>() == 0);
}

TEST_CASE("[issue-3.6] the caller's optimizer stays usable: its learning rate, scheduler and zero_grad") {
  OnCpu fabric;
  Net net;
  torch::optim::SGD sgd(net->parameters(), 1.0);
  torch::optim::StepLR scheduler(sgd, /*step_size=*/1, /*gamma=*/0.5);
  auto [model, optimizer] = fabric.setup(net, sgd);
  CHECK(&optimizer.optimizer() == &sgd);
  for (const double rate : {1.0, 1.0, 0.5}) {  // StepLR's first step keeps the rate
    sgd.zero_grad();
    CHECK_FALSE(net->first->weight.grad().defined());
    fabric.backward(model(input()).sum());
    const auto before = net->first->weight.detach().clone();
    const auto gradient = net->first->weight.grad().clone();
    optimizer.step();
    CHECK(net->first->weight.allclose(before - rate * gradient));
    scheduler.step();
  }
  sgd.step();  // and stepping by itself
}

TEST_CASE("[issue-3.6] the loop gives the bits of the loop that is written by hand") {
  const auto make = [] {
    torch::manual_seed(5);
    return Net();
  };
  Net by_hand = make();
  torch::optim::AdamW adam(by_hand->parameters(), 0.05);
  for (int i = 0; i < 5; ++i) {
    adam.zero_grad();
    by_hand(input()).pow(2).sum().backward();
    adam.step();
  }
  OnCpu fabric;
  Net net = make();
  auto [model, optimizer] = fabric.setup(net, torch::optim::AdamW(net->parameters(), 0.05));
  for (int i = 0; i < 5; ++i) {
    optimizer.zero_grad();
    fabric.backward(model(input()).pow(2).sum());
    optimizer.step();
  }
  for (std::size_t i = 0; i < net->parameters().size(); ++i)
    CHECK(net->parameters()[i].equal(by_hand->parameters()[i]));
}

TEST_CASE("[issue-3.6] an optimizer that evaluates the loss itself takes a closure") {
  OnCpu fabric;
  Net net;
  auto [model, optimizer] = fabric.setup(net, torch::optim::LBFGS(net->parameters()));
  const auto closure = [&, &model = model, &optimizer = optimizer] {
    optimizer.zero_grad();
    auto loss = (model(input()) - 1).pow(2).mean();
    fabric.backward(loss);
    return loss;
  };
  const double before = optimizer.step(closure).item<double>();
  CHECK(closure().item<double>() < before / 10);
}

TEST_CASE("[issue-3.3] Ddp with one process: the numbers of a single device, and collectives of one rank") {
  const auto train = [](auto& fabric) {
    torch::manual_seed(3);
    Net net;
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      fabric.backward((model(input()) - 1).pow(2).mean());
      optimizer.step();
    }
    return net->parameters();
  };
  OnCpu single;
  const auto expected = train(single);
  Fabric<Cpu, Ddp, F32> fabric({.devices = 1});
  fabric.launch();
  const auto parameters = train(fabric);
  for (std::size_t i = 0; i < parameters.size(); ++i) CHECK(parameters[i].equal(expected[i]));
  CHECK(fabric.world_size() == 1);
  CHECK(fabric.all_reduce(torch::ones({2}), ReduceOp::sum).equal(torch::ones({2})));
  CHECK(fabric.all_gather(torch::ones({2})).sizes() == at::IntArrayRef{1, 2});  // a group, if of one
  CHECK(single.all_gather(torch::ones({2})).sizes() == at::IntArrayRef{2});
}

TEST_CASE("[issue-3.6] a GAN: two modules and two optimizers learn the mean of the data") {
  OnCpu fabric;
  seed_everything(0);
  const auto mlp = [](int in) {
    return torch::nn::Sequential(torch::nn::Linear(in, 16), torch::nn::Tanh(), torch::nn::Linear(16, 1));
  };
  auto generator = mlp(2);
  auto critic = mlp(1);
  const auto options = torch::optim::AdamOptions(0.01).betas({0.5, 0.9});
  auto [g, d, g_optimizer, d_optimizer] =
      fabric.setup(generator, critic, torch::optim::Adam(generator->parameters(), options),
                   torch::optim::Adam(critic->parameters(), options));
  const auto fake = [&, &g = g] { return g(torch::randn({64, 2})); };
  const auto judge = [&, &d = d](const at::Tensor& x, double truth) {
    return torch::binary_cross_entropy_with_logits(d(x), torch::full({x.size(0), 1}, truth));
  };
  const double before = fake().mean().item<double>();
  double after = 0;  // the mean of the last 200 steps, since the two circle around the answer
  for (int step = 0; step < 400; ++step) {
    d_optimizer.zero_grad();
    fabric.backward(judge(torch::randn({64, 1}) * 0.5 + 3.0, 1) + judge(fake().detach(), 0));
    d_optimizer.step();
    g_optimizer.zero_grad();
    const auto made = fake();
    fabric.backward(judge(made, 1));
    g_optimizer.step();
    if (step >= 200) after += made.mean().item<double>() / 200;
  }
  CHECK(std::abs(before) < 1);
  CHECK(after == Approx(3).margin(0.5));
}

TEST_CASE("[issue-3.6] two Fabrics live in one process") {
  OnCpu f32;
  Fabric<Cpu, SingleDevice, F64> f64;
  Net a;
  Net b;
  auto [model_a, optimizer_a] = f32.setup(a, torch::optim::SGD(a->parameters(), 0.1));
  auto [model_b, optimizer_b] = f64.setup(b, torch::optim::SGD(b->parameters(), 0.1));
  f32.backward(model_a(input()).sum());
  f64.backward(model_b(input()).sum());
  optimizer_a.step();
  optimizer_b.step();
  CHECK(a->first->weight.scalar_type() == at::kFloat);
  CHECK(b->first->weight.scalar_type() == at::kDouble);
}

TEST_CASE("[issue-3.6] backward takes a gradient and can keep the graph") {
  OnCpu fabric;
  auto x = torch::ones({2}, torch::requires_grad());
  const auto y = x * x;
  fabric.backward(y, torch::tensor({1.0F, 2.0F}), /*retain_graph=*/true);
  CHECK(x.grad().equal(torch::tensor({2.0F, 4.0F})));
  fabric.backward(y, torch::ones({2}));
  CHECK(x.grad().equal(torch::tensor({4.0F, 6.0F})));
  CHECK_THROWS(fabric.backward(y, torch::ones({2})));  // the graph is gone
}

TEST_CASE("[issue-3.6] backward refuses a tensor without a history, and says why") {
  OnCpu fabric;
  auto model = fabric.setup(Net());
  CHECK_THROWS_AS(fabric.backward(model(input()).sum().detach()), Error);
  CHECK_THROWS_WITH(fabric.backward(model(input()).sum().detach()), ContainsSubstring("detached"));
  CHECK_THROWS_WITH(fabric.backward(torch::ones({1})), ContainsSubstring("requires_grad is false"));
  CHECK_THROWS_WITH(fabric.backward(at::Tensor()), ContainsSubstring("undefined"));
  const torch::NoGradGuard no_grad;
  CHECK_THROWS_WITH(fabric.backward(model(input()).sum()), ContainsSubstring("NoGradGuard"));
}

TEST_CASE("[issue-3.6] to_device takes trees and modules, init_module makes them in place") {
  OnCpu fabric;
  CHECK(fabric.device() == at::Device(at::kCPU));
  const auto tree = fabric.to_device(std::pair{input(), std::string("kept")});
  CHECK(tree.first.equal(input()));
  CHECK(tree.second == "kept");
  Net net;
  CHECK(fabric.to_device(net).ptr() == net.ptr());
  CHECK(Fabric<Cpu, SingleDevice, F64>().init_module([] { return Net(); })->first->weight.scalar_type() == at::kDouble);
}

TEST_CASE("[issue-3.6] one process is a world of one: launch is optional and nothing is reduced") {
  OnCpu fabric;
  CHECK(fabric.world_size() == 1);
  CHECK(fabric.global_rank() == 0);
  CHECK(fabric.local_rank() == 0);
  CHECK(fabric.node_rank() == 0);
  CHECK(fabric.is_global_zero());
  fabric.barrier();
  CHECK(fabric.all_reduce(input()).equal(input()));
  CHECK(fabric.reduce(input(), ReduceOp::sum).equal(input()));
  CHECK(fabric.all_gather(input()).equal(input()));
  CHECK(fabric.broadcast(std::vector{input()})[0].equal(input()));
  CHECK(fabric.broadcast("text") == "text");
  CHECK(fabric.broadcast(1.5) == 1.5);
  CHECK_THROWS_WITH(fabric.all_reduce(torch::ones({1}, torch::kLong)), ContainsSubstring("mean"));
  CHECK(fabric.rank_zero_first([] { return 7; }) == 7);
  int calls = 0;
  fabric.rank_zero_first([&] { ++calls; });
  CHECK(calls == 1);
  auto model = fabric.setup(Net());
  {
    auto guard = fabric.no_backward_sync(model);
    fabric.backward(model(input()).sum());
  }
  CHECK(fabric.launch([](OnCpu& self, int x) { return self.world_size() + x; }, 1) == 2);
  CHECK_THROWS_WITH(fabric.launch(), ContainsSubstring("twice"));
}
