// SPDX-License-Identifier: Apache-2.0
//
// Blocks that backward runs again instead of keeping their activations.
#include <torch/torch.h>

#include "fabric/module/recompute.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/graph_task.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/counted_memory.hpp"

namespace {

using namespace fabric;

struct BlockImpl : torch::nn::Module {
  torch::nn::Linear in{nullptr};
  torch::nn::Linear out{nullptr};
  torch::nn::Dropout dropout{register_module("dropout", torch::nn::Dropout(0.3))};
  int runs = 0;
  int again = 0;
  explicit BlockImpl(int64_t width = 8, int64_t inner = 32)
      : in(register_module("in", torch::nn::Linear(width, inner))),
        out(register_module("out", torch::nn::Linear(inner, width))) {}
  at::Tensor forward(const at::Tensor& x) {
    ++runs;
    if (is_recomputing()) ++again;
    return x + out(dropout(torch::gelu(in(x)).tanh()));
  }
};
TORCH_MODULE(Block);

/// Clears the gradients, runs `loss` from the same random numbers, its backward, and gives back all gradients.
std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& parameters, const std::function<at::Tensor()>& loss) {
  for (const at::Tensor& parameter : parameters) parameter.mutable_grad().reset();
  torch::manual_seed(3);
  const auto value = loss();
  value.backward();
  std::vector<at::Tensor> all{value.detach(), torch::rand({2})};  // and the numbers that come next
  for (const at::Tensor& parameter : parameters) all.push_back(parameter.grad());
  return all;
}

void check_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    INFO(i);
    REQUIRE(a[i].defined() == b[i].defined());
    if (a[i].defined()) CHECK(a[i].equal(b[i]));
  }
}

/// The gradients of `loss` must be the same with and without recomputation.
void check_same_gradients(const std::vector<at::Tensor>& parameters, const std::function<at::Tensor()>& loss) {
  std::vector<at::Tensor> expected;
  {
    const ActivationCheckpointingGuard none(ActivationCheckpointing::none());
    expected = gradients(parameters, loss);
  }
  check_equal(expected, gradients(parameters, loss));
}

template <class... Modules>
std::vector<at::Tensor> parameters_of_all(Modules&... modules) {
  std::vector<at::Tensor> all;
  const auto add = [&](const std::vector<at::Tensor>& some) { all.insert(all.end(), some.begin(), some.end()); };
  (add(modules->parameters()), ...);
  return all;
}

/// Several inputs in containers, several outputs, and an output that is an input.
struct Batch {
  at::Tensor x;
  std::vector<at::Tensor> others;
  std::optional<at::Tensor> mask;
  double factor = 1;
};
struct ManyImpl : torch::nn::Module {
  torch::nn::Linear linear{register_module("linear", torch::nn::Linear(4, 4))};
  std::tuple<at::Tensor, std::vector<at::Tensor>> forward(const Batch& batch, const std::string& text, int64_t power) {
    auto y = linear(batch.x).pow(power) * batch.factor;
    if (batch.mask) y = y.masked_fill(*batch.mask, 0);
    if (text == "sum") y = y + batch.others[0].sigmoid();
    return {y, {batch.others[1], y.exp()}};
  }
};
TORCH_MODULE(Many);

}  // namespace

TEST_CASE("[issue-8.8] gradients, dropout and the random numbers that follow are those of a plain call, bit for bit") {
  Block a;
  Block b;
  auto x = torch::randn({5, 8}, torch::requires_grad());
  auto parameters = parameters_of_all(a, b);
  parameters.push_back(x);
  check_same_gradients(parameters, [&] { return recompute(b, recompute(a, x)).pow(2).sum(); });
  CHECK(a->runs == 3);  // once without, twice with
  CHECK(a->again == 1);
  // An input that needs no gradient, and one block used twice.
  const auto input = torch::randn({5, 8});
  check_same_gradients(parameters, [&] { return recompute(a, recompute(b, recompute(a, input))).pow(2).sum(); });
  // A frozen layer, and a function in place of a module.
  a->in->weight.set_requires_grad(false);
  check_same_gradients(parameters, [&] {
    return recompute([a](const at::Tensor& y) mutable { return a->forward(y).sin(); }, x).pow(2).sum();
  });
}

TEST_CASE("[issue-8.8] arguments and results may be trees, and a result may be an argument") {
  Many many;
  auto x = torch::randn({3, 4}, torch::requires_grad());
  auto other = torch::randn({3, 4}, torch::requires_grad());
  auto parameters = parameters_of_all(many);
  parameters.insert(parameters.end(), {x, other});
  for (const bool masked : {false, true}) {
    check_same_gradients(parameters, [&] {
      Batch batch{x, {other, other * 2}, std::nullopt, 0.5};
      if (masked) batch.mask = torch::rand({3, 4}) < 0.5;
      const auto [y, rest] = recompute(many, batch, "sum", 2);
      return (y * rest[0]).sum() + rest[1].sum();
    });
  }
}

TEST_CASE("[issue-8.8] calls may be nested, and each is run again as it was, mixed with plain ones") {
  Block a;
  Block b;
  Block c;
  const auto x = torch::randn({5, 8});
  const auto inner = [&](const at::Tensor& y) { return recompute(b, recompute(a, y) * 2).tanh(); };
  const auto outer = [&](const at::Tensor& y) { return recompute(inner, recompute(c, recompute(inner, y))).exp(); };
  check_same_gradients(parameters_of_all(a, b, c), [&] { return recompute(outer, x).pow(2).sum(); });
  // By type, within a function that is not recomputed itself.
  std::vector<at::Tensor> expected;
  {
    const ActivationCheckpointingGuard none(ActivationCheckpointing::none());
    expected = gradients(parameters_of_all(a, b, c), [&] { return outer(x).sum(); });
  }
  const ActivationCheckpointingGuard blocks(ActivationCheckpointing::of<Block>());
  check_equal(expected, gradients(parameters_of_all(a, b, c), [&] { return recompute(outer, x).sum(); }));
}

TEST_CASE("[issue-8.8] memory: of a chain of blocks the inputs are kept, and in backward one block's inside") {
  tests::CountedMemory memory;
  constexpr int64_t rows = 64;
  constexpr int64_t width = 16;
  constexpr int64_t inner = 512;
  std::vector<Block> blocks;
  blocks.reserve(12);
  for (int i = 0; i < 12; ++i) blocks.emplace_back(width, inner);
  const auto x = torch::randn({rows, width});
  struct Use {
    std::int64_t after_forward;
    std::int64_t peak;
  };
  const auto use = [&] {
    for (auto& block : blocks) block->zero_grad(/*set_to_none=*/true);
    const auto before = memory.now();
    memory.forget_peak();
    auto y = x;
    for (auto& block : blocks) y = recompute(block, y);
    const auto loss = y.sum();
    const auto after_forward = memory.now() - before;
    loss.backward();
    for (auto& block : blocks) block->zero_grad(/*set_to_none=*/true);
    const Use result{after_forward, memory.peak() - before};
    CHECK(memory.now() - before < 1000 + rows * width * 4);  // y itself
    return result;
  };
  const Use saving = use();
  const ActivationCheckpointingGuard none(ActivationCheckpointing::none());
  const Use plain = use();
  CAPTURE(plain.after_forward, plain.peak, saving.after_forward, saving.peak);
  constexpr std::int64_t inside = rows * inner * 4;  // one of the tensors that a block saves
  constexpr std::int64_t gradients_of_all = 12 * (2 * width * inner + width + inner) * 4;
  CHECK(plain.after_forward > 12 * 3 * inside);
  CHECK(saving.after_forward < 12 * (rows * width * 4 + 10'000) + inside);  // an input and a random state for each
  CHECK(saving.peak < saving.after_forward + gradients_of_all + 8 * inside);
  CHECK(saving.peak < plain.peak / 2);
}

TEST_CASE("[issue-8.8] where no gradients are recorded, and where it is switched off, a mark is a plain call") {
  Block block;
  const auto x = torch::randn({2, 8});
  const tests::CountedMemory memory;
  {
    const torch::NoGradGuard no_grad;
    const auto before = memory.now();
    const auto y = recompute(block, x);
    CHECK(memory.now() - before == 2 * 8 * 4);
    CHECK_FALSE(y.requires_grad());
  }
  {
    const ActivationCheckpointingGuard none(ActivationCheckpointing::none());
    recompute(block, x).sum().backward();
  }
  CHECK(block->runs == 2);
  checkpoint_activations(ActivationCheckpointing::none());  // for the process
  recompute(block, x).sum().backward();
  checkpoint_activations(ActivationCheckpointing::marked());
  CHECK(block->runs == 3);
  recompute(block, x).sum().backward();
  CHECK(block->runs == 5);
}

TEST_CASE("[issue-8.8] types of modules choose what is recomputed, at run time") {
  struct DerivedImpl : BlockImpl {};
  Block block;
  const auto derived = std::make_shared<DerivedImpl>();
  torch::nn::Linear linear(8, 8);
  const auto x = torch::randn({2, 8});
  const auto runs = [&](ActivationCheckpointing setting) {
    const ActivationCheckpointingGuard guard(setting);
    block->runs = derived->runs = 0;
    int calls = 0;
    const auto function = [&](const at::Tensor& y) {
      ++calls;
      return linear->forward(y).tanh();
    };
    recompute(function, recompute(block, recompute(derived, x))).sum().backward();
    return std::vector<int>{block->runs, derived->runs, calls};
  };
  CHECK(runs(ActivationCheckpointing::marked()) == std::vector<int>{2, 2, 2});
  CHECK(runs(ActivationCheckpointing::none()) == std::vector<int>{1, 1, 1});
  CHECK(runs(ActivationCheckpointing::of<Block>()) == std::vector<int>{2, 2, 1});
  CHECK(runs(ActivationCheckpointing::of<BlockImpl, torch::nn::Linear>()) == std::vector<int>{2, 2, 1});
  CHECK(runs(ActivationCheckpointing::of<DerivedImpl>()) == std::vector<int>{1, 2, 1});
  CHECK(ActivationCheckpointing::of<Block>() == ActivationCheckpointing::of<BlockImpl>());
}

TEST_CASE("[issue-8.8] autocast and the default dtype are those of the forward, wherever backward runs") {
  Block block;
  const auto x = torch::randn({4, 8});
  const auto parameters = parameters_of_all(block);
  const auto run = [&](bool inside) {
    std::vector<at::ScalarType> dtypes;
    const auto function = [&](const at::Tensor& y) {
      const auto z = block->in(y);
      dtypes.push_back(z.scalar_type());
      dtypes.push_back(torch::ones({1}).scalar_type());
      return block->out(torch::gelu(z)) * torch::ones({1});
    };
    const auto result = gradients(parameters, [&] {
      std::optional<AutocastGuard> autocast;
      std::optional<DefaultDtypeGuard> dtype;
      if (inside) autocast.emplace(at::kCPU, at::kBFloat16);
      if (inside) dtype.emplace(at::kDouble);
      at::Tensor y = recompute(function, x).sum();
      autocast.reset();
      dtype.reset();
      if (!inside) autocast.emplace(at::kCPU, at::kBFloat16);  // of the program around backward, not of forward
      auto loss = y.to(at::kFloat);
      loss.backward({}, /*retain_graph=*/true);
      return loss;
    });
    // Twice by backward, once by forward.
    for (std::size_t i = 2; i < dtypes.size(); ++i) CHECK(dtypes[i] == dtypes[i - 2]);
    CHECK(dtypes[0] == (inside ? at::kBFloat16 : at::kFloat));
    CHECK(dtypes[1] == (inside ? at::kDouble : at::kFloat));
    CHECK(torch::ones({1}).scalar_type() == at::kFloat);
    CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
    return std::pair{result, dtypes.size()};
  };
  for (const bool inside : {true, false}) {
    CAPTURE(inside);
    const auto [recomputed, runs] = run(inside);
    CHECK(runs == 6);
    const ActivationCheckpointingGuard none(ActivationCheckpointing::none());
    check_equal(run(inside).first, recomputed);
  }
}

TEST_CASE("[issue-8.8] BatchNorm counts each batch once") {
  torch::nn::Sequential net(torch::nn::Linear(4, 4), torch::nn::BatchNorm1d(4), torch::nn::ReLU());
  auto& norm = net[1]->as<torch::nn::BatchNorm1d>()->running_mean;
  auto& count = net[1]->as<torch::nn::BatchNorm1d>()->num_batches_tracked;
  const auto x = torch::randn({6, 4});
  const auto loss = recompute(net, x).pow(2).sum();
  const auto after_forward = norm.clone();
  loss.backward();
  CHECK(count.item<int64_t>() == 1);
  CHECK(norm.equal(after_forward));
  CHECK_FALSE(norm.equal(torch::zeros({4})));
}

TEST_CASE("[issue-8.8] a graph that is kept may be run through again, and holds no more memory for it") {
  Block block(8, 512);
  auto x = torch::randn({64, 8}, torch::requires_grad());
  const tests::CountedMemory memory;
  const auto loss = recompute(block, x).pow(2).sum();
  loss.backward({}, /*retain_graph=*/true);
  const auto first = x.grad().clone();
  const auto before = memory.now();
  loss.backward({}, /*retain_graph=*/true);
  CHECK(memory.now() - before < 64 * 512);  // of the 4 * 64 * 512 bytes of one saved tensor
  CHECK(block->runs == 3);
  CHECK(x.grad().equal(first * 2));
}

TEST_CASE("[issue-8.8] gradients of gradients go through a recomputed block") {
  Block block;
  auto x = torch::randn({3, 8}, torch::requires_grad());
  auto parameters = parameters_of_all(block);
  parameters.push_back(x);
  check_same_gradients(parameters, [&] {
    const auto y = recompute(block, x).pow(3).sum();
    const auto slope = torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
    return y + slope.pow(2).sum();
  });
  // A block that itself asks for a gradient.
  check_same_gradients(parameters, [&] {
    return recompute(
               [&](const at::Tensor& y) {
                 const auto z = block->forward(y).pow(3);
                 return torch::autograd::grad({z.sum()}, {y}, {}, true, /*create_graph=*/true)[0] + z;
               },
               x * 1)
        .pow(2)
        .sum();
  });
}

TEST_CASE("[issue-8.8] parameters' gradients arrive in the one backward of the loss, in the order of a plain one") {
  Block a;
  Block b;
  const auto x = torch::randn({3, 8});
  const auto arrivals = [&](bool recomputed) {
    std::vector<std::size_t> order;
    std::vector<int> backwards;
    const auto parameters = parameters_of_all(a, b);
    std::vector<std::pair<at::Tensor, unsigned>> hooks;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      hooks.emplace_back(parameters[i], parameters[i].register_hook([&, i](const at::Tensor& /*gradient*/) {
        order.push_back(i);
        backwards.push_back(torch::autograd::get_current_graph_task_id());
      }));
    }
    const ActivationCheckpointingGuard guard(recomputed ? ActivationCheckpointing::marked()
                                                        : ActivationCheckpointing::none());
    recompute(b, recompute(a, x)).sum().backward();
    for (auto& [parameter, hook] : hooks) parameter.remove_hook(hook);
    for (const int backward : backwards) CHECK(backward == backwards[0]);
    return order;
  };
  const auto plain = arrivals(false);
  CHECK(plain.size() == 8);
  CHECK(arrivals(true) == plain);
}

TEST_CASE("[issue-8.8] functions with a backward of their own may look at what they saved as often as they like") {
  struct Cube : torch::autograd::Function<Cube> {
    static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x) {
      const auto square = x * x;
      context->save_for_backward({x, square});
      return square * x;
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& gradients) {
      const auto square = context->get_saved_variables()[1];
      const auto x = context->get_saved_variables()[0];
      return {gradients[0] * (square + 2 * x * x)};
    }
  };
  auto x = torch::randn({3}, torch::requires_grad());
  check_same_gradients({x},
                       [&] { return recompute([](const at::Tensor& y) { return Cube::apply(y.exp()); }, x).sum(); });
}

TEST_CASE("[issue-8.8] what the block throws the second time reaches the caller of backward, and the next step works") {
  Block block;
  const auto x = torch::randn({3, 8});
  int runs = 0;
  const auto function = [&](const at::Tensor& y) {
    if (++runs == 2) throw std::out_of_range("the second time");
    return block->forward(y);
  };
  auto loss = recompute(function, x).sum();
  torch::manual_seed(4);
  CHECK_THROWS_AS(loss.backward(), std::out_of_range);
  const auto number = torch::rand({1});
  torch::manual_seed(4);
  CHECK(torch::rand({1}).equal(number));
  recompute(function, x).sum().backward();
  CHECK(block->in->weight.grad().defined());
}

TEST_CASE("[issue-8.8] a block that does something else the second time is refused") {
  Block block;
  auto x = torch::randn({3, 8}, torch::requires_grad());
  int runs = 0;
  const auto more = [&](const at::Tensor& y) { return ++runs == 1 ? y.tanh() : y.tanh().exp(); };
  CHECK_THROWS_WITH(recompute(more, x).sum().backward(), ContainsSubstring("saved 2 tensors for backward, at first 1"));
  runs = 0;
  const auto other = [&](const at::Tensor& y) { return (++runs == 1 ? y : y[0]).tanh(); };
  CHECK_THROWS_WITH(recompute(other, x).sum().backward(), ContainsSubstring("of other shapes"));
}

TEST_CASE("[issue-8.8] changes in place that would make gradients wrong are noticed") {
  auto x = torch::randn({3}, torch::requires_grad());
  auto argument = x * 2;
  auto loss = recompute([](const at::Tensor& y) { return y.sin().exp(); }, argument).sum();
  argument.add_(1);
  CHECK_THROWS_WITH(loss.backward(), ContainsSubstring("inplace operation"));
  loss = recompute([](const at::Tensor& y) { return y.exp().add_(1); }, x * 2).sum();
  CHECK_THROWS_WITH(loss.backward(), ContainsSubstring("changed a tensor in place"));
  check_same_gradients({x}, [&] { return recompute([](const at::Tensor& y) { return (y * y).add_(1); }, x).sum(); });
}

TEST_CASE("[issue-8.8] the modules of a Sequential are marked by one call") {
  torch::nn::Sequential net(torch::nn::Linear(4, 8), Block(), torch::nn::Functional(torch::relu), Block(),
                            torch::nn::BatchNorm1d(8));
  const auto x = torch::randn({6, 4});
  check_same_gradients(net->parameters(), [&] { return recompute_each(*net, x).pow(2).sum(); });
  CHECK(net[1]->as<Block>()->runs == 3);
  const ActivationCheckpointingGuard guard(ActivationCheckpointing::of<torch::nn::Linear>());
  recompute_each(*net, x).sum().backward();
  CHECK(net[1]->as<Block>()->runs == 4);
  CHECK(recompute_each(*net, x).equal(recompute_each(*net, x)) == false);  // dropout
}

TEST_CASE("[issue-8.8] threads recompute side by side") {
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (std::size_t i = 0; i < equal.size(); ++i) {
    threads.emplace_back([&equal, i] {
      torch::nn::Sequential net(torch::nn::Linear(8, 8), torch::nn::Tanh(), torch::nn::Linear(8, 8));
      const auto x = torch::randn({4, 8});
      bool same = true;
      for (int step = 0; step < 20; ++step) {
        net->zero_grad();
        net->forward(x).pow(2).sum().backward();
        const auto expected = net->parameters()[0].grad().clone();
        net->zero_grad();
        recompute(net, x).pow(2).sum().backward();
        same = same && expected.equal(net->parameters()[0].grad());
      }
      equal[i] = same ? 1 : 0;
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(equal == std::vector<int>(4, 1));
}

TEST_CASE("[issue-8.8] a Fabric's precision is that of the recomputation") {
  const auto train = [](auto& fabric, bool recomputed) {
    struct NetImpl : torch::nn::Module {
      Block a{register_module("a", Block())};
      Block b{register_module("b", Block())};
      at::Tensor forward(const at::Tensor& x) { return recompute(b, recompute(a, x)); }
    };
    const ActivationCheckpointingGuard guard(recomputed ? ActivationCheckpointing::marked()
                                                        : ActivationCheckpointing::none());
    torch::manual_seed(1);
    auto net = std::make_shared<NetImpl>();
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(torch::randn({4, 8})).pow(2).mean());
      optimizer.step();
    }
    return net->parameters();
  };
  Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
  check_equal(train(mixed, false), train(mixed, true));
  Fabric<Cpu, SingleDevice, F64> f64;
  check_equal(train(f64, false), train(f64, true));
}
