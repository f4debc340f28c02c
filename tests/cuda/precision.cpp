// SPDX-License-Identifier: Apache-2.0
//
// Every precision on a GPU, beside the same loop in 64 bits on the CPU.
#include <cmath>
#include <limits>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;

struct NetImpl : torch::nn::Module {
  torch::nn::Linear up{register_module("up", torch::nn::Linear(16, 64))};
  torch::nn::LayerNorm norm{register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({64})))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(64, 16))};
  at::Tensor forward(const at::Tensor& x) { return down(torch::gelu(norm(up(x)))); }
};
TORCH_MODULE(Net);

struct Trace {
  std::vector<double> losses;
  at::ScalarType weights{};
  at::Device device{at::kCPU};
};

/// Thirty steps of AdamW towards the cosine.
template <class A, class P>
Trace train() {
  Fabric<A, SingleDevice, P> fabric({.devices = 1});
  torch::manual_seed(5);
  Net net;
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.01).eps(1e-4)));
  Trace trace;
  for (int step = 0; step < 30; ++step) {
    torch::manual_seed(100 + static_cast<std::uint64_t>(step));
    const at::Tensor x = fabric.to_device(torch::randn({32, 16}));
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(model(x).to(at::kFloat), x.cos());
    fabric.backward(loss);
    fabric.clip_gradients(model, ClipNorm{1.0});
    optimizer.step();
    trace.losses.push_back(loss.item().toDouble());
  }
  trace.weights = net->up->weight.scalar_type();
  trace.device = net->up->weight.device();
  return trace;
}

const std::vector<double>& exact() {
  static const std::vector<double> losses = train<Cpu, F64>().losses;
  return losses;
}

template <class P>
void compare(at::ScalarType weights, double tolerance) {
  const Trace trace = train<Cuda, P>();
  REQUIRE(trace.device.is_cuda());
  REQUIRE(trace.weights == weights);
  REQUIRE(exact().back() < exact().front() / 2);
  double worst = 0;
  for (std::size_t i = 0; i < trace.losses.size(); ++i) {
    worst = std::max(worst, std::abs(trace.losses[i] / exact()[i] - 1));
  }
  CAPTURE(worst, trace.losses.back());
  REQUIRE(std::isfinite(worst));
  REQUIRE(worst < tolerance);
}

}  // namespace

TEST_CASE("[issue-5.1] 64-true and 32-true") {
  compare<F64>(at::kDouble, 1e-6);  // the losses are taken in 32 bits
  compare<F32>(at::kFloat, 1e-4);
}
TEST_CASE("[issue-5.1] the mixed precisions keep weights of 32 bits") {
  compare<BF16Mixed>(at::kFloat, 0.05);
  compare<F16Mixed>(at::kFloat, 0.02);
}
TEST_CASE("[issue-5.1] the true half precisions") {
  compare<BF16>(at::kBFloat16, 0.2);
  compare<F16>(at::kHalf, 0.1);
}

TEST_CASE("[issue-5.2] under 16-mixed an overflow skips the step and shrinks the factor") {
  Fabric<Cuda, SingleDevice, F16Mixed> fabric({.devices = 1});
  torch::manual_seed(1);
  torch::nn::Linear linear(4, 2);
  auto [model, optimizer] = fabric.setup(linear, optim::SGD(linear->parameters(), optim::SGDOptions(0.1)));
  const at::Tensor x = fabric.to_device(torch::ones({2, 4}));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    fabric.backward(model(x).mean() * 0.125);
    if (step == 1) linear->bias.mutable_grad().fill_(std::numeric_limits<float>::infinity());
    const at::Tensor before = linear->weight.detach().clone();
    REQUIRE(static_cast<bool>(optimizer.step()) == (step != 1));
    REQUIRE(linear->weight.detach().equal(before) == (step == 1));
  }
  REQUIRE(fabric.scaler().get_scale() == 32768);
}

TEST_CASE("[issue-3.4] autocast computes products in its dtype and reductions in 32 bits") {
  Fabric<Cuda, SingleDevice, BF16Mixed> fabric({.devices = 1});
  const at::Tensor a = fabric.to_device(torch::randn({8, 8}));
  const auto guard = fabric.autocast();
  REQUIRE(a.matmul(a).scalar_type() == at::kBFloat16);
  REQUIRE(a.matmul(a).softmax(-1).scalar_type() == at::kFloat);
}

TEST_CASE("[issue-3.6] init_module makes modules on the GPU, and random numbers follow the seed") {
  Fabric<Cuda, SingleDevice, BF16> fabric({.devices = 1});
  const auto made = [&] {
    seed_everything(9);
    auto net = fabric.init_module([] { return torch::nn::Linear(8, 8); });
    return net->weight.detach().clone();
  };
  const at::Tensor first = made();
  REQUIRE(first.is_cuda());
  REQUIRE(first.scalar_type() == at::kBFloat16);
  REQUIRE(first.equal(made()));
  seed_everything(9);
  const at::Tensor numbers = torch::rand({4}, fabric.device());
  seed_everything(9);
  REQUIRE(torch::rand({4}, fabric.device()).equal(numbers));
}
