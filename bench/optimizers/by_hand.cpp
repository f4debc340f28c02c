// SPDX-License-Identifier: Apache-2.0
//
// The baseline: AdamW and clipping as one writes them on LibTorch alone.

#include <memory>

#include <torch/torch.h>

#include "loops.hpp"

namespace bench {
namespace {

template <class AnySize>
Loop make_loop(const AnySize& size) {
  torch::manual_seed(0);
  auto model = make_net(size);
  const Batch batch = make_data(size);
  const auto parameters = model->parameters();
  auto optimizer = std::make_shared<torch::optim::AdamW>(parameters, torch::optim::AdamWOptions(adamw_lr));
  return [=](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer->zero_grad();
      loss = loss_of(size, model->forward(batch.inputs), batch.targets);
      loss.backward();
      torch::nn::utils::clip_grad_norm_(parameters, max_norm);
      optimizer->step();
    }
    return loss.item<double>();
  };
}

}  // namespace

Loop by_hand(const Size& size) { return make_loop(size); }
Loop by_hand(const GptSize& size) { return make_loop(size); }

}  // namespace bench
