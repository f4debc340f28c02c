// SPDX-License-Identifier: Apache-2.0
//
// Sharded training is Ddp's: the same parameters, whatever is sharded, on 2 and 4 processes.
// labels: distributed sharding
// ranks: 4
// timeout: 300
// also: cuda
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#include "support/ranks.hpp"
#include "support/sharded_policies.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;
using tests::Sharded;
using tests::Zero;

/// Pre-norm attention and a two-layer perceptron.
struct BlockImpl : torch::nn::Module {
  static constexpr std::int64_t width = 16;
  torch::nn::LayerNorm norm1{register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))};
  torch::nn::Linear attention{register_module("attention", torch::nn::Linear(width, 3 * width))};
  torch::nn::Linear out{register_module("out", torch::nn::Linear(width, width))};
  torch::nn::LayerNorm norm2{register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))};
  torch::nn::Linear up{register_module("up", torch::nn::Linear(width, 4 * width))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(4 * width, width))};

  at::Tensor forward(at::Tensor x) {
    const auto parts = attention(norm1(x)).view({x.size(0), x.size(1), 3, 2, width / 2}).permute({2, 0, 3, 1, 4});
    const auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, /*is_causal=*/true);
    x = x + out(mixed.transpose(1, 2).reshape(x.sizes()));
    return x + down(torch::gelu(up(norm2(x))));
  }
};
TORCH_MODULE(Block);

/// With the embedding's weights in the head too.
struct TransformerImpl : torch::nn::Module {
  static constexpr std::int64_t words = 19;
  torch::nn::Embedding embedding{register_module("embedding", torch::nn::Embedding(words, BlockImpl::width))};
  torch::nn::ModuleList blocks{register_module("blocks", torch::nn::ModuleList())};
  torch::nn::LayerNorm norm{
      register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({BlockImpl::width})))};

  TransformerImpl() {
    for (int i = 0; i < 4; ++i) blocks->push_back(Block());
  }
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embedding(tokens);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return at::linear(norm(x), embedding->weight);
  }
  static std::pair<at::Tensor, at::Tensor> batch(int rows) {
    return {torch::randint(words, {rows, 5}, torch::kLong), torch::randint(words, {rows, 5}, torch::kLong)};
  }
  static at::Tensor loss(const at::Tensor& output, const at::Tensor& target) {
    return torch::cross_entropy_loss(output.flatten(0, 1), target.flatten());
  }
};
TORCH_MODULE(Transformer);

struct CnnImpl : torch::nn::Module {
  torch::nn::Conv2d conv1{register_module("conv1", torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 6, 3).padding(1)))};
  torch::nn::BatchNorm2d norm1{register_module("norm1", torch::nn::BatchNorm2d(6))};
  torch::nn::Conv2d conv2{register_module("conv2", torch::nn::Conv2d(torch::nn::Conv2dOptions(6, 8, 3).stride(2)))};
  torch::nn::BatchNorm2d norm2{register_module("norm2", torch::nn::BatchNorm2d(8))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(8 * 9, 5))};

  at::Tensor forward(at::Tensor x) {
    x = torch::relu(norm1(conv1(x)));
    x = torch::relu(norm2(conv2(x)));
    return head(x.flatten(1));
  }
  static std::pair<at::Tensor, at::Tensor> batch(int rows) {
    return {torch::randn({rows, 1, 8, 8}), torch::randint(5, {rows}, torch::kLong)};
  }
  static at::Tensor loss(const at::Tensor& output, const at::Tensor& target) {
    return torch::cross_entropy_loss(output, target);
  }
};
TORCH_MODULE(Cnn);

struct MlpImpl : torch::nn::Module {
  torch::nn::LayerNorm norm{register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})))};
  torch::nn::Linear up{register_module("up", torch::nn::Linear(8, 24))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(24, 8))};
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::gelu(up(norm(x)))); }
};
TORCH_MODULE(Mlp);

struct MlpsImpl : torch::nn::Module {
  torch::nn::ModuleList blocks{register_module("blocks", torch::nn::ModuleList(Mlp(), Mlp(), Mlp()))};
  at::Tensor forward(at::Tensor x) {
    for (const auto& block : *blocks) x = block->as<MlpImpl>()->forward(x);
    return x;
  }
  static std::pair<at::Tensor, at::Tensor> batch(int rows) {
    return {torch::randn({rows, 8}), torch::randn({rows, 8})};
  }
  static at::Tensor loss(const at::Tensor& output, const at::Tensor& target) { return torch::mse_loss(output, target); }
};
TORCH_MODULE(Mlps);

struct Recipe {
  bool torch_optimizer = false;
  int accumulate = 1;
  bool reduces_each = false;  ///< Reduce in each backward of an accumulation, not in the last alone.
  double clip = 0;
  int steps = 20;
  bool same_data = false;  ///< On all ranks.
  at::ScalarType dtype = at::kDouble;
  double eps = 1e-4;  ///< Of AdamW.
};

/// What the ranks agree on: all parameters and buffers, whole, and the norms that clipping returned.
struct Trained {
  std::vector<at::Tensor> tensors;
  std::vector<double> norms;
  std::vector<double> losses;  ///< This rank's own.
};

template <class Net, class F>
Trained train(F& fabric, const Recipe& recipe) {
  using Impl = typename Net::ContainedType;
  torch::manual_seed(fabric.is_global_zero() ? 7 : 8);  // rank 0's parameters count
  Net net;
  net->to(recipe.dtype);
  // Biases before a normalisation have no gradient but rounding errors, which a smaller eps would make steps of.
  const auto options = torch::optim::AdamWOptions(0.01).eps(recipe.eps);
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  if (recipe.torch_optimizer) {
    optimizer = std::make_unique<torch::optim::AdamW>(net->parameters(), options);
  } else {
    optimizer = std::make_unique<optim::AdamW>(net->parameters(), options);
  }
  auto [model, wrapped] = fabric.setup(net, std::move(optimizer));
  Trained trained;
  for (int step = 0; step < recipe.steps; ++step) {
    wrapped.zero_grad();
    for (int part = 0; part < recipe.accumulate; ++part) {
      torch::manual_seed(
          static_cast<std::uint64_t>(1000 * step + 10 * part + (recipe.same_data ? 0 : fabric.global_rank())));
      const auto [x, y] = fabric.to_device(Impl::batch(3));
      const auto guard = fabric.no_backward_sync(model, !recipe.reduces_each && part + 1 < recipe.accumulate);
      const at::Tensor loss = Impl::loss(model(x), y);
      fabric.backward(loss / recipe.accumulate);
      trained.losses.push_back(loss.template item<double>());
    }
    if (recipe.clip > 0) {
      const auto norm = fabric.clip_gradients(model, ClipNorm{recipe.clip});
      trained.norms.push_back(norm.template item<double>());
    }
    wrapped.step();
  }
  const auto keep = [&] {
    for (const auto& tensor : net->parameters()) {
      const auto slice = tensor_slice_of(tensor);
      trained.tensors.push_back(slice ? full_tensor(*slice) : tensor.detach().clone());
    }
    for (const auto& tensor : net->buffers()) trained.tensors.push_back(tensor.detach().clone());
  };
  const auto state = model.state();
  if constexpr (requires { state->with_full_parameters(keep); }) {
    state->with_full_parameters(keep);
  } else {
    keep();
  }
  for (const auto& tensor : trained.tensors) REQUIRE(same_on_all_ranks(fabric.world(), tensor));
  return trained;
}

/// The largest difference of any element, relative to the largest one of its tensor.
double difference(const Trained& a, const Trained& b) {
  double largest = 0;
  REQUIRE(a.tensors.size() == b.tensors.size());
  for (std::size_t i = 0; i < a.tensors.size(); ++i) {
    const auto own = a.tensors[i].to(torch::kDouble);
    const auto other = b.tensors[i].to(torch::kDouble);
    REQUIRE(own.isfinite().all().item<bool>());
    const double d = ((own - other).abs().max() / (other.abs().max() + 1e-12)).item<double>();
    largest = std::max(largest, d);
  }
  REQUIRE(a.norms.size() == b.norms.size());
  for (std::size_t i = 0; i < a.norms.size(); ++i) largest = std::max(largest, std::abs(a.norms[i] / b.norms[i] - 1));
  return largest;
}

/// The largest difference of any loss, relative to it.
double difference_of_losses(const Trained& a, const Trained& b) {
  double largest = 0;
  REQUIRE(a.losses.size() == b.losses.size());
  for (std::size_t i = 0; i < a.losses.size(); ++i) {
    REQUIRE(std::isfinite(a.losses[i]));
    largest = std::max(largest, std::abs(a.losses[i] / b.losses[i] - 1));
  }
  return largest;
}

const std::vector<std::pair<std::string, Recipe>> recipes = [] {
  std::vector<std::pair<std::string, Recipe>> all{{"accumulated and clipped", {.accumulate = 3, .clip = 0.5}}};
  if (tests::ranks() > 2) return all;  // on two ranks, and so in less time, the others
  all.push_back({"torch::optim", {.torch_optimizer = true}});
  all.push_back({"reduced in each backward", {.accumulate = 2, .reduces_each = true}});
  return all;
}();

template <class Net>
std::vector<Trained> by_ddp() {
  std::vector<Trained> all;
  on_ranks<F64>([&](auto& fabric) {
    for (const auto& [name, recipe] : recipes) all.push_back(train<Net>(fabric, recipe));
  });
  return all;
}

template <class S, class Net>
void compare(const std::string& what, const ShardingOptions& options, const std::vector<Trained>& expected) {
  on_ranks<F64, S>(options, [&](auto& fabric) {
    for (std::size_t i = 0; i < recipes.size(); ++i) {
      INFO(what << ", " << recipes[i].first);
      CHECK(difference(train<Net>(fabric, recipes[i].second), expected[i]) < 1e-12);
    }
  });
}

template <class Net>
void compare_all(const Units& units) {
  const auto expected = by_ddp<Net>();
  compare<Zero<1>, Net>("stage 1", {.units = units}, expected);
  compare<Zero<2>, Net>("stage 2", {.units = units}, expected);
  compare<Zero<3>, Net>("stage 3", {.units = units}, expected);
  compare<Sharded, Net>("full", {.units = units}, expected);
  compare<Sharded, Net>("grad-op", {.sharding = Sharding::grad_op, .units = units}, expected);
  compare<Sharded, Net>("none", {.sharding = Sharding::none, .units = units}, expected);
  compare<Sharded, Net>("hybrid", {.sharding = Sharding::hybrid, .shard_group_size = 2, .units = units}, expected);
  if (tests::ranks() > 2) return;
  compare<Zero<3>, Net>("stage 3, one unit at a time", {.units = units, .prefetch = false, .units_in_flight = 1},
                        expected);
  compare<Zero<3, Offload::cpu>, Net>("stage 3, offloaded", {.units = units}, expected);
  compare<Zero<3, Offload::nvme>, Net>("stage 3, in files", {.units = units, .nvme_path = "/tmp"}, expected);
  compare<Zero<3, Offload::nvme>, Net>("stage 3, past the cache",
                                       {.units = units, .nvme_path = "/tmp", .nvme_direct = true}, expected);
  compare<Sharded, Net>("full, by size", {.units = Units::by_size(500)}, expected);
}

}  // namespace

TEST_CASE("[issue-8.1] a transformer with tied weights: every stage and mode trains as Ddp does") {
  const tests::DoubleOutputs doubles;
  compare_all<Transformer>(Units::by_type<BlockImpl>());
}

TEST_CASE("[issue-8.1] a CNN with BatchNorm: every stage and mode trains as Ddp does") {
  const tests::DoubleOutputs doubles;
  compare_all<Cnn>(Units::by_name({"conv1", "conv2", "head"}));
}

TEST_CASE(
    "[issue-8.5] in bf16-mixed every stage and mode trains to the same values, and as Ddp does within the dtype") {
  const Recipe recipe{.accumulate = 2, .clip = 0.5, .dtype = at::kFloat, .eps = 1e-2};
  const auto test = [&]<class Net>(const Units& units) {
    Trained by_ddp;
    on_ranks<BF16Mixed>([&](auto& fabric) { by_ddp = train<Net>(fabric, recipe); });
    std::optional<Trained> first;
    const auto compare = [&]<class S>(const std::string& what, ShardingOptions options = {}) {
      options.units = units;
      on_ranks<BF16Mixed, S>(options, [&](auto& fabric) {
        INFO(what);
        const Trained ours = train<Net>(fabric, recipe);
        CHECK(difference_of_losses(ours, by_ddp) < std::ldexp(1, -5));
        if (!first) first = ours;
        CHECK(difference(ours, *first) < 1e-6);
      });
    };
    compare.template operator()<DeepSpeed<1>>("stage 1");
    compare.template operator()<DeepSpeed<2>>("stage 2");
    compare.template operator()<DeepSpeed<3>>("stage 3");
    compare.template operator()<DeepSpeed<3, Offload::cpu>>("stage 3, offloaded");
    compare.template operator()<DeepSpeed<3, Offload::nvme>>("stage 3, in files", {.nvme_path = "/tmp"});
    first.reset();  // which has autocast too
    compare.template operator()<ModelParallel>("full");
    compare.template operator()<ModelParallel>("grad-op", {.sharding = Sharding::grad_op});
    compare.template operator()<ModelParallel>("none", {.sharding = Sharding::none});
    compare.template operator()<ModelParallel>("hybrid", {.sharding = Sharding::hybrid, .shard_group_size = 2});
  };
  if (tests::ranks() > 2) return;  // where sums of bfloat16 depend on who adds first
  test.template operator()<Transformer>(Units::by_type<BlockImpl>());
  test.template operator()<Cnn>(Units::by_name({"conv1", "conv2", "head"}));
}

TEST_CASE("[issue-8.1] with layers divided by a plan, and the rest sharded over the ranks that have the same slices") {
  const tests::DoubleOutputs doubles;
  // The ranks of a tensor group see the same data: here all ranks do.
  const Recipe recipe{.accumulate = 2, .clip = 0.5, .same_data = true};
  Trained expected;
  on_ranks<F64>([&](auto& fabric) { expected = train<Mlps>(fabric, recipe); });
  const TensorParallelPlan plan{{"blocks.*.up", Colwise{}}, {"blocks.*.down", Rowwise{}}};
  on_ranks<F64, Sharded>({.tensor_parallel = plan, .tensor_parallel_size = 2, .units = Units::by_type<MlpImpl>()},
                         [&](auto& fabric) { REQUIRE(difference(train<Mlps>(fabric, recipe), expected) < 1e-12); });
  if (tests::ranks() == 4) {  // two tensor groups, on one node: the default groups are both of its data ranks
    on_ranks<F64, Sharded>({.sharding = Sharding::hybrid,
                            .tensor_parallel = plan,
                            .tensor_parallel_size = 2,
                            .units = Units::by_type<MlpImpl>()},
                           [&](auto& fabric) { REQUIRE(difference(train<Mlps>(fabric, recipe), expected) < 1e-12); });
  }
  const auto refused = [&](ShardingOptions options) {
    Fabric<tests::Tested, DeepSpeed<2>, F32> fabric({.devices = 1, .strategy = std::move(options)});
  };
  REQUIRE_THROWS_WITH(refused({.tensor_parallel = plan}), ContainsSubstring("only ModelParallel divides layers"));
}

TEST_CASE("[issue-8.1] and so they do on four processes") { tests::again_on_ranks(4); }
