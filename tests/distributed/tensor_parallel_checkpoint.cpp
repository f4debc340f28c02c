// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint distributed sharding
// ranks: 4
//
// Checkpoints of layers that ModelParallel has divided: they are those of the whole layers, and training goes on under
// another strategy, or another division, as if nothing had been.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/sharding.hpp"
#include "support/ranks.hpp"
#include "support/sharded_policies.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::Sharded;
namespace fs = std::filesystem;

struct MlpImpl : torch::nn::Module {
  torch::nn::LayerNorm norm{register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})))};
  torch::nn::Linear up{register_module("up", torch::nn::Linear(8, 24))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(24, 8))};
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::tanh(up(norm(x)))); }
};
TORCH_MODULE(Mlp);

struct NetImpl : torch::nn::Module {
  torch::nn::Embedding words{register_module("words", torch::nn::Embedding(12, 8))};
  torch::nn::ModuleList blocks{register_module("blocks", torch::nn::ModuleList(Mlp(), Mlp()))};
  at::Tensor forward(const at::Tensor& text) {
    at::Tensor x = words(text);
    for (const auto& block : *blocks) x = block->as<MlpImpl>()->forward(x);
    return x;
  }
};
TORCH_MODULE(Net);

const TensorParallelPlan plan{{"words", Rowwise{}}, {"blocks.*.up", Colwise{}}, {"blocks.*.down", Rowwise{}}};

ShardingOptions divided(int size) {
  return {.tensor_parallel = plan, .tensor_parallel_size = size, .units = Units::by_type<Mlp>()};
}

/// Goes on from `from`, if there is one, for two steps, and saves to `to`. Returns the whole parameters.
template <class F>
std::vector<at::Tensor> train(F& fabric, const std::string& from, const std::string& to) {
  const tests::DoubleOutputs outputs;
  torch::manual_seed(from.empty() ? 3 : 4);
  Net net;
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.01).eps(1e-4)));
  std::int64_t step = 0;
  const State state{{"model", model}, {"optimizer", optimizer}, {"step", step}};
  const bool is_file = fs::path(from).extension() == ".pt";
  if (is_file) fabric.load(from, state);
  if (!is_file && !from.empty()) fabric.template load<DistributedCheckpoint>(from, state);
  for (const std::int64_t end = step + 2; step < end; ++step) {
    torch::manual_seed(100 + static_cast<std::uint64_t>(step));  // the same data on all ranks
    const at::Tensor text = torch::randint(12, {4, 5}, torch::kLong);
    optimizer.zero_grad();
    fabric.backward(model(text).pow(2).mean());
    optimizer.step();
  }
  if (!to.empty()) {
    fs::path(to).extension() == ".pt" ? fabric.save(to, state) : fabric.template save<DistributedCheckpoint>(to, state);
  }
  std::vector<at::Tensor> whole;
  const auto keep = [&] {
    for (const at::Tensor& parameter : net->parameters()) {
      const auto slice = tensor_slice_of(parameter);
      whole.push_back(slice ? full_tensor(*slice) : parameter.detach().clone());
    }
  };
  const auto full_state = model.state();
  if constexpr (requires { full_state->with_full_parameters(keep); }) {
    full_state->with_full_parameters(keep);
  } else {
    keep();
  }
  return whole;
}

double difference(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    REQUIRE(a[i].sizes() == b[i].sizes());
    largest = std::max(largest, (a[i] - b[i]).abs().max().item<double>());
  }
  return largest;
}

}  // namespace

TEST_CASE("[issue-8.7] divided layers go on under Ddp, and Ddp's divided, from a folder and from one file") {
  const fs::path folder = fs::temp_directory_path() / ("fabric-slices-" + std::to_string(tests::ranks()));
  for (const std::string& end : {std::string(), std::string(".pt")}) {
    INFO("'" << end << "'");
    const auto place = [&](const char* name) { return folder.string() + name + end; };
    std::vector<at::Tensor> two;
    std::vector<at::Tensor> four;
    on_ranks<F64>([&](auto& fabric) {
      two = train(fabric, "", place("-ddp"));
      four = train(fabric, place("-ddp"), "");
    });
    on_ranks<F64, Sharded>(divided(2), [&](auto& fabric) {
      CHECK(difference(train(fabric, "", place("-divided")), two) < 1e-12);
      CHECK(difference(train(fabric, place("-divided"), ""), four) < 1e-12);
      CHECK(difference(train(fabric, place("-ddp"), ""), four) < 1e-12);
    });
    on_ranks<F64>([&](auto& fabric) { CHECK(difference(train(fabric, place("-divided"), ""), four) < 1e-12); });
    on_ranks<F64, Sharded>([&](auto& fabric) {  // sharded, not divided
      CHECK(difference(train(fabric, place("-divided"), ""), four) < 1e-12);
    });
    on_ranks<F64, Sharded>(divided(tests::ranks()), [&](auto& fabric) {
      CHECK(difference(train(fabric, place("-divided"), ""), four) < 1e-12);
      fabric.barrier();
      if (fabric.is_global_zero()) {
        for (const char* name : {"-ddp", "-divided"}) fs::remove_all(place(name));
      }
    });
  }
}

TEST_CASE("[issue-8.7] with two slices on two places each, on four ranks") { tests::again_on_ranks(4); }
