// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include <fabric/separate.hpp>
#include <torch/torch.h>

#include "menu.hpp"
#include "task.hpp"

template <class F>
Result measure(const Settings& settings) {
  typename F::Options options;
  if constexpr (fabric::is_parallel(fabric::PoliciesOf<F>::combination.strategy)) options.devices = settings.devices;
  F fabric(std::move(options));
  fabric.launch();
  at::set_num_threads(1);
  fabric.seed_everything(0);
  auto net = fabric.init_module([&] { return std::make_shared<Mlp>(settings); });
  const Batch batch = make_batch(settings);
  auto [model, optimizer] = fabric.setup(net, make_optimizer(*net));

  at::Tensor loss;
  const auto train = [&, &model = model, &optimizer = optimizer](int steps) {
    for (int step = 0; step < steps; ++step) {
      optimizer.zero_grad();
      loss = torch::mse_loss(model(batch.inputs), batch.targets);
      fabric.backward(loss);
      optimizer.step();
    }
  };
  constexpr int warm_up = 10;
  train(warm_up);
  fabric.barrier();
  const auto start = std::chrono::steady_clock::now();
  train(settings.steps);
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  fabric.barrier();
  return {.reports = fabric.is_global_zero(),
          .processes = fabric.world_size(),
          .microseconds = took.count() / settings.steps,
          .loss = loss.item<double>()};
}
