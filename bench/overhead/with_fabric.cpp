// SPDX-License-Identifier: Apache-2.0

#include <memory>

#include <fabric/fabric.hpp>
#include <torch/torch.h>

#include "loops.hpp"

namespace bench {

Loop with_fabric(const Size& size) {
  using namespace fabric;
  auto fabric = std::make_shared<Fabric<Cpu, SingleDevice, F32>>();
  seed_everything(0);
  torch::nn::Sequential net = make_mlp(size);
  const Batch batch = make_batch(size);
  auto [model, optimizer] = fabric->setup(net, torch::optim::SGD(net->parameters(), learning_rate));
  return [fabric, model = model, batch, optimizer = optimizer](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer.zero_grad();
      loss = torch::mse_loss(model(batch.inputs), batch.targets);
      fabric->backward(loss);
      optimizer.step();
    }
    return loss.item<double>();
  };
}

}  // namespace bench
