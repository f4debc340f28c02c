// SPDX-License-Identifier: Apache-2.0
// labels: torch precision
//
// Quantised weights: the arithmetic and the layers against stored results of Python's bitsandbytes. Bitsandbytes needs
// Cuda as a policy, but what it computes is LibTorch's operators, which are tested here on the CPU.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "fabric/precision/bitsandbytes.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"
#include "support/stderr.hpp"

namespace {

using namespace fabric;
using tests::read_reference;
using tests::tensor_of;
using Json = nlohmann::json;
using Mode = BitsandbytesMode;

const Json& reference() {
  static const Json json = read_reference("bitsandbytes.json.gz");
  return json;
}

template <Mode mode>
struct Is {
  static constexpr Mode value = mode;
  using Plugin = PrecisionPlugin<Bitsandbytes<mode>>;
  static const char* name() {
    constexpr const char* names[] = {"nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"};
    return names[static_cast<int>(mode)];
  }
};
using Nf4 = PrecisionPlugin<Bitsandbytes<Mode::nf4>>;
using Int8 = PrecisionPlugin<Bitsandbytes<Mode::int8>>;

/// Are the 16-bit results of sums equal, but for a last digit here and there where other kernels add up?
bool equal_sums(const at::Tensor& ours, const at::Tensor& theirs) {
  if (ours.scalar_type() != theirs.scalar_type()) return false;
  if (tests::same_kernels()) return ours.equal(theirs);
  const double digit = theirs.scalar_type() == at::kBFloat16 ? 0x1p-7 : 0x1p-9;
  const at::Tensor exact = theirs.to(at::kDouble);
  return at::allclose(ours.to(at::kDouble), exact, digit, digit * exact.abs().max().item<double>() / 4);
}

torch::nn::Linear layer_of(const Json& layers) {
  const at::Tensor weight = tensor_of(layers["weight"]);
  torch::nn::Linear layer(weight.size(1), weight.size(0));
  const torch::NoGradGuard no_grad;
  layer->weight.copy_(weight);
  layer->bias.copy_(tensor_of(layers["bias"]));
  return layer;
}

/// The bytes of a module's parameters and buffers, each storage once.
std::size_t bytes_of(const torch::nn::Module& module) {
  std::unordered_set<const void*> seen;
  std::size_t bytes = 0;
  for (const at::Tensor& tensor : module.parameters()) {
    if (seen.insert(tensor.storage().unsafeGetStorageImpl()).second) bytes += tensor.storage().nbytes();
  }
  return bytes;
}

Value state_of(const torch::nn::Module& module) {
  Dict state;
  for (const auto& item : module.named_parameters()) state[item.key()] = item.value().detach().clone();
  return state;
}
const at::Tensor& tensor_in(const Value& state, const std::string& name) {
  return state.as<Dict>("state").at(name).as<at::Tensor>(name);
}

}  // namespace

TEST_CASE("[issue-5.6] tensors become the package's bytes, and the same numbers again") {
  const Json& tensors = reference()["tensors"];
  CHECK(quantisation::code_of(quantisation::Code4::nf4, at::kCPU).equal(tensor_of(tensors["codes"]["nf4"])));
  CHECK(quantisation::code_of(quantisation::Code4::fp4, at::kCPU).equal(tensor_of(tensors["codes"]["fp4"])));
  const at::Tensor map = quantisation::dynamic_map(at::kCPU);
  CHECK(map.equal(tensor_of(tensors["dynamic_map"])));
  for (const auto& [name, stored_case] : tensors["cases"].items()) {
    INFO(name);
    const at::Tensor tensor = tensor_of(stored_case["tensor"]);
    const auto type = tensor.scalar_type();
    for (const auto& [kind, code] :
         {std::pair{"nf4", quantisation::Code4::nf4}, std::pair{"fp4", quantisation::Code4::fp4}}) {
      INFO(kind);
      const Json& expected = stored_case[kind];
      const auto [packed, absmax] = quantisation::quantise_4bit(tensor, code);
      CHECK(packed.equal(tensor_of(expected["packed"])));
      CHECK(absmax.equal(tensor_of(expected["absmax"])));
      const at::Tensor meaning = quantisation::code_of(code, at::kCPU);
      if (expected.contains("numbers")) {
        CHECK(quantisation::dequantise_4bit(packed, absmax, meaning, tensor.sizes(), type)
                  .equal(tensor_of(expected["numbers"])));
      }
      const at::Tensor offset = absmax.mean();
      CHECK(offset.item<float>() == tensor_of(expected["nested_offset"]).item<float>());
      const auto [codes, maxima] = quantisation::quantise_8bit(absmax - offset, map);
      CHECK(codes.equal(tensor_of(expected["nested_codes"])));
      CHECK(maxima.equal(tensor_of(expected["nested_absmax"])));
      const at::Tensor nested = quantisation::dequantise_8bit(codes, maxima, map, at::kFloat) + offset;
      const at::Tensor numbers = tensor_of(expected["nested_numbers"]);
      CHECK(quantisation::dequantise_4bit(packed, nested, meaning, tensor.sizes(), type)
                .slice(0, -numbers.size(0))
                .equal(numbers));
    }
    const auto [codes, absmax] = quantisation::quantise_8bit(tensor, map);
    CHECK(codes.equal(tensor_of(stored_case["8-bit"]["codes"])));
    CHECK(absmax.equal(tensor_of(stored_case["8-bit"]["absmax"])));
    if (stored_case["8-bit"].contains("numbers")) {
      CHECK(quantisation::dequantise_8bit(codes, absmax, map, type).equal(tensor_of(stored_case["8-bit"]["numbers"])));
    }
    if (!stored_case.contains("rows")) continue;
    const auto rows = quantisation::quantise_int8_rows(tensor.to(at::kHalf));
    CHECK(rows.codes.equal(tensor_of(stored_case["rows"]["codes"])));
    CHECK(rows.absmax.equal(tensor_of(stored_case["rows"]["absmax"])));
    const auto kept = quantisation::quantise_int8_rows(tensor.to(at::kHalf) * 3, 6.0);
    const Json& without = stored_case["rows without outliers"];
    CHECK(kept.codes.equal(tensor_of(without["codes"])));
    CHECK(kept.absmax.equal(tensor_of(without["absmax"])));
    CHECK(kept.outliers.equal(tensor_of(without["outliers"])));
  }
}

TEST_CASE("[issue-5.6] integer products are exact, whatever their size") {
  torch::manual_seed(0);
  for (const int64_t k : {8L, 1039L, 5000L}) {
    const at::Tensor a = torch::randint(-127, 128, {3, k}).to(at::kChar);
    const at::Tensor b = torch::full({5, k}, 127, at::kChar);
    const at::Tensor exact = a.to(at::kLong).mm(b.to(at::kLong).t());
    CHECK(quantisation::int8_product(a, b).to(at::kLong).equal(exact));
  }
}

TEMPLATE_TEST_CASE("[issue-5.6] a quantised layer computes what the package's does, forward and backward", "",
                   Is<Mode::nf4>, Is<Mode::nf4_dq>, Is<Mode::fp4>, Is<Mode::fp4_dq>, Is<Mode::int8>,
                   Is<Mode::int8_training>) {
  using Plugin = typename TestType::Plugin;
  const Json& layers = reference()["layers"];
  const Json& expected = layers[TestType::name()];
  torch::nn::Linear layer = layer_of(layers);
  Plugin::convert_module(*layer);
  at::Tensor x = Plugin::convert_input(tensor_of(layers["x"])).set_requires_grad(true);
  at::Tensor out;
  {
    const typename Plugin::ForwardContext context(at::kCPU);
    out = layer(x);
  }
  const at::Tensor theirs = tensor_of(expected["out"]);
  CHECK(equal_sums(out, theirs));
  out.backward(tensor_of(layers["gradient"]).to(out.scalar_type()));
  CHECK(equal_sums(x.grad(), tensor_of(expected["x_gradient"])));
  CHECK(equal_sums(layer->bias.grad(), tensor_of(expected["bias_gradient"]).to(layer->bias.scalar_type())));
  if (TestType::value == Mode::int8_training) {
    CHECK(equal_sums(layer->weight.grad(), tensor_of(expected["weight_gradient"])));
  } else {
    CHECK_FALSE(layer->weight.requires_grad());
  }

  SECTION("with more dimensions, where LibTorch runs other operators") {
    const typename Plugin::ForwardContext context(at::kCPU);
    const at::Tensor again = layer(x.detach().view({1, 17, 128}));
    CHECK(again.sizes() == at::IntArrayRef{1, 17, 48});
    CHECK(at::allclose(again[0].to(at::kFloat), theirs.to(at::kFloat), 0.02, 0.02));
  }
  SECTION("in inference mode") {
    const typename Plugin::ForwardContext context(at::kCPU);
    const c10::InferenceMode inference;
    CHECK(equal_sums(layer(x.detach()), theirs));
  }
  if (expected.contains("state")) {
    SECTION("its state has the package's names and bytes") {
      const auto ours = layer->named_parameters();
      CHECK(ours.size() == expected["state"].size());
      for (const auto& [key, tensor] : expected["state"].items()) {
        INFO(key);
        REQUIRE(ours.contains(key));
        if (key.find("quant_state") == std::string::npos) {
          CHECK(ours[key].detach().to(at::kFloat).equal(tensor_of(tensor).to(at::kFloat)));
          continue;
        }
        const auto text = [](const at::Tensor& bytes) {
          std::string result(static_cast<const char*>(bytes.data_ptr()), static_cast<std::size_t>(bytes.numel()));
          return Json::parse(result);
        };
        CHECK(text(ours[key].detach()) == text(tensor_of(tensor)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("[issue-5.6] training around and through quantised layers follows Python's steps", "", Is<Mode::nf4>,
                   Is<Mode::nf4_dq>, Is<Mode::fp4>, Is<Mode::fp4_dq>, Is<Mode::int8>, Is<Mode::int8_training>) {
  using Plugin = typename TestType::Plugin;
  const Json& traces = reference()["traces"];
  const std::vector<std::pair<int64_t, int64_t>> sizes{{24, 64}, {64, 32}, {32, 8}};
  std::vector<torch::nn::Linear> layers;
  torch::nn::Sequential net;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    layers.emplace_back(sizes[i].first, sizes[i].second);
    const torch::NoGradGuard no_grad;
    layers[i]->weight.copy_(tensor_of(traces["weights"][i]));
    layers[i]->bias.copy_(tensor_of(traces["biases"][i]));
    net->push_back(layers[i]);
    if (i + 1 < sizes.size()) net->push_back(torch::nn::ReLU());
  }
  Plugin::convert_module(*net, {.ignore_modules = {"0", "4"}});
  torch::optim::SGD optimizer(net->parameters(), traces["lr"].get<double>());
  const at::Tensor x = tensor_of(traces["x"]);
  const at::Tensor y = tensor_of(traces["y"]);
  double worst = 0;
  int64_t step = 0;
  for (const double expected : traces[TestType::name()].template get<std::vector<double>>()) {
    optimizer.zero_grad();
    at::Tensor out;
    {
      const typename Plugin::ForwardContext context(at::kCPU);
      out = net->forward(Plugin::convert_input(x[step]));
    }
    const at::Tensor loss = torch::mse_loss(Plugin::convert_output(out), y[step++]);
    loss.backward();
    optimizer.step();
    worst = std::max(worst, std::abs(loss.template item<double>() - expected) / expected);
  }
  CHECK(worst <= (tests::same_kernels() ? 0 : 1e-2));
}

TEST_CASE("[issue-5.6] the memory of the weights before is free, also where an optimizer holds them") {
  torch::nn::Sequential net(torch::nn::Linear(256, 512), torch::nn::Linear(512, 256));
  const torch::optim::AdamW optimizer(net->parameters());
  const auto before = net[0]->as<torch::nn::Linear>()->weight.storage().getWeakStorageImpl();
  constexpr std::size_t weights = 2UL * 256 * 512;
  constexpr std::size_t biases = (256UL + 512) * 2;
  SECTION("4 bits and a 32-bit number for 64 of them") {
    Nf4::convert_module(*net);
    CHECK(bytes_of(*net) < weights / 2 + weights / 64 * 4 + biases + 1000);
  }
  SECTION("4 bits and 8 for 64 of them") {
    PrecisionPlugin<Bitsandbytes<Mode::nf4_dq>>::convert_module(*net);
    CHECK(bytes_of(*net) < weights / 2 + weights / 64 + biases + 4000);
  }
  SECTION("8 bits and a 32-bit number for each row") {
    Int8::convert_module(*net);
    CHECK(bytes_of(*net) < weights + (256 + 512) * 4 + biases + 1000);
  }
  CHECK(before.expired());
}

TEST_CASE("[issue-5.6] ignored layers, tied weights and what is no linear layer stay in the compute dtype") {
  struct Mixed : torch::nn::Module {
    torch::nn::Embedding embedding = register_module("embedding", torch::nn::Embedding(64, 32));
    torch::nn::Linear body = register_module("body", torch::nn::Linear(32, 32));
    torch::nn::Linear again = register_module("again", torch::nn::Linear(32, 32));
    torch::nn::LayerNorm norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({32})));
    torch::nn::Linear tied = register_module("tied", torch::nn::Linear(32, 64));
    torch::nn::Linear lm_head = register_module("lm_head", torch::nn::Linear(32, 64));
    Mixed() {
      tied->weight = embedding->weight;
      again->weight = body->weight;
    }
    at::Tensor forward(const at::Tensor& words) { return lm_head(norm(again(body(embedding(words))))); }
  };
  Mixed module;
  const std::string said = tests::stderr_of([&] {
    Nf4::convert_module(module, {.ignore_modules = {"lm_head", "head"}});
  });
  CHECK_THAT(said, ContainsSubstring("share their weights with other modules and are not quantised: tied"));
  CHECK_THAT(said, ContainsSubstring("no linear layer's name begins with head"));
  CHECK(module.body->weight.scalar_type() == at::kByte);
  CHECK(module.again->weight.is_same(module.body->weight));
  for (const at::Tensor& kept : {module.embedding->weight, module.tied->weight, module.norm->weight,
                                 module.lm_head->weight, module.lm_head->bias, module.body->bias}) {
    CHECK(kept.scalar_type() == at::kBFloat16);
  }
  CHECK(module.named_parameters()["body.weight.absmax"].scalar_type() == at::kFloat);
  const Nf4::ForwardContext context(at::kCPU);
  CHECK(module.forward(torch::arange(8)).sizes() == at::IntArrayRef{8, 64});

  CHECK_THROWS_WITH(Nf4::convert_module(*module.norm), ContainsSubstring("has none"));
}

TEST_CASE("[issue-5.6] LibTorch's archives hold what they can, and refuse the rest") {
  torch::nn::Sequential net(torch::nn::Linear(64, 32));
  Int8::convert_module(*net);
  std::stringstream archive;
  torch::save(net, archive);
  torch::nn::Sequential again(torch::nn::Linear(64, 32));
  Int8::convert_module(*again);
  torch::load(again, archive);
  for (const auto& item : net->named_parameters()) CHECK(again->named_parameters()[item.key()].equal(item.value()));

  torch::nn::Sequential packed(torch::nn::Linear(64, 32));
  Nf4::convert_module(*packed);
  CHECK_THROWS(torch::save(packed, archive));
  CHECK_THROWS(packed->clone());
}

TEST_CASE("[issue-5.6] setting up again quantises nothing twice") {
  torch::nn::Sequential net(torch::nn::Linear(64, 32), torch::nn::Linear(32, 16));
  Nf4::convert_module(*net);
  const Value once = state_of(*net);
  Nf4::convert_module(*net);
  PrecisionPlugin<Bitsandbytes<Mode::fp4>>::convert_module(*net);
  for (const auto& item : net->named_parameters()) {
    CHECK(item.value().equal(tensor_in(once, item.key())));
  }
}

TEST_CASE("[issue-5.6] a module that was set up for another way to train is refused") {
  torch::nn::Sequential net(torch::nn::Linear(64, 32));
  PrecisionPlugin<Bitsandbytes<Mode::int8_training>>::convert_module(*net);
  CHECK_NOTHROW(PrecisionPlugin<Bitsandbytes<Mode::int8_training>>::convert_module(*net));
  CHECK_THROWS_WITH(Nf4::convert_module(*net), ContainsSubstring("set up with int8-training before"));
  CHECK(net[0]->as<torch::nn::Linear>()->weight.scalar_type() == at::kHalf);
}

TEST_CASE("[issue-5.6] a layer of 4 bits computes in the compute dtype and answers in its input's") {
  torch::manual_seed(3);
  torch::nn::Linear layer(64, 32);
  Nf4::convert_module(*layer);
  const at::Tensor x = torch::randn({5, 64});
  const Nf4::ForwardContext context(at::kCPU);
  const at::Tensor expected = layer(x.to(at::kBFloat16));
  CHECK(expected.scalar_type() == at::kBFloat16);
  for (const at::ScalarType type : {at::kFloat, at::kHalf}) {
    const at::Tensor input = x.clone().to(type).requires_grad_();
    const at::Tensor out = layer(input);
    CHECK(out.scalar_type() == type);
    CHECK(out.equal(layer(input.to(at::kBFloat16)).to(type)));
    out.sum().backward();
    CHECK(input.grad().scalar_type() == type);
    CHECK(input.grad().norm().item<float>() > 0);
  }
}

TEST_CASE("[issue-5.6] the tensors of a state have the same sizes, whatever the weights' dtype was") {
  const auto make = [](at::ScalarType type) {
    torch::nn::Linear layer(64, 32);
    layer->to(type);
    return layer;
  };
  const auto check = [&](auto plugin) {
    auto of_floats = make(at::kFloat);
    auto of_half = make(at::kBFloat16);
    decltype(plugin)::convert_module(*of_floats);
    decltype(plugin)::convert_module(*of_half);
    for (const auto& item : of_floats->named_parameters()) {
      INFO(item.key());
      CHECK(item.value().sizes() == of_half->named_parameters()[item.key()].sizes());
    }
  };
  check(Nf4());
  check(PrecisionPlugin<Bitsandbytes<Mode::fp4_dq>>());
}

TEMPLATE_TEST_CASE("[issue-5.6] a state that is quantised is loaded as it is, before and after setup", "",
                   Is<Mode::nf4>, Is<Mode::nf4_dq>, Is<Mode::fp4>, Is<Mode::fp4_dq>, Is<Mode::int8>) {
  using Plugin = typename TestType::Plugin;
  torch::manual_seed(2);
  const auto make = [] { return torch::nn::Sequential(torch::nn::Linear(96, 64), torch::nn::Linear(64, 37)); };
  const auto output = [](torch::nn::Sequential& net) {
    const torch::NoGradGuard no_grad;
    const typename Plugin::ForwardContext context(at::kCPU);
    return net->forward(Plugin::convert_input(torch::ones({2, 96})));
  };
  auto trained = make();
  Plugin::convert_module(*trained);
  const Value state = state_of(*trained);

  auto after = make();
  Plugin::convert_module(*after);
  CHECK_FALSE(output(after).equal(output(trained)));
  load_quantised(*after, state);
  auto before = make();
  load_quantised(*before, state);
  Plugin::convert_module(*before);
  // And as a checkpoint reader does, into the tensors that are there.
  auto copied = make();
  Plugin::convert_module(*copied);
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : copied->named_parameters()) {
      item.value().copy_(tensor_in(state, item.key()));
    }
  }
  for (auto& net : {std::ref(after), std::ref(before), std::ref(copied)}) {
    for (const auto& item : trained->named_parameters()) {
      if (item.key().find("bias") != std::string::npos) continue;  // not load_quantised's business
      INFO(item.key());
      CHECK(net.get()->named_parameters()[item.key()].equal(item.value()));
    }
    const torch::NoGradGuard no_grad;
    for (const std::string bias : {"0.bias", "1.bias"}) {
      net.get()->named_parameters()[bias].copy_(trained->named_parameters()[bias]);
    }
    CHECK(output(net.get()).equal(output(trained)));
  }
}

TEST_CASE("[issue-5.6] a state of floats is quantised as it is loaded") {
  torch::nn::Sequential source(torch::nn::Linear(64, 32));
  const Value floats = state_of(*source);
  const auto check = [&](auto plugin) {
    torch::nn::Sequential net(torch::nn::Linear(64, 32));
    decltype(plugin)::convert_module(*net);
    load_quantised(*net, floats);
    torch::nn::Sequential expected(torch::nn::Linear(64, 32));
    load_quantised(*expected, floats);
    CHECK(expected->named_parameters()["0.weight"].equal(source->named_parameters()["0.weight"]));
    decltype(plugin)::convert_module(*expected);
    for (const auto& item : expected->named_parameters()) {
      if (item.key() == "0.bias") continue;
      CHECK(item.value().equal(net->named_parameters()[item.key()]));
    }
    {
      const torch::NoGradGuard no_grad;
      net->named_parameters()["0.bias"].copy_(expected->named_parameters()["0.bias"]);
    }
    // Computed by the packed weights still, in the compute dtype, which the load has not changed.
    const typename decltype(plugin)::ForwardContext context(at::kCPU);
    const at::Tensor x = torch::ones({2, 64}, at::kFloat);
    CHECK(net->forward(x).equal(expected->forward(x)));
    CHECK(net->forward(x).equal(net->forward(decltype(plugin)::convert_input(x)).to(at::kFloat)));
  };
  check(Nf4());
  check(PrecisionPlugin<Bitsandbytes<Mode::fp4_dq>>());
  check(Int8());
}

TEST_CASE("[issue-5.6] a state that Python's package wrote is read") {
  const Json& layers = reference()["layers"];
  for (const std::string mode : {"nf4", "nf4-dq", "fp4", "fp4-dq", "int8"}) {
    INFO(mode);
    const at::ScalarType type = mode == "int8" ? at::kHalf : at::kBFloat16;
    Dict state;
    for (const auto& [key, tensor] : layers[mode]["state"].items()) state[key] = tensor_of(tensor);
    torch::nn::Linear layer = layer_of(layers);
    load_quantised(*layer, state);
    layer->to(at::kCPU);
    const torch::NoGradGuard no_grad;
    layer->bias.set_data(layer->bias.to(type));
    const SubstitutedLinears context;
    CHECK(equal_sums(layer(tensor_of(layers["x"]).to(type)), tensor_of(layers[mode]["out"])));
  }
}

TEST_CASE("[issue-5.6] a state that does not fit is refused whole, and nothing has changed") {
  torch::nn::Sequential net(torch::nn::Linear(64, 32), torch::nn::Linear(32, 16));
  Nf4::convert_module(*net);
  const Value good = state_of(*net);
  const auto without = [&](const std::string& name, const Value& instead) {
    Dict state;
    for (const auto& [key, value] : good.as<Dict>("state")) {
      if (std::get<std::string>(key) != name) state[key] = value;
    }
    if (!instead.is_none()) state[name] = instead;
    return Value(state);
  };
  const auto text = [](const std::string& bytes) {
    return torch::tensor(std::vector<std::uint8_t>(bytes.begin(), bytes.end()));
  };
  const std::string blob = "0.weight.quant_state.bitsandbytes__nf4";
  CHECK_THROWS_WITH(load_quantised(*net, without("0.weight", {})), ContainsSubstring("0.weight is missing"));
  CHECK_THROWS_WITH(load_quantised(*net, without("1.weight.absmax", {})),
                    ContainsSubstring("1.weight needs weight.absmax with 8 numbers of Float"));
  CHECK_THROWS_WITH(load_quantised(*net, without(blob, {})), ContainsSubstring("is missing"));
  CHECK_THROWS_WITH(load_quantised(*net, without("0.weight", torch::zeros({5, 1}, at::kByte))),
                    ContainsSubstring("is not of the layer's sizes (32, 64)"));
  CHECK_THROWS_WITH(load_quantised(*net, without("0.weight", torch::zeros({32, 64}, at::kChar))),
                    ContainsSubstring("SCB with a number for each row is missing"));
  CHECK_THROWS_WITH(load_quantised(*net, without("0.weight", std::string("x"))), ContainsSubstring("is a text"));
  for (const std::string bad : {"", "{", "{\"quant_type\": \"af4\"}", "{\"quant_type\": \"nf4\", \"blocksize\": 128}",
                                "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float64\"}",
                                "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [32]}",
                                "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [32, "
                                "64], \"nested_blocksize\": "
                                "256, \"nested_offset\": \"?\"}",
                                "{\"quant_type\":", "{\"quant_type\": \"nf4"}) {
    INFO(bad);
    CHECK_THROWS_AS(load_quantised(*net, without(blob, text(bad))), Error);
  }
  // Both problems at once.
  Dict empty;
  CHECK_THROWS_WITH(load_quantised(*net, empty), ContainsSubstring("0.weight") && ContainsSubstring("1.weight"));
  for (const auto& item : net->named_parameters()) {
    CHECK(item.value().equal(tensor_in(good, item.key())));
  }
}

TEMPLATE_TEST_CASE("[issue-5.6] dtypes are those of the reference's plugin", "", Is<Mode::nf4>, Is<Mode::nf4_dq>,
                   Is<Mode::fp4>, Is<Mode::fp4_dq>, Is<Mode::int8>, Is<Mode::int8_training>) {
  using Plugin = typename TestType::Plugin;
  // The rows of a machine with GPUs, since the policy needs one.
  Json row;
  for (const std::string& line : tests::gunzip_lines(FABRIC_SOURCE_DIR "/tests/oracle/data/precision.jsonl.gz")) {
    const Json json = Json::parse(line);
    if (json["kind"] != "plugin" || json["plugin"]["class"] != "BitsandbytesPrecision" || json["host"].empty())
      continue;
    const Json& kwargs = json["plugin"]["kwargs"];
    if (kwargs["mode"] == TestType::name() && !kwargs.contains("dtype")) row = json["outcome"];
  }
  REQUIRE(row["ok"] == true);
  const auto type = [](const Json& name) {
    static const std::map<std::string, at::ScalarType> types{
        {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float32", at::kFloat}, {"float64", at::kDouble},
        {"int64", at::kLong},   {"int8", at::kChar},         {"bool", at::kBool},     {"complex64", at::kComplexFloat}};
    return types.at(name.get<std::string>());
  };
  const auto default_dtype = [] { return c10::typeMetaToScalarType(c10::get_default_dtype()); };
  CHECK(Plugin::dtype == type(row["dtype"]));
  for (const auto& [from, to] : row["convert_input"].items()) {
    CHECK(Plugin::convert_input(torch::ones({2}, type(from))).scalar_type() == type(to));
  }
  for (const auto& [from, to] : row["convert_output"].items()) {
    CHECK(Plugin::convert_output(torch::ones({2}, type(from))).scalar_type() == type(to));
  }
  {
    [[maybe_unused]] const typename Plugin::InitContext context;
    CHECK(default_dtype() == type(row["module_init_context"]["default"]));
  }
  {
    [[maybe_unused]] const typename Plugin::ForwardContext context(at::kCPU);
    CHECK(default_dtype() == type(row["forward_context"]["default"]));
  }
  CHECK(default_dtype() == at::kFloat);
}

TEST_CASE("[issue-5.6] the 4-bit modes compute in half floats if told to") {
  using Half = Bitsandbytes<Mode::nf4, F16>;
  STATIC_REQUIRE(Half::facts.compute == Scalar::f16);
  STATIC_REQUIRE(Bitsandbytes<Mode::nf4>::facts.compute == Scalar::bf16);
  torch::nn::Linear layer(64, 32);
  PrecisionPlugin<Half>::convert_module(*layer);
  const PrecisionPlugin<Half>::ForwardContext context(at::kCPU);
  CHECK(layer(torch::ones({2, 64}, at::kHalf)).scalar_type() == at::kHalf);
}
