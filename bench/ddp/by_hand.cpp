// SPDX-License-Identifier: Apache-2.0
//
// The baselines: data-parallel training as one writes it on LibTorch alone.

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include <torch/torch.h>

#include "loops.hpp"

namespace bench {
namespace {

void average(const Group& group, const at::Tensor& tensor) {
  std::vector<at::Tensor> tensors{tensor};
  group->allreduce(tensors)->wait();
  tensor.div_(group->getSize());
}

/// A loop with `average_all(parameters)` between backward and step.
template <class AverageAll>
Loop make_loop(const Size& size, const Group& group, AverageAll average_all) {
  torch::manual_seed(0);  // so that all ranks begin alike
  torch::nn::Sequential model = make_mlp(size);
  torch::manual_seed(1 + group->getRank());
  const Batch batch = make_batch(size);
  auto optimizer = std::make_shared<torch::optim::SGD>(model->parameters(), learning_rate);
  return [=, parameters = model->parameters()](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer->zero_grad();
      loss = torch::mse_loss(model->forward(batch.inputs), batch.targets);
      loss.backward();
      average_all(parameters);
      optimizer->step();
    }
    return loss.item<double>();
  };
}

}  // namespace

Loop by_hand_each(const Size& size, const Group& group) {
  return make_loop(size, group, [group](const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters) average(group, parameter.grad());
  });
}

Loop by_hand_flat(const Size& size, const Group& group) {
  return make_loop(size, group, [group](const std::vector<at::Tensor>& parameters) {
    std::vector<at::Tensor> pieces;
    pieces.reserve(parameters.size());
    for (const at::Tensor& parameter : parameters) pieces.push_back(parameter.grad().flatten());
    const at::Tensor flat = at::cat(pieces);
    average(group, flat);
    std::int64_t begin = 0;
    for (const at::Tensor& parameter : parameters) {
      parameter.mutable_grad().copy_(flat.narrow(0, begin, parameter.numel()).view(parameter.sizes()));
      begin += parameter.numel();
    }
  });
}

}  // namespace bench
