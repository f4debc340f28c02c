// SPDX-License-Identifier: Apache-2.0
//
// Modules that are made without memory, and get it later.
#include <torch/torch.h>

#include "fabric/module/deferred_init.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/counted_memory.hpp"

namespace {

using namespace fabric;

/// At least one of each kind of layer, and of each way to fill a tensor.
struct ZooImpl : torch::nn::Module {
  torch::nn::Linear linear{register_module("linear", torch::nn::Linear(4, 5))};
  torch::nn::Conv2d conv{register_module("conv", torch::nn::Conv2d(3, 5, 3))};
  torch::nn::Embedding embedding{
      register_module("embedding", torch::nn::Embedding(torch::nn::EmbeddingOptions(10, 5).padding_idx(2)))};
  torch::nn::LayerNorm layer_norm{
      register_module("layer_norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({5})))};
  torch::nn::BatchNorm2d batch_norm{register_module("batch_norm", torch::nn::BatchNorm2d(5))};
  torch::nn::MultiheadAttention attention{register_module("attention", torch::nn::MultiheadAttention(8, 2))};
  torch::nn::LSTM lstm{register_module("lstm", torch::nn::LSTM(torch::nn::LSTMOptions(8, 6).num_layers(2)))};
  torch::nn::GRU gru{register_module("gru", torch::nn::GRU(8, 6))};
  torch::nn::Transformer transformer{
      register_module("transformer", torch::nn::Transformer(torch::nn::TransformerOptions(8, 2, 1, 2)))};
  torch::nn::Sequential sequential{
      register_module("sequential", torch::nn::Sequential(torch::nn::Linear(3, 3), torch::nn::PReLU()))};
  at::Tensor from_vector{register_buffer("from_vector", torch::tensor(std::vector<float>{1, 2, 3}))};
  at::Tensor from_lists{register_buffer("from_lists", torch::tensor({{1.0, 2.0}, {3.0, 4.0}}))};
  at::Tensor mask{register_buffer("mask", torch::ones({5, 5}, torch::kBool).tril())};
  at::Tensor positions{register_buffer("positions", torch::arange(6).to(torch::kFloat).unsqueeze(1) / 3)};
  at::Tensor orthogonal{register_parameter("orthogonal", torch::empty({6, 4}))};
  at::Tensor dirac{register_parameter("dirac", torch::empty({4, 4, 3}))};
  at::Tensor sparse{register_parameter("sparse", torch::empty({6, 4}))};
  at::Tensor eye{register_parameter("eye", torch::empty({4, 4}))};
  at::Tensor kaiming{register_parameter("kaiming", torch::empty({4, 4}))};
  at::Tensor xavier{register_parameter("xavier", torch::empty({4, 4}))};
  at::Tensor truncated{register_parameter("truncated", torch::empty({70, 9}))};
  at::Tensor half{register_parameter("half", torch::randn({4, 5}, torch::kBFloat16), /*requires_grad=*/false)};
  torch::nn::Dropout dropout{register_module(
      "dropout",
      torch::nn::Dropout(torch::linspace(0, 0.1, 5)[3].item<double>()))};  // a value that is no matter of luck
  at::Tensor unregistered = torch::randn({3});

  ZooImpl() {
    torch::nn::init::orthogonal_(orthogonal);
    torch::nn::init::dirac_(dirac);
    torch::nn::init::sparse_(sparse, 0.5);
    torch::nn::init::eye_(eye);
    torch::nn::init::kaiming_normal_(kaiming);
    torch::nn::init::xavier_normal_(xavier);
    {
      const torch::NoGradGuard no_grad;
      truncated.uniform_(-0.9, 0.9).erfinv_().mul_(0.02).clamp_(-0.03, 0.03);
      linear->weight.slice(0, 1, 3).normal_().add_(torch::rand({1, 4}));
      conv->weight.data().mul_(0.5);
      embedding->weight.index_put_({torch::tensor({1, 4})}, 7.0);
      gru->named_parameters()["bias_ih_l0"].copy_(linear->weight.flatten().slice(0, 0, 18));
    }
    linear->bias.set_requires_grad(false);
  }
};
TORCH_MODULE(Zoo);

/// All tensors of a module, with their names.
std::vector<std::pair<std::string, at::Tensor>> tensors_of(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& item : module.named_parameters()) tensors.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

void check_equal(const torch::nn::Module& one, const torch::nn::Module& other) {
  const auto expected = tensors_of(one);
  const auto actual = tensors_of(other);
  REQUIRE(expected.size() == actual.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO(expected[i].first);
    const at::Tensor& a = expected[i].second;
    const at::Tensor& b = actual[i].second;
    REQUIRE(expected[i].first == actual[i].first);
    REQUIRE(b.device().is_cpu());
    CHECK(a.equal(b));
    CHECK(a.scalar_type() == b.scalar_type());
    CHECK(a.strides() == b.strides());
    CHECK(a.requires_grad() == b.requires_grad());
    CHECK(a.is_leaf() == b.is_leaf());
    CHECK(a.is_view() == b.is_view());
  }
}

/// What `make` makes must be the same at once and deferred.
template <class Make>
auto check_same_values(const Make& make) {
  torch::manual_seed(1);
  auto at_once = make();
  const auto next_number = torch::rand({3});
  torch::manual_seed(1);
  auto deferred = deferred_init(make);
  materialise(*deferred);
  CHECK(torch::rand({3}).equal(next_number));
  check_equal(*at_once, *deferred);
  return std::pair{at_once, deferred};
}

/// Blocks whose weights are made, made anew by a second pass over all of them, and scaled by a third.
struct ManyImpl : torch::nn::Module {
  static constexpr int64_t width = 128;
  static constexpr int64_t bytes = width * width * 4;
  explicit ManyImpl(int blocks) {
    for (int i = 0; i < blocks; ++i) {
      register_module("block" + std::to_string(i), torch::nn::Linear(width, width));
    }
    for (auto& parameter : parameters()) torch::nn::init::normal_(parameter, 0, 0.02);
    const torch::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.mul_(0.5).add_(torch::ones_like(parameter));
  }
};
TORCH_MODULE(Many);

struct TiedImpl : torch::nn::Module {
  at::Tensor first{register_parameter("first", torch::randn({4, 3}))};
  at::Tensor other{register_parameter("other", torch::randn({2}))};
  at::Tensor second{register_parameter("second", first)};
  at::Tensor turned{register_buffer("turned", first.detach().t())};
};
TORCH_MODULE(Tied);

}  // namespace

TEST_CASE("[issue-8.6] a deferred module has the values that it would have had at once, bit for bit") {
  auto [at_once, deferred] = check_same_values([] { return Zoo(); });
  CHECK(at_once->unregistered.equal(deferred->unregistered));
  CHECK(deferred->dropout->options.p() == Approx(0.075));
  // LSTM's own list of its weights too, and everything can be trained.
  const auto run = [](Zoo zoo) {
    torch::manual_seed(2);
    const auto x = torch::randn({3, 2, 8});
    const auto out =
        std::get<0>(zoo->lstm(x)).sum() + zoo->transformer(x, x).sum() + zoo->conv(torch::randn({1, 3, 5, 5})).sum();
    out.backward();
    return zoo->lstm->parameters()[0].grad() + out.detach();
  };
  CHECK(run(at_once).equal(run(deferred)));
}

TEST_CASE("[issue-8.6] until it is materialised a deferred module has shapes and no memory") {
  const tests::CountedMemory memory;
  const auto before = memory.now();
  const auto net = deferred_init([] { return Many(50); });
  // The states of the random generator, of 5 kB each, are on the tape.
  CHECK(memory.now() - before < 50'000);
  CHECK(memory.peak() - before < 50'000);
  for (const auto& [name, tensor] : tensors_of(*net)) {
    INFO(name);
    CHECK(tensor.is_meta());
    CHECK(tensor.storage().data() == nullptr);
  }
}

TEST_CASE("[issue-8.6] tensor by tensor, a module is made that does not fit into memory") {
  constexpr int blocks = 50;
  torch::manual_seed(1);
  Many at_once(blocks);
  const auto expected = at_once->named_parameters();
  torch::manual_seed(1);
  auto net = deferred_init([=] { return Many(blocks); });
  const tests::CountedMemory memory;
  const auto before = memory.now();
  std::vector<std::string> names;
  materialise(*net, Materialise{}, [&](const std::string& name, const at::Tensor& slot, const at::Tensor& real) {
    names.push_back(name);
    CHECK(slot.is_meta());
    CHECK(slot.sizes() == real.sizes());
    CHECK(real.equal(expected[name]));
  });
  CHECK(names.size() == 2 * blocks);
  CHECK(names.front() == "block0.weight");
  CHECK(memory.peak() - before < 4 * ManyImpl::bytes);  // of 50
  CHECK(memory.now() == before);
}

TEST_CASE("[issue-8.6] tied tensors come once and views of one memory together, and stay so") {
  auto [at_once, deferred] = check_same_values([] { return Tied(); });
  CHECK(deferred->first.unsafeGetTensorImpl() == deferred->second.unsafeGetTensorImpl());
  CHECK(deferred->turned.data_ptr() == deferred->first.data_ptr());

  std::vector<std::string> names;
  materialise(
      *deferred_init([] { return Tied(); }), Materialise{},
      [&](const std::string& name, const at::Tensor& /*slot*/, const at::Tensor& /*real*/) { names.push_back(name); });
  CHECK(names == std::vector<std::string>{"first", "turned", "other"});
}

TEST_CASE("[issue-8.6] seeds that are set while the module is made are set when it is materialised") {
  struct SeededImpl : torch::nn::Module {
    at::Tensor before{register_parameter("before", torch::randn({3}))};
    at::Tensor after;
    at::Tensor again;
    SeededImpl() {
      torch::manual_seed(1);  // the very state from before
      after = register_parameter("after", torch::randn({3}));
      torch::manual_seed(9);
      again = register_parameter("again", torch::randn({3}));
    }
  };
  auto [at_once, deferred] = check_same_values([] { return std::make_shared<SeededImpl>(); });
  CHECK(deferred->before.equal(deferred->after));
}

TEST_CASE("[issue-8.6] random numbers that are drawn before it is materialised change nothing, nor are they changed") {
  torch::manual_seed(1);
  torch::nn::Linear at_once(3, 3);
  torch::manual_seed(1);
  auto deferred = deferred_init([] { return torch::nn::Linear(3, 3); });
  torch::manual_seed(5);
  const auto first = torch::rand({2});
  materialise(*deferred);
  const auto second = torch::rand({2});
  check_equal(*at_once, *deferred);
  torch::manual_seed(5);
  CHECK(torch::rand({2}).equal(first));
  CHECK(torch::rand({2}).equal(second));
  // Two that are deferred one after the other are not twins.
  auto a = deferred_init([] { return torch::nn::Linear(3, 3); });
  auto b = deferred_init([] { return torch::nn::Linear(3, 3); });
  materialise(*a);
  materialise(*b);
  CHECK_FALSE(a->weight.equal(b->weight));
}

TEST_CASE("[issue-8.6] dtypes: the default one of then, and another one that is asked for now") {
  const auto make = [] {
    const DefaultDtypeGuard f64(at::kDouble);
    return torch::nn::BatchNorm1d(4);
  };
  auto [at_once, deferred] = check_same_values(make);
  CHECK(deferred->weight.scalar_type() == at::kDouble);
  CHECK(torch::ones({1}).scalar_type() == at::kFloat);

  auto narrow = deferred_init(make);
  materialise(*narrow, {.dtype = at::kBFloat16});
  CHECK(narrow->weight.scalar_type() == at::kBFloat16);
  CHECK(narrow->running_mean.scalar_type() == at::kBFloat16);
  CHECK(narrow->num_batches_tracked.scalar_type() == at::kLong);
}

TEST_CASE("[issue-8.6] an optimizer may be made before the memory") {
  torch::manual_seed(1);
  torch::nn::Linear at_once(4, 2);
  torch::manual_seed(1);
  auto deferred = deferred_init([] { return torch::nn::Linear(4, 2); });
  torch::optim::AdamW one(at_once->parameters());
  torch::optim::AdamW other(deferred->parameters());
  materialise(*deferred);
  for (int step = 0; step < 3; ++step) {
    for (auto [net, optimizer] : {std::pair{at_once, &one}, std::pair{deferred, &other}}) {
      optimizer->zero_grad();
      net(torch::ones({3, 4})).sum().backward();
      optimizer->step();
    }
  }
  check_equal(*at_once, *deferred);
}

TEST_CASE("[issue-8.6] without values, memory is there and the random generator is not touched") {
  auto net = deferred_init([] { return Zoo(); });
  torch::manual_seed(3);
  materialise_empty(*net);
  const auto number = torch::rand({1});
  torch::manual_seed(3);
  CHECK(torch::rand({1}).equal(number));
  const torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : tensors_of(*net)) {
    INFO(name);
    REQUIRE(tensor.device().is_cpu());
    tensor.zero_();
    CHECK_FALSE(tensor.is_view());
  }
  CHECK(net->unregistered.device().is_cpu());
}

TEST_CASE("[issue-8.6] tensors from outside are read as they are") {
  const auto pretrained = torch::arange(6, torch::kFloat).view({2, 3});
  const auto make = [&] {
    const int64_t rows = static_cast<int64_t>(pretrained.max().item<float>()) + 1;  // a value that there is
    torch::nn::Linear linear(3, rows);
    const torch::NoGradGuard no_grad;
    linear->weight.slice(0, 0, 2).copy_(pretrained);
    linear->bias.slice(0, 0, 3).add_(pretrained[0] * 2);
    linear->register_parameter("scale", torch::randn_like(pretrained));
    linear->register_parameter("copy", pretrained.clone().add_(1));
    linear->register_parameter("itself", pretrained, /*requires_grad=*/false);
    return linear;
  };
  check_same_values(make);
  auto deferred = deferred_init(make);
  pretrained.add_(1);
  CHECK_THROWS_WITH(materialise(*deferred), ContainsSubstring("has been changed since"));
}

TEST_CASE("[issue-8.6] what needs values that do not exist yet is refused, with the operator's name") {
  const auto message_of = [](const auto& make) {
    try {
      static_cast<void>(deferred_init(make));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  CHECK_THAT(message_of([] {
               torch::nn::Linear linear(2, 2);
               linear->weight[0][0].item<float>();
               return linear;
             }),
             ContainsSubstring("aten::item"));
  CHECK_THAT(message_of([] {
               torch::nn::Linear linear(2, 2);
               linear->register_buffer("chosen", linear->weight.nonzero());
               return linear;
             }),
             ContainsSubstring("aten::nonzero"));
  CHECK_THAT(message_of([] {
               torch::nn::Linear linear(2, 2);
               linear->weight.data_ptr<float>()[0] = 1;
               return linear;
             }),
             ContainsSubstring("aten::uniform_"));  // the last one before it
  CHECK_THAT(message_of([] {
               const auto late = torch::empty({3});
               float* const numbers = late.data_ptr<float>();
               torch::nn::Linear linear(2, 2);
               numbers[0] = 1;
               return linear;
             }),
             ContainsSubstring("data_ptr"));
  const auto outside = torch::ones({2});
  CHECK_THAT(message_of([&] {
               torch::nn::Linear linear(2, 2);
               const torch::NoGradGuard no_grad;
               outside.copy_(linear->bias);
               return linear;
             }),
             ContainsSubstring("aten::copy_ changes a tensor that was made outside"));
  CHECK(outside.equal(torch::ones({2})));
  CHECK_THAT(message_of([] {
               torch::nn::Linear linear(2, 2);
               const torch::NoGradGuard no_grad;
               linear->weight.normal_(0, 1, at::detail::createCPUGenerator(3));
               return linear;
             }),
             ContainsSubstring("aten::normal_ draws from a generator of the program's own"));
  CHECK_THROWS_AS(deferred_init([]() -> torch::nn::Linear { throw std::logic_error("the program's own"); }),
                  std::logic_error);
  CHECK(torch::ones({2}).device().is_cpu());  // nothing is deferred any more
}

TEST_CASE("[issue-8.6] a module on the meta device that nobody deferred is refused by its parameters' names") {
  torch::nn::Linear linear(2, 2);
  linear->register_buffer("unknown", torch::empty({2}, torch::kMeta));
  CHECK_THROWS_WITH(materialise(*linear), ContainsSubstring("unknown"));
  Fabric<Cpu, SingleDevice, F32> fabric;
  CHECK_THROWS_WITH(static_cast<void>(fabric.setup(linear)), ContainsSubstring("meta"));
}

TEST_CASE("[issue-8.6] the generator is put back when a receiver throws, and the module can be materialised again") {
  torch::manual_seed(1);
  torch::nn::Linear at_once(3, 3);
  torch::manual_seed(1);
  auto deferred = deferred_init([] { return torch::nn::Linear(3, 3); });
  torch::manual_seed(4);
  CHECK_THROWS_AS(materialise(*deferred, Materialise{},
                              [](const std::string& /*name*/, const at::Tensor& /*slot*/, const at::Tensor& /*real*/) {
                                throw std::runtime_error("full");
                              }),
                  std::runtime_error);
  const auto number = torch::rand({1});
  torch::manual_seed(4);
  CHECK(torch::rand({1}).equal(number));
  materialise(*deferred);
  materialise(*deferred);  // is no harm
  check_equal(*at_once, *deferred);
}

TEST_CASE("[issue-8.6] modules that were deferred apart may be put together") {
  torch::manual_seed(1);
  torch::nn::Linear a(2, 2);
  torch::manual_seed(2);
  torch::nn::Linear b(2, 2);
  torch::manual_seed(1);
  auto deferred_a = deferred_init([] { return torch::nn::Linear(2, 2); });
  torch::manual_seed(2);
  auto deferred_b = deferred_init([] { return torch::nn::Linear(2, 2); });
  torch::nn::Sequential both(deferred_a, deferred_b, torch::nn::Linear(2, 2));
  materialise(*both);
  check_equal(*a, *deferred_a);
  check_equal(*b, *deferred_b);
}

TEST_CASE("[issue-8.6] init_module(make, {.empty = true}): setup makes the values, in the precision's dtype") {
  Fabric<Cpu, SingleDevice, F64> fabric;
  torch::manual_seed(1);
  auto at_once = fabric.init_module([] { return Zoo(); });
  torch::manual_seed(1);
  auto net = fabric.init_module([] { return Zoo(); }, {.empty = true});
  REQUIRE(net->linear->weight.is_meta());
  CHECK(net->linear->weight.scalar_type() == at::kDouble);
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(0.1)));
  auto model_at_once = fabric.setup(at_once);
  check_equal(*at_once, *net);
  net->linear(torch::ones({2, 4}, at::kDouble)).sum().backward();
  optimizer.step();
  CHECK_FALSE(at_once->linear->weight.equal(net->linear->weight));
  CHECK_FALSE(fabric.init_module([] { return Zoo(); }, {.empty = false})->linear->weight.is_meta());
}
