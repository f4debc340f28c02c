// SPDX-License-Identifier: Apache-2.0
//
// fabric::optim under Ddp: two ranks train as one process does on the rows of both.
#include <memory>
#include <utility>

#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;

torch::nn::Linear make_linear() {
  torch::manual_seed(21);
  return torch::nn::Linear(4, 2);
}

/// All rows of a step, of which each rank takes its share.
at::Tensor rows_of(int step) {
  torch::manual_seed(70 + step);
  return torch::randn({8, 4});
}

/// Three steps with clipping on all rows, on one process, by torch::optim.
template <class O, class Options>
at::Tensor alone(const Options& options) {
  auto linear = make_linear();
  O optimizer(linear->parameters(), options);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    linear->forward(rows_of(step)).pow(2).mean().backward();
    torch::nn::utils::clip_grad_norm_(linear->parameters(), 0.5);
    optimizer.step();
  }
  return linear->weight.detach();
}

/// The same on the ranks, by what `setup` makes of `make(parameters)`.
template <class F, class Make>
at::Tensor together(F& fabric, Make&& make) {
  auto linear = make_linear();
  auto&& own = make(linear->parameters());
  auto [model, optimizer] = fabric.setup(linear, std::forward<decltype(own)>(own));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    fabric.backward(model(rows_of(step).chunk(fabric.world_size())[fabric.global_rank()]).pow(2).mean());
    fabric.clip_gradients(optimizer, ClipNorm{0.5});
    optimizer.step();
  }
  REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
  return linear->weight.detach();
}

}  // namespace

TEST_CASE("[issue-5.3] fabric::optim trains under Ddp, given by value, by reference and by pointer") {
  on_ranks<F32>([](auto& fabric) {
    const auto adamw = optim::AdamWOptions(0.05).weight_decay(0.1);
    const at::Tensor expected = alone<torch::optim::AdamW>(adamw);
    REQUIRE_FALSE(expected.allclose(make_linear()->weight, 1e-2, 1e-2));
    const auto by_value = [&](auto parameters) { return optim::AdamW(parameters, adamw); };
    const auto by_pointer = [&](auto parameters) { return std::make_shared<optim::AdamW>(parameters, adamw); };
    std::unique_ptr<optim::AdamW> owner;
    const auto by_reference = [&](auto parameters) -> optim::AdamW& {
      return *(owner = std::make_unique<optim::AdamW>(parameters, adamw));
    };
    REQUIRE(together(fabric, by_value).allclose(expected, 1e-5, 1e-6));
    REQUIRE(together(fabric, by_pointer).allclose(expected, 1e-5, 1e-6));
    REQUIRE(together(fabric, by_reference).allclose(expected, 1e-5, 1e-6));

    const auto sgd = optim::SGDOptions(0.1).momentum(0.9).nesterov(true);
    const auto by_sgd = [&](auto parameters) { return optim::SGD(parameters, sgd); };
    REQUIRE(together(fabric, by_sgd).allclose(alone<torch::optim::SGD>(sgd), 1e-5, 1e-6));
  });
}
