// SPDX-License-Identifier: Apache-2.0
//
// The baseline: what one writes on LibTorch alone.

#include <memory>

#include <torch/torch.h>

#include "loops.hpp"

namespace bench {

Loop by_hand(const Size& size) {
  torch::manual_seed(0);
  torch::nn::Sequential model = make_mlp(size);
  const Batch batch = make_batch(size);
  auto optimizer = std::make_shared<torch::optim::SGD>(model->parameters(), learning_rate);
  return [model, batch, optimizer](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer->zero_grad();
      loss = torch::mse_loss(model->forward(batch.inputs), batch.targets);
      loss.backward();
      optimizer->step();
    }
    return loss.item<double>();
  };
}

}  // namespace bench
