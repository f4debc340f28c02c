// SPDX-License-Identifier: Apache-2.0

#include <memory>

#include <fabric/fabric.hpp>
#include <torch/torch.h>

#include "loops.hpp"

namespace bench {
namespace {

template <class AnySize>
Loop make_loop(const AnySize& size) {
  using namespace fabric;
  auto fabric = std::make_shared<Fabric<Cpu, SingleDevice, F32>>();
  seed_everything(0);
  auto net = make_net(size);
  const Batch batch = make_data(size);
  auto [model, optimizer] = fabric->setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(adamw_lr)));
  return [=, model = model, optimizer = optimizer](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer.zero_grad();
      loss = loss_of(size, model(batch.inputs), batch.targets);
      fabric->backward(loss);
      fabric->clip_gradients(optimizer, ClipNorm{max_norm});
      optimizer.step();
    }
    return loss.item<double>();
  };
}

}  // namespace

Loop with_fabric(const Size& size) { return make_loop(size); }
Loop with_fabric(const GptSize& size) { return make_loop(size); }

}  // namespace bench
