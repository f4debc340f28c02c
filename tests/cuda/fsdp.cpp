// SPDX-License-Identifier: Apache-2.0
//
// Fsdp and the other policies that shard, as they are named, on two ranks with GPUs: they train as Ddp does, hold less
// memory, and their checkpoints go on elsewhere.
// ranks: 2
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <c10/cuda/CUDACachingAllocator.h>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/sharding.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t width)
      : norm(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))),
        up(register_module("up", torch::nn::Linear(width, 4 * width))),
        down(register_module("down", torch::nn::Linear(4 * width, width))) {}
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::gelu(up(norm(x)))); }

  torch::nn::LayerNorm norm;
  torch::nn::Linear up, down;
};
TORCH_MODULE(Block);

struct NetImpl : torch::nn::Module {
  explicit NetImpl(std::int64_t width = 32) {
    for (int i = 0; i < 4; ++i) blocks->push_back(Block(width));
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return x;
  }
  torch::nn::ModuleList blocks{register_module("blocks", torch::nn::ModuleList())};
};
TORCH_MODULE(Net);

struct Trained {
  std::vector<double> losses;
  std::vector<at::Tensor> parameters;
};

template <class F>
Trained train(F& fabric, bool same_data = false) {
  torch::manual_seed(fabric.is_global_zero() ? 7 : 8);
  Net net;
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.01).eps(1e-4)));
  Trained trained;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    for (int part = 0; part < 2; ++part) {
      torch::manual_seed(static_cast<std::uint64_t>(100 * step + 10 * part + (same_data ? 0 : fabric.global_rank())));
      const at::Tensor x = fabric.to_device(torch::randn({8, 32}));
      const auto guard = fabric.no_backward_sync(model, part == 0);
      const at::Tensor loss = torch::mse_loss(model(x).to(at::kFloat), x.cos()) / 2;
      fabric.backward(loss);
      trained.losses.push_back(fabric.all_reduce(loss.detach()).template item<double>());
    }
    fabric.clip_gradients(model, ClipNorm{1.0});
    optimizer.step();
  }
  const auto keep = [&] {
    for (const at::Tensor& parameter : net->parameters()) {
      const auto slice = tensor_slice_of(parameter);
      trained.parameters.push_back((slice ? full_tensor(*slice) : parameter.detach().clone()).cpu().to(at::kDouble));
    }
  };
  if constexpr (requires { model.state()->with_full_parameters(keep); }) {
    model.state()->with_full_parameters(keep);
  } else {
    keep();
  }
  for (const auto& parameter : trained.parameters) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
  return trained;
}

void require_same(const std::string& what, const Trained& ours, const Trained& expected, double tolerance) {
  REQUIRE(ours.losses.size() == expected.losses.size());
  REQUIRE(ours.parameters.size() == expected.parameters.size());
  double losses = 0;
  double parameters = 0;
  for (std::size_t i = 0; i < ours.losses.size(); ++i) {
    losses = std::max(losses, std::abs(ours.losses[i] / expected.losses[i] - 1));
  }
  for (std::size_t i = 0; i < ours.parameters.size(); ++i) {
    REQUIRE(ours.parameters[i].isfinite().all().item<bool>());
    const double difference = (ours.parameters[i] - expected.parameters[i]).abs().max().item<double>();
    parameters = std::max(parameters, difference / expected.parameters[i].abs().max().item<double>());
  }
  INFO(what << ": losses " << losses << ", parameters " << parameters);
  CHECK(losses < tolerance);
  CHECK(parameters < 20 * tolerance);
}

template <class P>
Trained by_ddp(bool same_data = false) {
  Trained trained;
  on_ranks<P>([&](auto& fabric) { trained = train(fabric, same_data); });
  return trained;
}
template <class P, class S>
void compare(const std::string& what, const Trained& expected, double tolerance, ShardingOptions options = {}) {
  options.units = Units::by_type<BlockImpl>();
  on_ranks<P, S>(options, [&](auto& fabric) { require_same(what, train(fabric), expected, tolerance); });
}

template <class P>
void compare_all(double tolerance) {
  const Trained expected = by_ddp<P>();
  compare<P, Fsdp>("full", expected, tolerance);
  compare<P, Fsdp>("grad-op", expected, tolerance, {.sharding = Sharding::grad_op});
  compare<P, Fsdp>("none", expected, tolerance, {.sharding = Sharding::none});
  compare<P, Fsdp>("hybrid", expected, tolerance, {.sharding = Sharding::hybrid, .shard_group_size = 2});
  compare<P, FsdpCpuOffload>("full, offloaded", expected, tolerance);
  compare<P, DeepSpeed<1>>("stage 1", expected, tolerance);
  compare<P, DeepSpeed<2>>("stage 2", expected, tolerance);
  compare<P, DeepSpeed<3>>("stage 3", expected, tolerance);
  compare<P, DeepSpeed<2, Offload::cpu>>("stage 2, offloaded", expected, tolerance);
  compare<P, DeepSpeed<3, Offload::cpu>>("stage 3, offloaded", expected, tolerance);
  compare<P, DeepSpeed<3, Offload::nvme>>("stage 3, in files", expected, tolerance, {.nvme_path = "/tmp"});
  if constexpr (!std::same_as<P, F16Mixed>) compare<P, ModelParallel>("model parallel", expected, tolerance);
}

}  // namespace

TEST_CASE("[issue-8.1] in 32 bits, every policy and mode trains as Ddp does") { compare_all<F32>(2e-5); }
TEST_CASE("[issue-8.5] in bf16-mixed, within the dtype") { compare_all<BF16Mixed>(0.03); }
TEST_CASE("[issue-8.5] in 16-mixed, within the dtype, and all ranks agree on the factor") {
  compare_all<F16Mixed>(0.02);
}

TEST_CASE("[issue-8.1] tensor parallelism by a plan") {
  const Trained expected = by_ddp<F32>(/*same_data=*/true);
  const TensorParallelPlan plan{{"blocks.*.up", Colwise{}}, {"blocks.*.down", Rowwise{}}};
  on_ranks<F32, ModelParallel>(
      {.tensor_parallel = plan, .tensor_parallel_size = 2, .units = Units::by_type<BlockImpl>()},
      [&](auto& fabric) { require_same("divided", train(fabric, /*same_data=*/true), expected, 2e-5); });
}

namespace {

/// The most of the GPU's memory that one step took, in bytes, beyond what was there before.
template <class S>
std::int64_t peak(ShardingOptions options = {}) {
  std::int64_t bytes = 0;
  const auto measure = [&](auto& fabric) {
    auto& allocator = *c10::cuda::CUDACachingAllocator::get();
    const auto device = fabric.device().index();
    const auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const std::int64_t before = allocator.getDeviceStats(device).allocated_bytes[all].current;
    allocator.resetPeakStats(device);
    auto net = fabric.init_module([] { return Net(512); }, {.empty = true});
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(1e-3)));
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      const at::Tensor x = torch::randn({4, 512}, fabric.device());
      fabric.backward(model(x).to(at::kFloat).pow(2).mean());
      optimizer.step();
    }
    bytes = allocator.getDeviceStats(device).allocated_bytes[all].peak - before;
  };
  if constexpr (std::same_as<S, Ddp>) {
    on_ranks<BF16Mixed, S>(measure);
  } else {
    options.units = Units::by_type<BlockImpl>();
    on_ranks<BF16Mixed, S>(options, measure);
  }
  return bytes;
}

}  // namespace

TEST_CASE("[issue-8.4] each stage takes less of the GPU's memory, and offloading less again") {
  const std::int64_t parameters = 4L * (2 * 4 * 512 * 512 + 5 * 512 + 2 * 512);
  const auto ddp = peak<Ddp>();
  const auto one = peak<DeepSpeed<1>>();
  const auto two = peak<DeepSpeed<2>>();
  const auto three = peak<DeepSpeed<3>>();
  const auto fsdp = peak<Fsdp>();
  const auto offloaded = peak<DeepSpeed<3, Offload::cpu>>();
  CAPTURE(parameters, ddp, one, two, three, fsdp, offloaded);
  WARN("bytes per parameter: Ddp " << ddp / parameters << ", stage 1 " << one / parameters << ", 2 " << two / parameters
                                   << ", 3 " << three / parameters << ", Fsdp " << fsdp / parameters << ", 3 offloaded "
                                   << offloaded / parameters);
  CHECK(one < ddp);
  CHECK(two < one);
  CHECK(three < two);
  CHECK(fsdp < two);
  CHECK(offloaded < three);
}

TEST_CASE("[issue-8.7] a sharded checkpoint of two GPUs goes on in one process on the CPU") {
  const auto folder = std::filesystem::temp_directory_path() / "fabric-cuda-checkpoint";
  std::vector<at::Tensor> saved;
  bool first = false;
  on_ranks<F32, Fsdp>({.units = Units::by_type<BlockImpl>()}, [&](auto& fabric) {
    first = fabric.is_global_zero();
    torch::manual_seed(7);
    Net net;
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.01)));
    optimizer.zero_grad();
    fabric.backward(model(fabric.to_device(torch::ones({2, 32}))).pow(2).mean());
    optimizer.step();
    const State state{{"model", model}, {"optimizer", optimizer}};
    fabric.template save<DistributedCheckpoint>(folder.string(), state);
    model.state()->with_full_parameters([&] {
      for (const at::Tensor& parameter : net->parameters()) saved.push_back(parameter.detach().cpu());
    });
    fabric.barrier();
  });
  if (!first) return;
  Fabric<Cpu, SingleDevice, F32> alone;
  Net net;
  auto [model, optimizer] = alone.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.01)));
  const State state{{"model", model}, {"optimizer", optimizer}};
  alone.load<DistributedCheckpoint>(folder.string(), state);
  const auto parameters = net->parameters();
  for (std::size_t i = 0; i < parameters.size(); ++i) REQUIRE(parameters[i].equal(saved[i]));
  std::filesystem::remove_all(folder);
}
