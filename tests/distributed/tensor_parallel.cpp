// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// ranks: 4
//
// Tensor parallelism: a divided module computes and learns what the whole one does, on 2 and 4 processes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/comm/device_mesh.hpp"
#include "fabric/precision/transformer_engine.hpp"
#include "fabric/shard/sharded_module.hpp"
#include "fabric/shard/tensor_clip.hpp"
#include "fabric/shard/tensor_parallel.hpp"
#include "support/ranks.hpp"
#include "support/reference.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;

constexpr std::int64_t words = 24;
constexpr std::int64_t head_size = 2;

/// Attention that works for any number of heads: all of them, or this rank's.
struct AttentionImpl : torch::nn::Module {
  explicit AttentionImpl(std::int64_t size)
      : query(register_module("query", torch::nn::Linear(size, size))),
        key(register_module("key", torch::nn::Linear(size, size))),
        value(register_module("value", torch::nn::Linear(size, size))),
        output(register_module("output", torch::nn::Linear(size, size))) {}
  at::Tensor forward(const at::Tensor& x) {
    const auto heads = [](const at::Tensor& y) { return y.unflatten(-1, {-1, head_size}).transpose(1, 2); };
    const at::Tensor mixed = at::scaled_dot_product_attention(heads(query(x)), heads(key(x)), heads(value(x)), {}, 0.0,
                                                              /*is_causal=*/true);
    return output(mixed.transpose(1, 2).flatten(2));
  }
  torch::nn::Linear query, key, value, output;
};
TORCH_MODULE(Attention);

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t size)
      : norm1(register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({size})))),
        norm2(register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({size})))),
        attention(register_module("attention", Attention(size))),
        mlp(register_module("mlp", torch::nn::Sequential(torch::nn::Linear(size, 4 * size), torch::nn::GELU(),
                                                         torch::nn::Linear(4 * size, size)))) {}
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = x + attention(norm1(x));
    return y + mlp->forward(norm2(y));
  }
  torch::nn::LayerNorm norm1, norm2;
  Attention attention;
  torch::nn::Sequential mlp;
};
TORCH_MODULE(Block);

struct TransformerImpl : torch::nn::Module {
  explicit TransformerImpl(std::int64_t size = 16)
      : embedding(register_module("embedding", torch::nn::Embedding(words, size))),
        blocks(register_module("blocks", torch::nn::ModuleList(Block(size), Block(size)))),
        head(register_module("head", torch::nn::Linear(size, words))) {
    to(torch::kDouble);
  }
  at::Tensor forward(const at::Tensor& input) {
    at::Tensor x = embedding(input);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return head(x);
  }
  torch::nn::Embedding embedding;
  torch::nn::ModuleList blocks;
  torch::nn::Linear head;
};
TORCH_MODULE(Transformer);

const TensorParallelPlan plan_of_transformer{
    {"embedding", Rowwise{}},
    {"blocks.*.attention.query", Colwise{}},
    {"blocks.*.attention.key", Colwise{}},
    {"blocks.*.attention.value", Colwise{}},
    {"blocks.*.attention.output", Rowwise{}},
    {"blocks.*.mlp.0", Colwise{}},
    {"blocks.*.mlp.2", Rowwise{}},
    {"head", Colwise{.gather_output = true}},
};

double distance(const at::Tensor& a, const at::Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  return a.numel() == 0 ? 0 : (a - b).abs().max().item<double>();
}

/// What the parameter's part in a divided module is of, or the tensor itself.
at::Tensor whole_of(const at::Tensor& parameter, const at::Tensor& part) {
  const auto slice = tensor_slice_of(parameter);
  return slice ? full_tensor(*slice, part) : part.detach();
}

/// The largest distance between parameters, and between gradients where there are any.
double distance_of_modules(const torch::nn::Module& divided, const torch::nn::Module& whole) {
  const auto ours = divided.named_parameters();
  const auto theirs = whole.named_parameters();
  REQUIRE(ours.size() == theirs.size());
  double most = 0;
  for (const auto& item : theirs) {
    INFO(item.key());
    const at::Tensor& own = ours[item.key()];
    most = std::max(most, distance(whole_of(own, own), item.value()));
    REQUIRE(own.grad().defined() == item.value().grad().defined());
    if (own.grad().defined()) {
      const at::Tensor gradient =
          item.value().grad().is_sparse() ? item.value().grad().to_dense() : item.value().grad();
      most = std::max(most,
                      distance(whole_of(own, own.grad().is_sparse() ? own.grad().to_dense() : own.grad()), gradient));
    }
  }
  return most;
}

/// Two modules of one kind with the same values: the first is divided by the plan, and had others on all ranks but one.
template <class Make>
auto divided_and_whole(const World& tensor, const TensorParallelPlan& plan, Make&& make) {
  torch::manual_seed(17 + (tensor.global_rank == 0 ? 0 : 100 + tensor.global_rank));
  auto divided = make();
  torch::manual_seed(17);
  auto whole = make();
  divided->to(torch::kDouble);
  whole->to(torch::kDouble);
  parallelize_module(*divided, tensor, plan);
  return std::pair{divided, whole};
}

/// Compares forward, the gradients of parameters and that of the input.
template <class Module>
void require_same(Module& divided, Module& whole, const at::Tensor& input, const World& tensor, bool part = false) {
  const bool floating = input.is_floating_point();
  at::Tensor ours = input.clone().requires_grad_(floating);
  at::Tensor theirs = input.clone().requires_grad_(floating);
  const at::Tensor out = divided->forward(ours);
  const at::Tensor expected = whole->forward(theirs);
  const at::Tensor weight = torch::randn(expected.sizes(), expected.options());  // the same on all ranks
  const auto own = [&](const at::Tensor& tensor_) {
    return part ? tensor_.chunk(tensor.size, -1)[static_cast<std::size_t>(tensor.global_rank)] : tensor_;
  };
  REQUIRE(distance(out, own(expected)) < 1e-12);
  divided->zero_grad();
  whole->zero_grad();
  (out * own(weight)).sum().backward();
  (expected * weight).sum().backward();
  REQUIRE(distance_of_modules(*divided, *whole) < 1e-12);
  if (floating) REQUIRE(distance(ours.grad(), theirs.grad()) < 1e-12);
}

World tensor_of_all(const World& world) { return make_mesh(world, world.size).tensor; }

/// Trains both on the same batches; a divided model's replicas each take their part of a batch.
template <class Optimizer, class Options>
void train_and_compare(const World& world, int tensor_size, const Options& options, int steps = 10,
                       std::optional<ClipNorm> clip = {}) {
  const DeviceMesh mesh = make_mesh(world, tensor_size);
  auto [divided, whole] = divided_and_whole(mesh.tensor, plan_of_transformer, [] { return Transformer(); });
  for (const at::Tensor& parameter : divided->parameters()) {  // replicas begin alike
    const at::NoGradGuard no_grad;
    parameter.copy_(broadcast(mesh.data, parameter.detach()));
  }
  REQUIRE(distance_of_modules(*divided, *whole) == 0);
  Optimizer ours(divided->parameters(), options);
  Optimizer theirs(whole->parameters(), options);
  const auto loss_of = [](Transformer& net, const at::Tensor& batch) {
    const at::Tensor logits = net(batch.narrow(1, 0, 6));
    return torch::cross_entropy_loss(logits.flatten(0, 1), batch.narrow(1, 1, 6).flatten());
  };
  double first = 0;
  double last = 0;
  for (int step = 0; step < steps; ++step) {
    torch::manual_seed(5 + step % 2);  // two batches in turn
    const at::Tensor batch = torch::randint(words, {4, 7});
    divided->zero_grad();
    whole->zero_grad();
    loss_of(divided, batch.chunk(mesh.data.size)[static_cast<std::size_t>(mesh.data.global_rank)]).backward();
    const at::Tensor loss = loss_of(whole, batch);
    loss.backward();
    if (step == 0) first = loss.item<double>();
    if (step % 2 == 0) last = loss.item<double>();
    const bool compares = step == 0 || step == steps - 1;
    for (const at::Tensor& parameter : divided->parameters()) {
      if (mesh.data.size > 1) parameter.mutable_grad() = all_reduce(mesh.data, parameter.grad());
      if (compares && !tensor_slice_of(parameter)) REQUIRE(tests::same_on_all_ranks(mesh.tensor, parameter.grad()));
    }
    if (clip) {
      const at::Tensor norm = clip_sliced_gradients(*divided, *clip, mesh.tensor);
      REQUIRE(distance(norm, clip_gradients(*whole, *clip)) < 1e-12);
    }
    if (compares) REQUIRE(distance_of_modules(*divided, *whole) < 1e-12);
    ours.step();
    theirs.step();
  }
  REQUIRE(distance_of_modules(*divided, *whole) < 1e-12);
  REQUIRE(last < first);
}

}  // namespace

TEST_CASE("[issue-8.1] a divided transformer learns as the whole one does") {
  on_ranks<F64>([](auto& fabric) {
    const World& world = fabric.world();
    const torch::optim::AdamWOptions adamw = torch::optim::AdamWOptions(3e-3).eps(1e-6);
    train_and_compare<torch::optim::SGD>(world, world.size, torch::optim::SGDOptions(0.1).momentum(0.9));
    train_and_compare<torch::optim::AdamW>(world, 2, adamw);  // on four ranks, 2 x 2
    train_and_compare<optim::AdamW>(world, world.size, optim::AdamWOptions(3e-3).eps(1e-6));
  });
}

TEST_CASE("[issue-8.1] gradients are clipped by the norm of the whole module") {
  on_ranks<F64>([](auto& fabric) {
    const World& world = fabric.world();
    const auto sgd = torch::optim::SGDOptions(0.5);
    for (const double p : {2.0, 3.0, std::numeric_limits<double>::infinity()}) {
      train_and_compare<torch::optim::SGD>(world, 2, sgd, /*steps=*/3, ClipNorm{0.01, p});
    }
    auto [net, whole] = divided_and_whole(tensor_of_all(world), {{"1", Colwise{}}}, [] {
      return torch::nn::Sequential(torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})), torch::nn::Linear(8, 8));
    });
    for (const at::Tensor& parameter : net->parameters()) parameter.mutable_grad() = torch::zeros_like(parameter);
    if (world.global_rank == 0) net->parameters()[2].mutable_grad().fill_(INFINITY);  // a slice on one rank
    REQUIRE_THROWS_WITH(clip_sliced_gradients(*net, ClipNorm{1.0}, tensor_of_all(world)),
                        ContainsSubstring("nothing was clipped"));
    REQUIRE_THROWS_AS(clip_sliced_gradients(*net, ClipNorm{-1.0}, tensor_of_all(world)), Error);
  });
}

TEST_CASE("[issue-8.1] a block communicates twice forward and twice backward, query, key and value sharing one sum") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] = divided_and_whole(tensor, plan_of_transformer, [] { return Transformer(); });
    const auto count = [&] { return tensor.group->getSequenceNumberForGroup(); };
    BlockImpl& block = *divided->blocks[0]->template as<BlockImpl>();
    const at::Tensor x = torch::randn({2, 5, 16}, torch::dtype(torch::kDouble).requires_grad(true));
    const auto before = count();
    const at::Tensor y = block.forward(x);
    REQUIRE(count() - before == 2);
    y.sum().backward();
    REQUIRE(count() - before == 4);
    {
      const torch::NoGradGuard no_grad;
      const auto now = count();
      block.forward(x);
      REQUIRE(count() - now == 2);
    }
    // The same tensor again, after that backward and after it was changed: new sums.
    at::Tensor input = x.detach().clone().requires_grad_(true);
    at::Tensor held;  // keeps the graph of the forward before
    for (int turn = 0; turn < 3; ++turn) {
      const auto now = count();
      held = block.attention->query(input).sum();
      held.backward();
      REQUIRE(count() - now == 1);
      const torch::NoGradGuard no_grad;
      if (turn == 1) input.mul_(2);
    }
  });
}

TEST_CASE("[issue-8.1] linear layers, divided in every way, with inputs of every number of dimensions") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    using torch::nn::Linear;
    using torch::nn::LinearOptions;
    torch::manual_seed(3);
    for (const bool bias : {true, false}) {
      for (const auto& sizes : std::vector<std::vector<std::int64_t>>{{8}, {3, 8}, {2, 3, 8}, {0, 8}, {2, 2, 3, 8}}) {
        CAPTURE(bias, sizes);
        const auto x = torch::randn(sizes, torch::kDouble);
        const auto one = [&] { return Linear(LinearOptions(8, 12).bias(bias)); };
        const auto pair = [&] {
          return torch::nn::Sequential(Linear(LinearOptions(8, 12).bias(bias)), torch::nn::Tanh(),
                                       Linear(LinearOptions(12, 4).bias(bias)));
        };
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Colwise{}}}, one);
          require_same(divided, whole, x, tensor, /*part=*/true);
          REQUIRE(divided->weight.size(0) == 12 / tensor.size);
          if (bias) REQUIRE(divided->bias.size(0) == 12 / tensor.size);
        }
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Colwise{.gather_output = true}}}, one);
          require_same(divided, whole, x, tensor);
          if (bias) REQUIRE_FALSE(tensor_slice_of(divided->bias));
        }
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Rowwise{.split_input = true}}}, one);
          require_same(divided, whole, x, tensor);
          REQUIRE(divided->weight.size(1) == 8 / tensor.size);
          if (bias) REQUIRE(tests::same_on_all_ranks(tensor, divided->bias.grad()));
        }
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"0", Colwise{}}, {"2", Rowwise{}}}, pair);
          require_same(divided, whole, x, tensor);
        }
      }
    }
  });
}

TEST_CASE("[issue-8.1] embeddings, divided in every way") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    using torch::nn::EmbeddingOptions;
    torch::manual_seed(3);
    const auto indices = torch::randint(words, {3, 20});
    std::vector<EmbeddingOptions> all{EmbeddingOptions(words, 8), EmbeddingOptions(words, 8).sparse(true)};
    for (const std::int64_t padding : {0, 7, 23, -1}) all.push_back(EmbeddingOptions(words, 8).padding_idx(padding));
    for (const EmbeddingOptions& options : all) {
      for (const auto& input : {indices, indices[0], indices[0][0], indices.to(torch::kInt), indices.narrow(1, 0, 0)}) {
        const auto make = [&] { return torch::nn::Embedding(options); };
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Rowwise{}}}, make);
          require_same(divided, whole, input, tensor);
          REQUIRE(divided->weight.size(0) == words / tensor.size);
        }
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Colwise{}}}, make);
          require_same(divided, whole, input, tensor, /*part=*/true);
        }
        {
          auto [divided, whole] = divided_and_whole(tensor, {{"", Colwise{.gather_output = true}}}, make);
          require_same(divided, whole, input, tensor);
        }
      }
    }
    const auto scaled = [] { return torch::nn::Embedding(EmbeddingOptions(words, 8).scale_grad_by_freq(true)); };
    auto [divided, whole] = divided_and_whole(tensor, {{"", Colwise{}}}, scaled);
    require_same(divided, whole, indices, tensor, /*part=*/true);

    auto [rows, others] = divided_and_whole(tensor, {{"", Rowwise{}}}, [] { return torch::nn::Embedding(words, 8); });
    for (const std::int64_t outside : {std::int64_t{-1}, words}) {
      REQUIRE_THROWS_WITH(rows->forward(torch::tensor({outside})), ContainsSubstring("is outside of 0 to 23"));
    }
  });
}

TEST_CASE("[issue-8.1] a weight that an embedding and a linear layer share is divided for both") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    struct TiedImpl : torch::nn::Module {
      TiedImpl()
          : embedding(register_module("embedding", torch::nn::Embedding(words, 8))),
            head(register_module("head", torch::nn::Linear(torch::nn::LinearOptions(8, words).bias(false)))) {
        head->weight = embedding->weight;
      }
      at::Tensor forward(const at::Tensor& x) { return head(torch::tanh(embedding(x))); }
      torch::nn::Embedding embedding;
      torch::nn::Linear head;
    };
    const auto make = [] { return std::make_shared<TiedImpl>(); };
    const auto x = torch::arange(words).view({4, 6});
    for (const bool rows : {true, false}) {
      const TensorParallelPlan plan =
          rows ? TensorParallelPlan{{"embedding", Rowwise{}}, {"head", Colwise{.gather_output = true}}}
               : TensorParallelPlan{{"embedding", Colwise{}}, {"head", Rowwise{}}};
      auto [divided, whole] = divided_and_whole(tensor, plan, make);
      REQUIRE(divided->head->weight.is_same(divided->embedding->weight));
      REQUIRE(tensor_slices(*divided).size() == 1);
      require_same(divided, whole, x, tensor);
    }
    TiedImpl net;
    REQUIRE_THROWS_WITH(parallelize_module(net, tensor, {{"embedding", Rowwise{}}}),
                        ContainsSubstring("'head.weight' is also a parameter of 'embedding'") &&
                            ContainsSubstring("name both in the plan, or neither"));
    REQUIRE_THROWS_WITH(parallelize_module(net, tensor, {{"embedding", Rowwise{}}, {"head", Rowwise{}}}),
                        ContainsSubstring("along the other dimension"));
    // Without a module that says so, the use itself is refused.
    torch::nn::Embedding embedding(words, 8);
    parallelize_module(*embedding, tensor, {{"", Rowwise{}}});
    REQUIRE_THROWS_WITH(torch::linear(torch::ones({1, 8}), embedding->weight),
                        ContainsSubstring("sliced for an embedding"));
    torch::nn::Linear linear(8, words);
    parallelize_module(*linear, tensor, {{"", Colwise{}}});
    REQUIRE_THROWS_WITH(torch::embedding(linear->weight, x), ContainsSubstring("sliced for a linear layer"));
  });
}

TEST_CASE("[issue-8.1] layers are reached however they are called") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    const TensorParallelPlan plan{{"0", Colwise{}}, {"2", Rowwise{}}};
    const auto make = [] {
      return torch::nn::Sequential(torch::nn::Linear(8, 8), torch::nn::Tanh(), torch::nn::Linear(8, 4));
    };
    auto [divided, whole] = divided_and_whole(tensor, plan, make);
    torch::manual_seed(2);
    const auto x = torch::randn({3, 5, 8}, torch::kDouble);
    const auto expected = whole->forward(x).detach();
    REQUIRE(distance(divided->forward(x), expected) < 1e-12);
    const auto& layer = divided->template at<torch::nn::LinearImpl>(2);
    const auto part = torch::tanh(divided[0]->template as<torch::nn::LinearImpl>()->forward(x));
    REQUIRE(distance(torch::linear(part, layer.weight, layer.bias), expected) < 1e-12);
    REQUIRE(distance(torch::matmul(part, layer.weight.t()) + layer.bias, expected) < 1e-12);
    {
      const torch::NoGradGuard no_grad;
      REQUIRE(distance(divided->forward(x), expected) < 1e-12);
    }
    {
      const c10::InferenceMode inference;
      REQUIRE(distance(divided->forward(x), expected) < 1e-12);
      REQUIRE(distance(divided->forward(x[0]), expected[0]) < 1e-12);
    }
    at::Tensor elsewhere;
    std::thread([&, &divided = divided] { elsewhere = divided->forward(x); }).join();
    REQUIRE(distance(elsewhere, expected) < 1e-12);

    // Converting takes keys off the parameters, and storages may move: they are the same tensors still.
    const auto single = [&x, &divided = divided] { return divided->forward(x.to(torch::kFloat)); };
    divided->to(torch::kFloat);
    REQUIRE(distance(single(), expected) < 1e-5);
    std::thread([&] { elsewhere = single(); }).join();
    REQUIRE(distance(elsewhere, expected) < 1e-5);
    const auto flat = torch::cat({layer.weight.detach().flatten(), torch::zeros({5})});
    layer.weight.set_data(flat.narrow(0, 0, layer.weight.numel()).view(layer.weight.sizes()));
    REQUIRE(distance(single(), expected) < 1e-5);
    {
      const c10::InferenceMode inference;
      REQUIRE(distance(single(), expected) < 1e-5);
    }
  });
}

TEST_CASE("[issue-8.1] a weight may be a view of another tensor") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    const auto make = [] {
      torch::nn::Linear layer(8, 8);
      const torch::NoGradGuard no_grad;
      const at::Tensor flat = torch::randn({100}, torch::kDouble);
      layer->weight = flat.narrow(0, 10, 64).view({8, 8}).requires_grad_(true);
      return layer;
    };
    auto [divided, whole] = divided_and_whole(tensor, {{"", Rowwise{.split_input = true}}}, make);
    torch::manual_seed(2);
    const auto x = torch::randn({3, 8}, torch::kDouble);
    const auto out = divided->forward(x);
    REQUIRE(distance(out, whole->forward(x)) < 1e-12);
    out.sum().backward();
    REQUIRE(divided->weight.grad().defined());
    const c10::InferenceMode inference;
    REQUIRE(distance(divided->forward(x), whole->forward(x)) < 1e-12);
  });
}

TEST_CASE("[issue-8.1] an input that changes in place between two layers gets the gradients of both values") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] =
        divided_and_whole(tensor, {{"", Colwise{.gather_output = true}}}, [] { return torch::nn::Linear(8, 8); });
    std::vector<at::Tensor> gradients;
    for (auto* layer : {&divided, &whole}) {
      (*layer)->weight.requires_grad_(false);  // else the first value is needed in backward
      const at::Tensor leaf = torch::ones({2, 8}, torch::dtype(torch::kDouble).requires_grad(true));
      const at::Tensor x = leaf * 1;
      const at::Tensor first = (*layer)->forward(x);
      x.mul_(3);
      (first + (*layer)->forward(x)).sum().backward();
      gradients.push_back(leaf.grad());
    }
    REQUIRE(distance(gradients[0], gradients[1]) < 1e-12);
  });
}

TEST_CASE("[issue-8.1] frozen layers, accumulation, and several forwards before one backward") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] = divided_and_whole(tensor, plan_of_transformer, [] { return Transformer(); });
    torch::manual_seed(4);
    for (auto* net : {&divided, &whole}) {
      (*net)->embedding->weight.requires_grad_(false);
      (*net)->blocks[0]->template as<BlockImpl>()->mlp->parameters()[0].requires_grad_(false);
      (*net)->blocks[1]->template as<BlockImpl>()->attention->value->weight.requires_grad_(false);
    }
    const auto x = torch::randint(words, {2, 3, 6});
    for (auto* net : {&divided, &whole}) {
      const auto a = (*net)->forward(x[0]);
      const auto b = (*net)->forward(x[1]);
      (a.square().sum() + b.sin().sum()).backward();
      (*net)->forward(x[0]).sum().backward();
    }
    REQUIRE(distance_of_modules(*divided, *whole) < 1e-11);
  });
}

TEST_CASE("[issue-8.1] under autocast, what is divided computes in the lower precision, gradients in the weights'") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] = divided_and_whole(tensor, plan_of_transformer, [] { return Transformer(); });
    divided->to(torch::kFloat);
    whole->to(torch::kFloat);
    Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
    torch::manual_seed(4);
    const auto x = torch::randint(words, {3, 6});
    for (auto* net : {&divided, &whole}) {
      const auto guard = mixed.autocast();
      const auto y = (*net)->forward(x);
      REQUIRE(y.scalar_type() == at::kBFloat16);
      REQUIRE((*net)->head(torch::ones({2, 16})).scalar_type() == at::kBFloat16);  // two dimensions: another operator
      y.to(torch::kFloat).square().sum().backward();
    }
    for (const auto& item : divided->named_parameters()) {
      REQUIRE(item.value().grad().scalar_type() == at::kFloat);
      const auto expected = whole->named_parameters()[item.key()].grad();
      const double error = (whole_of(item.value(), item.value().grad()) - expected).norm().template item<double>();
      INFO(item.key());
      if (item.key().find("key.bias") != std::string::npos) continue;  // zero, but for rounding
      REQUIRE(error < 0.05 * expected.norm().template item<double>());
    }
  });
}

TEST_CASE("[issue-8.1] a divided layer may compute in FP8, each rank with scales of its own part") {
  on_ranks<F32>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] = divided_and_whole(tensor, {{"0", Colwise{}}, {"2", Rowwise{}}}, [] {
      return torch::nn::Sequential(torch::nn::Linear(32, 64), torch::nn::ReLU(), torch::nn::Linear(64, 32));
    });
    Fabric<Cpu, SingleDevice, TransformerEngine<>> fp8;
    const auto ours = fp8.setup(divided);
    const auto theirs = fp8.setup(whole);
    torch::manual_seed(2);
    const auto x = torch::randn({4, 8, 32});
    const auto error = [](const at::Tensor& a, const at::Tensor& b) {
      return ((a - b).norm() / b.norm()).template item<double>();
    };
    const auto y = ours(x);
    const auto expected = theirs(x);
    REQUIRE_FALSE(y.equal(expected));
    REQUIRE(error(y, expected) < 0.1);
    y.square().sum().backward();
    expected.square().sum().backward();
    for (const auto& item : whole->named_parameters()) {
      if (!item.value().grad().defined()) continue;
      const at::Tensor& own = divided->named_parameters()[item.key()];
      REQUIRE(error(whole_of(own, own.grad()), item.value().grad()) < 0.15);
    }
  });
}

TEST_CASE("[issue-8.1] Ddp refuses a divided module, whose slices it would average") {
  on_ranks<F32>([](auto& fabric) {
    torch::nn::Linear net(8, 8);
    parallelize_module(*net, tensor_of_all(fabric.world()), {{"", Rowwise{.split_input = true}}});
    REQUIRE_THROWS_WITH(fabric.setup(net), ContainsSubstring("fabric: Ddp: 'weight' holds this rank's slice"));
  });
}

TEST_CASE(
    "[issue-8.7] a checkpoint refuses slices of a program's own making, which it would take for whole parameters") {
  on_ranks<F32>([](auto& fabric) {
    const auto folder = std::filesystem::temp_directory_path();
    const std::string path = folder / ("fabric-whole-" + std::to_string(fabric.world_size()) + ".pt");
    torch::nn::Linear net(8, 8);
    fabric.save(path, {{"model", net}});
    parallelize_module(*net, tensor_of_all(fabric.world()), {{"", Rowwise{.split_input = true}}});
    REQUIRE_THROWS_WITH(fabric.save(folder / "fabric-slices.pt", {{"model", net}}),
                        ContainsSubstring("'model.weight' is this rank's slice"));
    REQUIRE_THROWS_WITH(fabric.load(path, {{"model", net}}), ContainsSubstring("'model.weight' is this rank's slice"));
    fabric.barrier();
    if (fabric.is_global_zero()) std::filesystem::remove(path);
  });
}

TEST_CASE("[issue-8.1] slices can be asked for: which part, of what, and the whole") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    auto [divided, whole] = divided_and_whole(tensor, plan_of_transformer, [] { return Transformer(); });
    const auto slices = tensor_slices(*divided);
    // embedding, head's weight (its bias is whole); per block: 3 x (weight, bias) + weight, (weight, bias) + weight
    REQUIRE(slices.size() == 2 + 2 * (7 + 3));
    const auto named = whole->named_parameters();
    for (const TensorSlice& slice : slices) {
      INFO(slice.name);
      REQUIRE(slice.parameter.is_same(divided->named_parameters()[slice.name]));
      REQUIRE(at::IntArrayRef(slice.full_sizes) == named[slice.name].sizes());
      REQUIRE(slice.index == tensor.global_rank);
      REQUIRE(slice.count == tensor.size);
      REQUIRE(slice.parameter.size(slice.dim) * slice.count == slice.full_sizes[static_cast<std::size_t>(slice.dim)]);
      REQUIRE(full_tensor(slice).equal(named[slice.name].detach()));
      REQUIRE(own_part(slice, named[slice.name]).equal(slice.parameter));
      REQUIRE(slice.parameter.requires_grad());
      REQUIRE(slice.parameter.is_leaf());
    }
    REQUIRE_FALSE(tensor_slice_of(divided->head->bias));
    REQUIRE_FALSE(tensor_slice_of(whole->head->weight));
    const auto& block = *divided->blocks[1];
    REQUIRE(tensor_slices(block)[0].name == "attention.query.weight");

    // What is known of a parameter ends with its layer, and with that the hold on the group.
    at::Tensor left;
    const auto holders = tensor.group.use_count();
    {
      torch::nn::Linear linear(8, 8);
      parallelize_module(*linear, tensor, {{"", Colwise{}}});
      left = linear->weight;
      REQUIRE(tensor_slice_of(left));
      REQUIRE(tensor.group.use_count() > holders);
    }
    REQUIRE_FALSE(tensor_slice_of(left));
    REQUIRE(tensor.group.use_count() == holders);
  });
}

TEST_CASE("[issue-8.1] everything that is wrong with a plan is said at once, and nothing is changed") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    const std::string ranks = std::to_string(tensor.size);
    struct NetImpl : torch::nn::Module {
      NetImpl() {
        register_module("blocks", torch::nn::ModuleList(Block(16), Block(16)));
        register_module("odd", torch::nn::Linear(7, 9));
        register_module("norm", torch::nn::Embedding(torch::nn::EmbeddingOptions(9, 8).max_norm(1)));
        register_module("scaled", torch::nn::Embedding(torch::nn::EmbeddingOptions(8, 7).scale_grad_by_freq(true)));
        register_module("plain", torch::nn::Embedding(8, 8));
      }
    } net;
    const auto message = [&](const TensorParallelPlan& plan) -> std::string {
      try {
        parallelize_module(net, tensor, plan);
      } catch (const Error& error) {
        return error.what();
      }
      return "no error";
    };
    CHECK(message({{"blocks.*.attention.qery", Colwise{}}}) ==
          "fabric: parallelize_module: 'blocks.*.attention.qery' is the name of no module: 'blocks.*.attention' has "
          "key, output, query, value: did you mean 'query'?");
    CHECK(
        message({{"block.*.attention.query", Colwise{}}}) ==
        "fabric: parallelize_module: 'block.*.attention.query' is the name of no module: the module has blocks, norm, "
        "odd, plain, scaled: did you mean 'blocks'?");
    CHECK(message({{"odd.weight", Colwise{}}}) ==
          "fabric: parallelize_module: 'odd.weight' is the name of no module: 'odd' has no modules");
    CHECK(message({{"blocks.2.mlp.0", Colwise{}}}).find("'blocks' has 0, 1") != std::string::npos);
    CHECK(message({{"blocks.*.norm1", Colwise{}}})
              .find("2 problems:\n  'blocks.0.norm1' is a torch::nn::LayerNormImpl; "
                    "Linear and Embedding can be divided\n") != std::string::npos);
    CHECK(message({{"blocks.0.mlp", Colwise{}}})
              .find("Linear and Embedding can be divided. It has blocks.0.mlp.0, "
                    "blocks.0.mlp.2") != std::string::npos);
    CHECK(message({{"plain", Colwise{}}, {"pl*", Rowwise{}}}) ==
          "fabric: parallelize_module: 'plain' is named twice, by 'plain' and 'pl*'");
    const std::string next9 = tensor.size == 2 ? "10" : "12";
    CHECK(message({{"odd", Colwise{}}}) ==
          "fabric: parallelize_module: 'odd' (Linear, Colwise) has out_features = 9, "
          "which " +
              ranks + " ranks cannot share evenly; the next that they can is " + next9);
    CHECK(message({{"odd", Rowwise{}}}).find("(Linear, Rowwise) has in_features = 7") != std::string::npos);
    CHECK(
        message({{"norm", Colwise{}}}) ==
        "fabric: parallelize_module: 'norm' (Embedding, Colwise) has max_norm, which needs whole rows: leave it out of "
        "the plan, or build it without");
    CHECK(message({{"norm", Rowwise{}}}).find("has num_embeddings = 9") != std::string::npos);
    CHECK(message({{"scaled", Colwise{}}}).find("has embedding_dim = 7") != std::string::npos);
    CHECK(message({{"scaled", Rowwise{}}})
              .find("has scale_grad_by_freq, which counts words that are elsewhere: use "
                    "Colwise") != std::string::npos);
    CHECK(message({{"plain", Rowwise{.split_input = true}}}).find("has split_input: its input is indices") !=
          std::string::npos);
    const std::string all =
        message({{"nothing", Colwise{}}, {"odd", Colwise{}}, {"plain", Rowwise{}}, {"norm", Rowwise{}}});
    CHECK(all.find("fabric: parallelize_module: 4 problems:\n  'nothing'") == 0);
    CHECK(tensor_slices(net).empty());
    parallelize_module(net, tensor, {{"plain", Rowwise{}}, {"blocks.0.mlp.0", Colwise{}}});
    CHECK(message({{"plain", Rowwise{}}, {"blocks.0.mlp.0", Colwise{}}}) ==
          "fabric: parallelize_module: 2 problems:\n  'plain' is divided already: a module is parallelized once\n  "
          "'blocks.0.mlp.0' is divided already: a module is parallelized once");
    torch::nn::Linear changed(8, 8);
    changed->weight.set_data(torch::zeros({4, 8}));
    REQUIRE_THROWS_WITH(parallelize_module(*changed, tensor, {{"", Colwise{}}}),
                        ContainsSubstring("a weight that is not of the layer's sizes"));
  });
}

TEST_CASE("[issue-8.1] layers that share a weight have the same options") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    torch::nn::Sequential linears(torch::nn::Linear(8, 8), torch::nn::Linear(8, 8));
    torch::nn::Sequential embeddings(torch::nn::Embedding(8, 8), torch::nn::Embedding(8, 8));
    auto& first = *linears->ptr(0)->as<torch::nn::LinearImpl>();
    auto& second = *linears->ptr(1)->as<torch::nn::LinearImpl>();
    second.weight = first.weight;
    auto& here = *embeddings->ptr(0)->as<torch::nn::EmbeddingImpl>();
    auto& there = *embeddings->ptr(1)->as<torch::nn::EmbeddingImpl>();
    there.weight = here.weight;
    for (auto* net : {&linears, &embeddings}) {
      REQUIRE_THROWS_WITH(parallelize_module(**net, tensor, {{"0", Colwise{}}, {"1", Colwise{.gather_output = true}}}),
                          ContainsSubstring("'1' shares its weight with '0', which has other options"));
    }
  });
}

TEST_CASE("[issue-8.1] a layer that gets the wrong part of its input says so") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    torch::nn::Sequential net(torch::nn::Linear(8, 8), torch::nn::Linear(8, 8));
    parallelize_module(*net, tensor, {{"0", Colwise{}}, {"1", Rowwise{}}});
    const auto part = std::to_string(8 / tensor.size);
    REQUIRE_THROWS_WITH(net->ptr(1)->as<torch::nn::LinearImpl>()->forward(torch::ones({2, 8})),
                        ContainsSubstring("the input of '1' (Rowwise) has a last dimension of 8; legal is " + part) &&
                            ContainsSubstring("use Rowwise{.split_input = true}"));
    REQUIRE_THROWS_WITH(
        net->ptr(0)->as<torch::nn::LinearImpl>()->forward(torch::ones({2, 8 / tensor.size})),
        ContainsSubstring("the input of '0' (Colwise) has a last dimension of " + part + "; legal is 8") &&
            ContainsSubstring("make its producer Colwise{.gather_output = true}"));
    REQUIRE_THROWS_WITH(net->forward(torch::ones({2, 3})), ContainsSubstring("has a last dimension of 3; legal is 8"));
  });
}

TEST_CASE("[issue-8.1] ranks with other modules or plans are told so") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    torch::nn::Linear net(8, tensor.global_rank == 1 ? 16 : 8);
    REQUIRE_THROWS_WITH(
        parallelize_module(*net, tensor, {{"", Colwise{}}}),
        ContainsSubstring("parallelize_module: the ranks do not agree") && ContainsSubstring("[16, 8]"));
    torch::nn::Linear same(8, 8);
    const TensorParallelPlan plan =
        tensor.global_rank == 1 ? TensorParallelPlan{{"", Rowwise{}}} : TensorParallelPlan{{"", Colwise{}}};
    REQUIRE_THROWS_WITH(parallelize_module(*same, tensor, plan), ContainsSubstring("divided along dimension 1"));
    torch::nn::Linear options(8, 8);
    const TensorParallelPlan gathers{{"", Rowwise{.split_input = tensor.global_rank == 1}}};
    REQUIRE_THROWS_WITH(parallelize_module(*options, tensor, gathers), ContainsSubstring("the ranks do not agree"));
  });
}

TEST_CASE("[issue-8.1] clones and second derivatives are refused") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    torch::nn::Sequential net(torch::nn::Linear(8, 8));
    parallelize_module(*net, tensor, {{"0", Colwise{.gather_output = true}}});
    REQUIRE_THROWS_AS(net->clone(), c10::Error);
    const auto x = torch::ones({2, 8}, torch::requires_grad());
    REQUIRE_THROWS_WITH(torch::autograd::grad({net->forward(x).sum()}, {x}, {}, {}, /*create_graph=*/true),
                        ContainsSubstring("create_graph"));
  });
}

TEST_CASE("[issue-8.1] parameters without memory are divided too") {
  on_ranks<F64>([](auto& fabric) {
    const World tensor = tensor_of_all(fabric.world());
    torch::nn::Linear net(8, 8);
    net->weight = torch::empty({8, 8}, torch::kMeta);
    parallelize_module(*net, tensor, {{"", Rowwise{}}});
    REQUIRE(net->weight.is_meta());
    REQUIRE(net->weight.size(1) == 8 / tensor.size);
  });
}

TEST_CASE("[issue-8.1] a group of one leaves the module as it is, but checks the plan") {
  torch::nn::Linear net(3, 3);
  parallelize_module(*net, World{}, {{"", Colwise{}}});
  REQUIRE(tensor_slices(*net).empty());
  REQUIRE(net->forward(torch::ones({1, 3})).size(1) == 3);
  REQUIRE_THROWS_AS(parallelize_module(*net, World{}, {{"wrong", Colwise{}}}), Error);
}

TEST_CASE("[issue-8.1] a divided module is sharded over the data group: 2 x 2 learns as the whole one does") {
  on_ranks<F64>([](auto& fabric) {
    const DeviceMesh mesh = make_mesh(fabric.world(), 2);  // on two ranks, nobody shares a shard
    auto [divided, whole] = divided_and_whole(mesh.tensor, plan_of_transformer, [] { return Transformer(); });
    ShardedModule state;
    ShardedModule::Layout layout;
    layout.compute = layout.master = layout.reduce = layout.buffer = [](at::ScalarType kept) { return kept; };
    World alone = mesh.data;
    alone.size = 1;
    alone.global_rank = 0;
    alone.group.reset();
    const bool is_alone = mesh.data.size == 1;
    layout.frees_parameters = !is_alone;
    const World shard = is_alone ? alone : mesh.data;
    state.setup(*divided,
                {.world = shard, .shard = shard, .prefetch = shard, .replicate = alone, .tensor = mesh.tensor},
                {.units = Units::by_type<BlockImpl>()}, layout);
    std::vector<at::Tensor> masters;
    for (const auto& named : state.masters()) masters.push_back(named.second);
    const auto options = torch::optim::AdamWOptions(3e-3).eps(1e-6);
    torch::optim::AdamW ours(masters, options);
    torch::optim::AdamW theirs(whole->parameters(), options);
    for (int step = 0; step < 6; ++step) {
      torch::manual_seed(5 + step);
      const at::Tensor batch = torch::randint(words, {4, 7});
      const auto loss_of = [](Transformer& net, const at::Tensor& rows) {
        return torch::cross_entropy_loss(net(rows.narrow(1, 0, 6)).flatten(0, 1), rows.narrow(1, 1, 6).flatten());
      };
      ours.zero_grad();
      state.after_zero_grad(ours);
      whole->zero_grad();
      const auto own = batch.chunk(mesh.data.size)[static_cast<std::size_t>(mesh.data.global_rank)];
      const auto loss = state.forward([&, &net = divided] { return loss_of(net, own); });
      const auto expected = loss_of(whole, batch);
      REQUIRE(distance(all_reduce(mesh.data, loss.detach()), expected) < 1e-12);
      loss.backward();
      expected.backward();
      state.before_step();
      ours.step();
      theirs.step();
      state.after_step();
    }
    state.with_full_parameters([&, &net = divided, &same = whole] {
      for (const auto& item : net->named_parameters()) {
        INFO(item.key());
        REQUIRE(distance(whole_of(item.value(), item.value()), same->named_parameters()[item.key()]) < 1e-12);
      }
    });
  });
}

TEST_CASE("[issue-8.1] numbers are those of Python's parallelize_module") {
  on_ranks<F64>([](auto& fabric) {
    struct NetImpl : torch::nn::Module {
      NetImpl() {
        register_module("embedding", embedding);
        register_module("norm1", norm1);
        register_module("norm2", norm2);
        register_module("attention", attention);
        register_module("up", up);
        register_module("down", down);
        register_module("head", head);
      }
      at::Tensor forward(const at::Tensor& input) {
        at::Tensor x = embedding(input);
        x = x + attention(norm1(x));
        x = x + down(torch::relu(up(norm2(x))));
        return head(x);
      }
      torch::nn::Embedding embedding{12, 8};
      torch::nn::LayerNorm norm1{torch::nn::LayerNormOptions({8})}, norm2{torch::nn::LayerNormOptions({8})};
      Attention attention{8};
      torch::nn::Linear up{8, 16}, down{16, 8}, head{8, 12};
    } net;
    const World tensor = tensor_of_all(fabric.world());
    const auto reference = tests::read_reference("tensor_parallel.json.gz");
    net.to(torch::kDouble);
    for (const auto& item : net.named_parameters()) {
      item.value().set_data(tests::tensor_of(reference["weights"][item.key()]));
    }
    parallelize_module(net, tensor,
                       {{"embedding", Rowwise{}},
                        {"attention.query", Colwise{}},
                        {"attention.key", Colwise{}},
                        {"attention.value", Colwise{}},
                        {"attention.output", Rowwise{}},
                        {"up", Colwise{.gather_output = true}},
                        {"down", Rowwise{.split_input = true}},
                        {"head", Colwise{.gather_output = true}}});
    torch::optim::SGD sgd(net.parameters(), torch::optim::SGDOptions(0.2).momentum(0.9));
    const auto batches = tests::tensor_of(reference["words"]);
    const auto losses = tests::tensors_of(reference["losses"]);
    const auto all_equal = [&](const char* what, auto&& part_of) {
      for (const auto& item : net.named_parameters()) {
        INFO(item.key());
        REQUIRE(distance(whole_of(item.value(), part_of(item.value())), tests::tensor_of(reference[what][item.key()])) <
                1e-12);
      }
    };
    for (std::size_t step = 0; step < losses.size(); ++step) {
      sgd.zero_grad();
      const auto batch = batches[static_cast<std::int64_t>(step)];
      const auto loss =
          torch::cross_entropy_loss(net.forward(batch.narrow(1, 0, 6)).flatten(0, 1), batch.narrow(1, 1, 6).flatten());
      REQUIRE(distance(loss, losses[step]) < 1e-12);
      loss.backward();
      if (step == 0) all_equal("gradients", [](const at::Tensor& parameter) { return parameter.grad(); });
      sgd.step();
    }
    all_equal("trained", [](const at::Tensor& parameter) { return parameter; });
  });
}

TEST_CASE("[issue-8.1] all of this on four ranks") { tests::again_on_ranks(4); }
