// SPDX-License-Identifier: Apache-2.0
//
// What saves memory, on several ranks: recomputed blocks, and modules that are made without memory.
#include <cstdint>
#include <memory>
#include <vector>

#include "fabric/module/deferred_init.hpp"
#include "fabric/module/recompute.hpp"
#include "fabric/sharding.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;

int runs = 0;  ///< Of all blocks.

struct BlockImpl : torch::nn::Module {
  torch::nn::Linear in{register_module("in", torch::nn::Linear(8, 16))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(16))};
  torch::nn::Linear out{register_module("out", torch::nn::Linear(16, 8))};
  torch::nn::Dropout dropout{register_module("dropout", torch::nn::Dropout(0.3))};
  at::Tensor forward(const at::Tensor& x) {
    ++runs;
    return x + out(dropout(torch::gelu(norm(in(x)))));
  }
};
TORCH_MODULE(Block);

struct NetImpl : torch::nn::Module {
  torch::nn::ModuleList blocks;
  NetImpl() {
    for (int i = 0; i < 3; ++i) blocks->push_back(Block());
    register_module("blocks", blocks);
  }
  at::Tensor forward(at::Tensor x, bool skip_the_last) {
    for (std::size_t i = 0; i < (skip_the_last ? 2 : 3); ++i) x = recompute(*blocks->ptr<BlockImpl>(i), x);
    return recompute(*blocks->ptr<BlockImpl>(0), x);  // a second time
  }
};
TORCH_MODULE(Net);

/// Parameters and buffers after a few steps.
template <class F>
std::vector<at::Tensor> trained(F& fabric, ActivationCheckpointing setting, bool skip_the_last, bool accumulate) {
  const ActivationCheckpointingGuard guard(setting);
  torch::manual_seed(1);
  Net net;
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
  torch::manual_seed(70 + static_cast<std::uint64_t>(fabric.global_rank()));
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    for (const bool sync : {false, true}) {
      if (!sync && !accumulate) continue;
      const auto local = fabric.no_backward_sync(model, !sync);
      fabric.backward(model(torch::randn({4, 8}), skip_the_last).pow(2).mean());
    }
    optimizer.step();
  }
  std::vector<at::Tensor> all;
  const auto keep = [&] {
    for (const at::Tensor& parameter : net->parameters()) all.push_back(parameter.detach().clone());
  };
  const auto state = model.state();
  if constexpr (requires { state->with_full_parameters(keep); }) {
    state->with_full_parameters(keep);
  } else {
    keep();
  }
  for (const at::Tensor& buffer : net->buffers()) all.push_back(buffer);
  return all;
}

template <class F>
void check_same(F& fabric, bool skip_the_last, bool accumulate = true) {
  const auto plain = trained(fabric, ActivationCheckpointing::none(), skip_the_last, accumulate);
  const auto recomputed = trained(fabric, ActivationCheckpointing::marked(), skip_the_last, accumulate);
  const auto by_type = trained(fabric, ActivationCheckpointing::of<Block>(), skip_the_last, accumulate);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    REQUIRE(plain[i].equal(recomputed[i]));
    REQUIRE(plain[i].equal(by_type[i]));
    REQUIRE(same_on_all_ranks(fabric.world(), plain[i]));
  }
}

}  // namespace

TEST_CASE("[issue-8.8] Ddp: recomputed blocks train to the same bits, with accumulation and autocast") {
  on_ranks<F32>([](auto& fabric) { check_same(fabric, false); });
  on_ranks<BF16Mixed>([](auto& fabric) { check_same(fabric, false); });
}

TEST_CASE("[issue-8.8] sharded: blocks are gathered again to be recomputed, and train to the same bits") {
  const auto units = Units::by_type<Block>();
  on_ranks<F32, DeepSpeed<2>>({.units = units}, [](auto& fabric) { check_same(fabric, false); });
  for (const int limit : {1, 2}) {
    on_ranks<F32, DeepSpeed<3>>({.units = units, .units_in_flight = limit},
                                [](auto& fabric) { check_same(fabric, false); });
  }
  on_ranks<BF16Mixed, ModelParallel>({.units = units}, [](auto& fabric) { check_same(fabric, false); });
}

TEST_CASE("[issue-8.8] sharded: as an option by the blocks' type") {
  std::vector<at::Tensor> expected;
  on_ranks<F32, DeepSpeed<3>>({.units = Units::by_type<Block>()}, [&](auto& fabric) {
    expected = trained(fabric, ActivationCheckpointing::none(), false, true);
  });
  const ShardingOptions options{.units = Units::by_type<Block>(),
                                .activation_checkpointing = ActivationCheckpointing::of<Block>()};
  on_ranks<F32, DeepSpeed<3>>(options, [&](auto& fabric) {
    const int before = runs;
    const auto ours = trained(fabric, ActivationCheckpointing::none(), false, true);
    REQUIRE(runs - before == 2 * 4 * 2 * 4);  // each of four calls twice, in four steps of two batches
    for (std::size_t i = 0; i < ours.size(); ++i) REQUIRE(ours[i].equal(expected[i]));
  });
}

TEST_CASE(
    "[issue-8.8] Ddp that looks for unused parameters, or whose graph is static, sees through recomputed blocks") {
  on_ranks<F32, DdpFindUnusedParameters>([](auto& fabric) { check_same(fabric, true); });
  on_ranks<F32>(DdpOptions{.static_graph = true},
                [](auto& fabric) { check_same(fabric, false, /*accumulate=*/false); });
}

TEST_CASE("[issue-8.6] Ddp: a module that was made without memory is rank 0's on all ranks after setup") {
  on_ranks<F32>([](auto& fabric) {
    torch::manual_seed(20);
    const Net of_rank_0;
    torch::manual_seed(20 + static_cast<std::uint64_t>(fabric.global_rank()));
    auto net = fabric.init_module([] { return Net(); }, {.empty = true});
    REQUIRE(net->parameters()[0].is_meta());
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    const auto expected = of_rank_0->named_parameters();
    for (const auto& parameter : net->named_parameters()) {
      REQUIRE(parameter.value().equal(expected[parameter.key()]));
    }
    fabric.backward(model(torch::randn({4, 8}), false).pow(2).mean());
    optimizer.step();
    for (const at::Tensor& parameter : net->parameters()) REQUIRE(same_on_all_ranks(fabric.world(), parameter));
  });
}
