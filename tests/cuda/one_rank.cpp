// SPDX-License-Identifier: Apache-2.0
//
// One process with one GPU whose memory is too small: what it does not need waits in the host's memory.
#include <vector>

#include <c10/cuda/CUDACachingAllocator.h>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;

struct Result {
  std::vector<double> losses;
  std::int64_t bytes = 0;  ///< Of the GPU that are taken between steps.
};

template <class S>
Result train() {
  typename Fabric<Cuda, S, F32>::Options given{.devices = 1};
  if constexpr (!std::same_as<S, SingleDevice>) given.strategy.units = Units::by_type<torch::nn::LinearImpl>();
  Fabric<Cuda, S, F32> fabric(std::move(given));
  fabric.launch();
  (void)torch::zeros({1}, fabric.device());  // which begins CUDA
  auto& allocator = *c10::cuda::CUDACachingAllocator::get();
  const auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const auto taken = [&] { return allocator.getDeviceStats(fabric.device().index()).allocated_bytes[all].current; };
  const std::int64_t before = taken();
  torch::manual_seed(7);
  torch::nn::Sequential net(torch::nn::Linear(256, 1024), torch::nn::GELU(), torch::nn::Linear(1024, 1024),
                            torch::nn::GELU(), torch::nn::Linear(1024, 256));
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(1e-3)));
  Result result;
  for (int step = 0; step < 20; ++step) {
    torch::manual_seed(100 + static_cast<std::uint64_t>(step));
    const at::Tensor x = fabric.to_device(torch::randn({16, 256}));
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(model(x), x.cos());
    fabric.backward(loss);
    optimizer.step();
    result.losses.push_back(loss.template item<double>());
  }
  optimizer.zero_grad();
  result.bytes = taken() - before;
  return result;
}

}  // namespace

TEST_CASE(
    "[issue-8.4] parameters and optimizer state on the host: the same losses with a fraction of the GPU's memory") {
  const Result whole = train<SingleDevice>();
  const Result offloaded = train<DeepSpeed<3, Offload::cpu>>();
  const Result fsdp = train<FsdpCpuOffload>();
  for (std::size_t i = 0; i < whole.losses.size(); ++i) {
    CHECK(offloaded.losses[i] == Approx(whole.losses[i]).epsilon(1e-4));
    CHECK(fsdp.losses[i] == Approx(whole.losses[i]).epsilon(1e-4));
  }
  CAPTURE(whole.bytes, offloaded.bytes, fsdp.bytes);
  CHECK(offloaded.bytes < whole.bytes);
  CHECK(fsdp.bytes < whole.bytes);
}
