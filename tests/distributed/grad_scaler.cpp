// SPDX-License-Identifier: Apache-2.0
// labels: distributed precision
//
// Ranks agree on which steps are skipped, also where only one of them saw an overflow.
#include <limits>
#include <vector>

#include "support/f16_mixed_on_cpu.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::F16MixedOnCpu;
using tests::on_ranks;
using tests::same_on_all_ranks;

constexpr float infinity = std::numeric_limits<float>::infinity();

torch::nn::Linear make_linear() {
  torch::manual_seed(3);
  return torch::nn::Linear(4, 2);
}

}  // namespace

TEST_CASE("[issue-5.2] an overflow that one rank alone sees skips the step on all, and shrinks everyone's factor") {
  on_ranks<F16MixedOnCpu>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    const auto x = torch::ones({2, 4});
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(x).mean());
      // As with gradients of which each rank holds its own part.
      if (step % 2 == 1 && fabric.global_rank() == 1) linear->bias.mutable_grad()[0].fill_(infinity);
      const auto before = linear->weight.detach().clone();
      if (step == 3) fabric.clip_gradients(model, ClipValue{.max_value = 1e30});
      const bool stepped = static_cast<bool>(optimizer.step());
      REQUIRE(stepped == (step % 2 == 0));
      REQUIRE(linear->weight.detach().equal(before) == !stepped);
      REQUIRE(fabric.scaler().get_scale() == (step < 1 ? 65536 : step < 3 ? 32768 : 16384));
    }
  });
}

TEST_CASE("[issue-5.2] an overflow in a rank's own rows reaches all by the averaged gradient") {
  on_ranks<F16MixedOnCpu>([](auto& fabric) {
    auto linear = make_linear();
    auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      auto x = torch::full({2, 4}, static_cast<float>(fabric.global_rank() + 1));
      if (step == 1 && fabric.global_rank() == 0) x[0][0] = infinity;
      fabric.backward(model(x).mean() * 0.125);  // half floats end at 65504
      REQUIRE(static_cast<bool>(optimizer.step()) == (step != 1));
      REQUIRE(same_on_all_ranks(fabric.world(), linear->weight));
    }
    REQUIRE(fabric.scaler().get_scale() == 32768);
  });
}
