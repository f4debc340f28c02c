// SPDX-License-Identifier: Apache-2.0

#include <fabric/fabric.hpp>
#include <torch/torch.h>

using namespace fabric;

int main() {
  Fabric<Cpu, Ddp, BF16Mixed> fabric({.devices = 2});
  fabric.launch();  // starts the second process; from here on there are two

  torch::nn::Linear net(8, 1);
  torch::optim::SGD sgd(net->parameters(), 0.1);
  auto [model, optimizer] = fabric.setup(net, sgd);

  torch::manual_seed(fabric.global_rank());
  for (int step = 0; step < 20; ++step) {
    const auto x = torch::randn({32, 8});
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(model(x), x.sum(1, true));
    fabric.backward(loss);  // gradients are averaged over both while they are computed
    optimizer.step();
    fabric.print("step ", step, " loss ", loss.item<float>());
  }
}
