// SPDX-License-Identifier: Apache-2.0
// labels: distributed precision
//
// [issue-5.5] FP8 on several processes: whose magnitudes make the scales.
#include "fabric/precision/transformer_engine.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using Fp8Ddp = Fabric<Cpu, Ddp, TransformerEngine<>>;

/// The scales of input, weight and gradient after a step in which rank r's inputs are 2^r and its loss is 2^r times as
/// large, on this rank and on rank 0.
std::pair<at::Tensor, at::Tensor> scales_after_a_step(Fp8Ddp& fabric) {
  torch::manual_seed(1);
  auto [model, optimizer] = [&] {
    torch::nn::Linear layer(32, 16);
    return fabric.setup(layer, torch::optim::SGD(layer->parameters(), 0.1));
  }();
  const double size = fabric.global_rank() + 1.0;
  fabric.backward(model(torch::full({4, 32}, size)).sum() * size);
  optimizer.step();
  const at::Tensor own = model->named_buffers()["fp8.scale"].clone();
  return {own, fabric.broadcast(own)};
}

}  // namespace

TEST_CASE("[issue-5.5] scales are made from the largest magnitudes of all ranks") {
  Fp8Ddp fabric({.devices = 2, .strategy = {.broadcast_buffers = false}});
  fabric.launch();
  const auto [own, first] = scales_after_a_step(fabric);
  CHECK(own.equal(first));
  CHECK(own[0].item<float>() == 448.0F / 2);
  CHECK(own[2].item<float>() == 57344.0F / 2);
  fabric.barrier();
}

TEST_CASE("[issue-5.5] or of each rank alone") {
  Fp8Ddp fabric(
      {.devices = 2, .strategy = {.broadcast_buffers = false}, .precision = {.recipe = {.reduce_amax = false}}});
  fabric.launch();
  const auto [own, first] = scales_after_a_step(fabric);
  const auto size = static_cast<float>(fabric.global_rank() + 1);
  CHECK(own[0].item<float>() == 448.0F / size);
  CHECK(own[2].item<float>() == 57344.0F / size);
  CHECK(first[0].item<float>() == 448.0F);
  fabric.barrier();
}

TEST_CASE("[issue-5.5] training on two ranks keeps the replicas equal") {
  Fp8Ddp fabric({.devices = 2, .precision = {.recipe = {.amax_history_len = 4}}});
  fabric.launch();
  torch::manual_seed(2);
  torch::nn::Sequential net(torch::nn::Linear(32, 32), torch::nn::GELU(), torch::nn::Linear(32, 16));
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.5));
  torch::manual_seed(10 + static_cast<std::uint64_t>(fabric.global_rank()));
  double first = 0;
  double last = 0;
  const at::Tensor x = torch::randn({32, 32});
  for (int step = 0; step < 30; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(model(x), x.narrow(1, 0, 16));
    fabric.backward(loss);
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
    if (step % 10 == 5 && fabric.is_global_zero()) {  // an evaluation on one rank waits for no other
      const torch::NoGradGuard no_grad;
      model(x);
    }
  }
  CHECK(last < 0.8 * first);
  for (const auto& tensors : {net->parameters(), net->buffers()}) {
    for (const at::Tensor& tensor : tensors) CHECK(tensor.detach().equal(fabric.broadcast(tensor.detach())));
  }
  fabric.barrier();
}
