// SPDX-License-Identifier: Apache-2.0
// labels: torch precision
//
// FP8 training: the arithmetic against stored results of Python's PyTorch, the layers that it finds, and that it
// learns.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "fabric/precision/bitsandbytes.hpp"
#include "fabric/precision/transformer_engine.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"
#include "support/stderr.hpp"

namespace {

using namespace fabric;
using tests::read_reference;
using tests::tensor_of;
using Json = nlohmann::json;
using Fp8 = PrecisionPlugin<TransformerEngine<>>;

bool equal_with_nans(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 0, 0, /*equal_nan=*/true); }

/// The recipes of tests/reference/fp8.py.
Fp8Recipe recipe_of(const std::string& name) {
  if (name == "short history") return {.amax_history_len = 4};
  if (name == "most recent") return {.amax_history_len = 16, .amax_compute_algo = AmaxCompute::most_recent};
  if (name == "margin") return {.margin = 3};
  if (name == "interval") return {.interval = 5, .amax_history_len = 8};
  if (name == "E4M3") return {.amax_history_len = 16, .fp8_format = Fp8Format::e4m3};
  if (name == "half weights") return {.amax_history_len = 16};
  return {};
}

/// A module of a user's, which holds its layers by type.
struct NetImpl : torch::nn::Module {
  NetImpl()
      : first(register_module("first", torch::nn::Linear(64, 64))),
        norm(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({64})))),
        second(register_module("second", torch::nn::Linear(64, 32))),
        head(register_module("head", torch::nn::Linear(32, 10))) {}
  at::Tensor forward(const at::Tensor& x) { return head(torch::relu(second(norm(torch::gelu(first(x)))))); }

  torch::nn::Linear first;
  torch::nn::LayerNorm norm;
  torch::nn::Linear second, head;
};
TORCH_MODULE(Net);

/// Images (rows, 64) and labels of the first digits.
std::pair<at::Tensor, at::Tensor> digits(int64_t rows) {
  std::ifstream file(FABRIC_SOURCE_DIR "/examples/data/digits.csv");
  std::vector<float> numbers;
  std::string line;
  for (int64_t row = 0; row < rows && std::getline(file, line); ++row) {
    std::istringstream fields(line);
    for (std::string field; std::getline(fields, field, ',');) numbers.push_back(std::stof(field));
  }
  const at::Tensor table = torch::tensor(numbers).view({rows, 65});
  return {table.slice(1, 0, 64) / 16, table.select(1, 64).to(torch::kLong)};
}

/// The product of a linear layer in FP8 with scales of one, in 32 bits.
at::Tensor product_in_fp8(const at::Tensor& x, const at::Tensor& w) {
  const auto rounded = [](const at::Tensor& tensor) {
    return tensor.to(torch::kBFloat16).to(at::kFloat8_e4m3fn).to(torch::kFloat);
  };
  return rounded(x).matmul(rounded(w).t());
}

}  // namespace

TEST_CASE("[issue-5.5] numbers become FP8 as in Python, saturated") {
  const Json codes = read_reference("fp8.json.gz")["codes"];
  const at::Tensor numbers = tensor_of(codes["numbers"]);
  const at::Tensor scales = tensor_of(codes["scales"]);
  for (const auto& [name, type] : {std::pair{"E4M3", at::kFloat8_e4m3fn}, std::pair{"E5M2", at::kFloat8_e5m2}}) {
    for (int64_t i = 0; i < scales.numel(); ++i) {
      const at::Tensor quantised = fp8::quantise(numbers, scales[i], type);
      CHECK(quantised.view(torch::kByte).equal(tensor_of(codes[name][i])));
      CHECK_FALSE(quantised.to(torch::kFloat).isinf().any().item<bool>());
    }
  }
}

TEST_CASE("[issue-5.5] scales follow the magnitudes of the steps before, by each of the recipe's knobs") {
  const Json scalings = read_reference("fp8.json.gz")["scalings"];
  const at::Tensor magnitudes = tensor_of(scalings["magnitudes"]);
  for (const std::string name : {"default", "short history", "most recent", "margin", "interval"}) {
    INFO(name);
    Fp8Recipe recipe = recipe_of(name);
    const at::Tensor expected = tensor_of(scalings[name]["history"]);
    recipe.amax_history_len = static_cast<int>(expected.size(1));
    at::Tensor history = torch::zeros({2, recipe.amax_history_len});
    at::Tensor scale = torch::ones({2});
    const at::Tensor bound = torch::tensor({448.0F, 57344.0F});
    for (int64_t step = 0; step < magnitudes.numel(); ++step) {
      history.select(1, 0).fill_(magnitudes[step].item<float>());
      fp8::update_scales(history, scale, bound, torch::tensor(step + 1), recipe);
      CHECK(equal_with_nans(history[0], expected[step]));
      CHECK(scale[0].item<float>() == tensor_of(scalings[name]["scale"])[step].item<float>());
      // The other operand differs by its type alone.
      if (scale[0].item<float>() != 1 && scale[1].item<float>() < 1e37) {
        CHECK(scale[1].item<float>() == Approx(scale[0].item<float>() * 128));
      }
    }
  }
}

TEST_CASE("[issue-5.5] the tensor cores' operator and the emulation give the same products") {
  torch::manual_seed(0);
  const at::Tensor bias = torch::randn({24}).to(torch::kBFloat16);
  for (const auto& [a_type, b_type] :
       {std::pair{at::kFloat8_e4m3fn, at::kFloat8_e4m3fn}, std::pair{at::kFloat8_e5m2, at::kFloat8_e4m3fn}}) {
    const at::Tensor a = torch::randn({7, 40}).to(a_type);  // no multiples of 16: padded
    const at::Tensor b = torch::randn({24, 40}).to(b_type);
    const at::Tensor inverse_a = torch::full({}, 0.25F);
    const at::Tensor inverse_b = torch::full({}, 0.3F);
    for (const std::optional<at::Tensor>& added : {std::optional<at::Tensor>{}, std::optional{bias}}) {
      const auto product = [&](fp8::Kernel kernel) {
        return fp8::product(a, b, inverse_a, inverse_b, added, torch::kBFloat16, false, kernel);
      };
      const at::Tensor native = product(fp8::Kernel::scaled_mm);
      CHECK(native.sizes() == at::IntArrayRef{7, 24});
      CHECK(native.scalar_type() == torch::kBFloat16);
      CHECK(at::allclose(native.to(torch::kFloat), product(fp8::Kernel::emulation).to(torch::kFloat), 8e-3, 1e-6));
    }
  }
}

TEST_CASE("[issue-5.5] a layer's forward and backward are products of FP8 numbers, whoever holds it") {
  torch::manual_seed(1);
  const at::Tensor x = torch::randn({5, 32});
  const auto check = [&](torch::nn::Module& module, const torch::nn::Linear& layer, auto&& forward,
                         const at::Tensor& in) {
    const at::Tensor weight = layer->weight.detach().clone();
    Fp8::convert_module(module);
    const at::Tensor input = in.to(torch::kBFloat16).requires_grad_();
    {
      const Fp8::ForwardContext context(torch::kCPU);
      const at::Tensor out = forward(input).to(torch::kFloat);
      CHECK(at::allclose(out, product_in_fp8(in, weight) + layer->bias.to(torch::kFloat), 1e-2, 1e-2));
      // bfloat16 would have come out nearer to this.
      CHECK_FALSE(
          at::allclose(out, torch::linear(in, weight, layer->bias.to(torch::kFloat)).to(torch::kFloat), 1e-2, 1e-2));
      out.sum().backward();
    }
    const at::Tensor w8 = weight.to(torch::kBFloat16).to(at::kFloat8_e4m3fn).to(torch::kFloat);
    CHECK(at::allclose(input.grad().to(torch::kFloat), w8.sum(0).expand_as(in), 1e-2, 1e-2));
    const at::Tensor x8 = in.to(torch::kBFloat16).to(at::kFloat8_e4m3fn).to(torch::kFloat).reshape({-1, 32});
    CHECK(at::allclose(layer->weight.grad().to(torch::kFloat), x8.sum(0).expand_as(weight), 1e-2, 5e-2));
    CHECK(layer->bias.grad().sum().item<float>() == static_cast<float>(16 * x8.size(0)));
  };

  SECTION("a module that holds it by its type") {
    struct Typed : torch::nn::Module {
      torch::nn::Linear layer = register_module("layer", torch::nn::Linear(32, 16));
    } typed;
    check(
        typed, typed.layer, [&](const at::Tensor& in) { return typed.layer->forward(in); }, x);
  }
  SECTION("the layer itself") {
    torch::nn::Linear layer(32, 16);
    check(
        *layer, layer, [&](const at::Tensor& in) { return layer(in); }, x);
  }
  SECTION("Sequential, nested") {
    torch::nn::Linear layer(32, 16);
    torch::nn::Sequential inner(layer);
    torch::nn::Sequential outer(inner);
    check(
        *outer, layer, [&](const at::Tensor& in) { return inner->forward(in); }, x);
  }
  SECTION("more dimensions than two, where LibTorch runs other operators") {
    torch::nn::Linear layer(32, 16);
    check(
        *layer, layer, [&](const at::Tensor& in) { return layer(in); }, x.view({1, 5, 32}).repeat({3, 1, 1}));
  }
  SECTION("torch::linear on its weight") {
    torch::nn::Linear layer(32, 16);
    check(
        *layer, layer, [&](const at::Tensor& in) { return torch::linear(in, layer->weight, layer->bias); }, x);
  }
}

TEST_CASE("[issue-5.5] only layers are intercepted, only in a forward, and only FP8 ones") {
  torch::manual_seed(1);
  torch::nn::Linear layer(32, 16);
  torch::nn::Linear other(32, 16);
  layer->to(torch::kBFloat16);
  other->to(torch::kBFloat16);
  Fp8::convert_module(*layer);
  const at::Tensor x = torch::randn({4, 32}).to(torch::kBFloat16);
  const at::Tensor plain = torch::addmm(layer->bias, x, layer->weight.detach().clone().t());
  CHECK(layer(x).equal(plain));
  const at::Tensor of_other = other(x);
  const Fp8::ForwardContext context(torch::kCPU);
  CHECK_FALSE(layer(x).equal(plain));
  CHECK(other(x).equal(of_other));
  // Products with the weight that are no linear layer's.
  const at::Tensor y = torch::randn({4, 16}).to(torch::kBFloat16);
  CHECK(y.matmul(layer->weight).equal(y.matmul(layer->weight.detach().clone())));
  CHECK(torch::addmm(layer->bias, x, layer->weight.t(), 2, 1)
            .equal(torch::addmm(layer->bias, x, layer->weight.detach().clone().t(), 2, 1)));
  {
    const c10::InferenceMode inference;
    CHECK_FALSE(layer(x).equal(plain));
  }
}

TEST_CASE("[issue-5.5] evaluation changes no scale and no history") {
  Fabric<Cpu, SingleDevice, TransformerEngine<>> fabric;
  auto model = fabric.setup(torch::nn::Linear(32, 16));
  const auto history = [&] { return model->named_buffers()["fp8.amax_history"].clone(); };
  const at::Tensor x = torch::randn({4, 32});
  {
    const torch::NoGradGuard no_grad;
    model(x);
  }
  CHECK(history().eq(0).all().item<bool>());
  const at::Tensor out = model(x);
  CHECK(history().select(1, 0).slice(0, 0, 2).gt(0).all().item<bool>());
  fabric.backward(out.sum());
  CHECK(history().select(1, 0).eq(0).all().item<bool>());
  CHECK(history().select(1, -1).gt(0).all().item<bool>());
  CHECK(model->named_buffers()["fp8.scale"].ne(1).all().item<bool>());
}

TEST_CASE("[issue-5.5] training follows Python's steps, whatever the recipe") {
  const Json traces = read_reference("fp8.json.gz")["traces"];
  const int64_t rows = traces["rows"];
  const auto [images, labels] = digits(25 * rows);
  const auto follow = [&, &images = images, &labels = labels](auto& fabric, const Json& trace, double tolerance) {
    Net net;
    {
      const torch::NoGradGuard no_grad;
      for (auto& item : net->named_parameters()) item.value().copy_(tensor_of(traces["weights"][item.key()]));
    }
    auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), traces["lr"].get<double>()));
    double worst = 0;
    int64_t step = 0;
    for (const double expected : trace["losses"].template get<std::vector<double>>()) {
      const int64_t at = step++ * rows % images.size(0);
      optimizer.zero_grad();
      const at::Tensor loss =
          torch::cross_entropy_loss(model(images.slice(0, at, at + rows)), labels.slice(0, at, at + rows));
      fabric.backward(loss);
      optimizer.step();
      worst = std::max(worst, std::abs(loss.template item<double>() - expected) / expected);
    }
    CHECK(worst <= tolerance);
    const auto buffers = net->named_buffers();
    const at::Tensor scale = tensor_of(trace["scale"]);
    CHECK(at::allclose(buffers["second.fp8.scale"], scale, 0.05, 0));
    const at::Tensor history = tensor_of(trace["amax_history"]);
    CHECK(at::allclose(buffers["second.fp8.amax_history"].slice(1, -history.size(1)), history, 0.1, 1e-6));
  };
  for (const std::string name : {"default", "short history", "most recent", "margin", "interval", "E4M3"}) {
    INFO(name);
    Fabric<Cpu, SingleDevice, TransformerEngine<BF16>> fabric({.precision = {.recipe = recipe_of(name)}});
    follow(fabric, traces[name], tests::same_kernels() ? 0 : 2e-2);
  }
  Fabric<Cpu, SingleDevice, TransformerEngine<F16>> fabric({.precision = {.recipe = recipe_of("half weights")}});
  follow(fabric, traces["half weights"], tests::same_kernels() ? 0 : 2e-2);
}

TEST_CASE("[issue-5.5] layers that FP8 cannot take, or that are ignored, are named and left in the weights' dtype") {
  struct MixedImpl : torch::nn::Module {
    MixedImpl() {
      register_module("fits", torch::nn::Linear(32, 48));
      register_module("narrow", torch::nn::Linear(32, 10));
      register_module("odd", torch::nn::Linear(33, 16));
      register_module("kept", torch::nn::Sequential(torch::nn::Linear(16, 16)));
      register_module("attention", torch::nn::MultiheadAttention(32, 2));
      register_buffer("count", torch::zeros({2}, torch::kLong));
      register_buffer("mean", torch::zeros({2}));
    }
  };
  MixedImpl module;
  const std::string said = tests::stderr_of([&] {
    Fp8::convert_module(module, {.ignore_modules = {"kept", "lm_head"}});
  });
  CHECK_THAT(said, ContainsSubstring("stay in BF16: narrow (32 -> 10), odd (33 -> 16)"));
  CHECK_THAT(said,
             ContainsSubstring("input projections of MultiheadAttention are no Linear and stay in BF16: attention"));
  CHECK_THAT(said, ContainsSubstring("no linear layer's name begins with lm_head"));
  CHECK(said.find("fits") == std::string::npos);
  const auto buffers = module.named_buffers();
  CHECK(buffers.contains("fits.fp8.scale"));
  CHECK(buffers.contains("attention.out_proj.fp8.scale"));
  for (const std::string name : {"narrow", "odd", "kept.0"}) CHECK_FALSE(buffers.contains(name + ".fp8.scale"));
  for (const auto& item : module.named_parameters()) CHECK(item.value().scalar_type() == torch::kBFloat16);
  CHECK(buffers["mean"].scalar_type() == torch::kBFloat16);
  CHECK(buffers["count"].scalar_type() == torch::kLong);

  SECTION("not on other ranks") {
    World world;
    world.global_rank = 1;
    torch::nn::Linear narrow(32, 10);
    CHECK(tests::stderr_of([&] { Fp8::convert_module(*narrow, {}, world); }).empty());
  }
  SECTION("replace_layers off leaves all layers") {
    torch::nn::Linear layer(32, 16);
    Fp8::convert_module(*layer, {.replace_layers = false});
    CHECK(layer->named_buffers().is_empty());
    CHECK(layer->weight.scalar_type() == torch::kBFloat16);
  }
  SECTION("setting up twice keeps the scales, and their digits") {
    buffers["fits.fp8.scale"].fill_(3.3F);
    const std::string again = tests::stderr_of([&] { Fp8::convert_module(module); });
    CHECK(module.named_buffers()["fits.fp8.scale"].equal(torch::full({3}, 3.3F)));
  }
}

TEST_CASE("[issue-5.5] scales and histories go with the module's state") {
  Fabric<Cpu, SingleDevice, TransformerEngine<>> fabric({.precision = {.recipe = {.amax_history_len = 8}}});
  const auto make = [&] {
    seed_everything(4);
    return fabric.setup(torch::nn::Linear(32, 16));
  };
  const at::Tensor x = torch::randn({3, 4, 32}, torch::kFloat);
  const auto step = [&](auto& model, int64_t i) {
    model->zero_grad();
    fabric.backward(model(x[i]).square().sum());
  };
  auto model = make();
  step(model, 0);
  step(model, 1);
  std::stringstream archive;
  torch::save(model.ptr(), archive);
  auto resumed = make();
  torch::load(*std::make_shared<torch::nn::Linear>(resumed.ptr()), archive);
  step(model, 2);
  step(resumed, 2);
  CHECK(resumed->weight.grad().equal(model->weight.grad()));
  for (const auto& item : model->named_buffers()) CHECK(resumed->named_buffers()[item.key()].equal(item.value()));
}

TEMPLATE_TEST_CASE("[issue-5.5] dtypes are those of the reference's plugin", "", BF16, F16) {
  using Of = PrecisionPlugin<TransformerEngine<TestType>>;
  static const std::map<std::string, at::ScalarType> types{
      {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float32", at::kFloat}, {"float64", at::kDouble},
      {"int64", at::kLong},   {"int8", at::kChar},         {"bool", at::kBool},     {"complex64", at::kComplexFloat}};
  const auto type = [&](const Json& name) { return types.at(name.get<std::string>()); };
  const auto default_dtype = [] { return c10::typeMetaToScalarType(c10::get_default_dtype()); };
  Json row;  // of a machine with GPUs: the reference autocasts on CUDA
  for (const std::string& line : tests::gunzip_lines(FABRIC_SOURCE_DIR "/tests/oracle/data/precision.jsonl.gz")) {
    const Json json = Json::parse(line);
    if (json["kind"] != "plugin" || json["plugin"]["class"] != "TransformerEnginePrecision" || json["host"].empty())
      continue;
    const Json& kwargs = json["plugin"]["kwargs"];
    if (kwargs.size() == 1 && type(kwargs["weights_dtype"]["dtype"]) == Of::dtype) row = json["outcome"];
  }
  REQUIRE(row["ok"] == true);
  REQUIRE(type(row["weights_dtype"]) == Of::dtype);

  struct Buffers : torch::nn::Module {
    at::Tensor weight = register_parameter("weight", torch::ones({2}));
    at::Tensor mean = register_buffer("mean", torch::ones({2}));
    at::Tensor count = register_buffer("count", torch::ones({2}, torch::kLong));
  } module;
  Of::convert_module(module);
  CHECK(module.weight.scalar_type() == type(row["convert_module"]["param"][0]));
  CHECK(module.mean.scalar_type() == type(row["convert_module"]["float_buffer"][0]));
  CHECK(module.count.scalar_type() == type(row["convert_module"]["int_buffer"][0]));
  for (const auto& [from, to] : row["convert_input"].items()) {
    CHECK(Of::convert_input(torch::ones({2}, type(from))).scalar_type() == type(to));
  }
  for (const auto& [from, to] : row["convert_output"].items()) {
    CHECK(Of::convert_output(torch::ones({2}, type(from))).scalar_type() == type(to));
  }
  {
    [[maybe_unused]] const typename Of::InitContext context;
    CHECK(default_dtype() == type(row["module_init_context"]["default"]));
    CHECK(torch::nn::Linear(1, 1)->weight.scalar_type() == type(row["module_init_context"]["new_linear"]));
  }
  {
    [[maybe_unused]] const typename Of::ForwardContext context(at::kCPU);
    CHECK(default_dtype() == type(row["forward_context"]["default"]));
    // The reference knows autocast on CUDA alone; here it is that of the device.
    CHECK(at::autocast::is_autocast_enabled(at::kCPU));
    CHECK(at::autocast::get_autocast_dtype(at::kCPU) == type(row["forward_context"]["autocast"]["cuda"]));
  }
  CHECK(default_dtype() == at::kFloat);
  CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST_CASE("[issue-5.5] what FP8 cannot do is refused") {
  torch::nn::Linear layer(32, 16);
  CHECK_THROWS_WITH(Fp8::convert_module(*layer, {.recipe = {.interval = 0, .amax_history_len = -1}}),
                    ContainsSubstring("interval is 0, but must be at least 1; amax_history_len is -1"));
  Fp8::convert_module(*layer);
  const at::Tensor x = torch::randn({4, 32}).to(torch::kBFloat16).requires_grad_();
  const Fp8::ForwardContext context(torch::kCPU);
  const at::Tensor out = layer(x).sum();
  CHECK_THROWS_WITH(torch::autograd::grad({out}, {x}, {}, true, /*create_graph=*/true),
                    ContainsSubstring("gradient of a gradient"));
  CHECK_THROWS(layer->clone());

  const auto quantised = [](auto plugin) {
    torch::nn::Linear other(32, 20);  // no size for FP8: it is refused all the same
    decltype(plugin)::convert_module(*other);
    const at::ScalarType bias = other->bias.scalar_type();
    CHECK_THROWS_WITH(Fp8::convert_module(*other), ContainsSubstring("was quantised by Bitsandbytes before"));
    CHECK(other->bias.scalar_type() == bias);
  };
  quantised(PrecisionPlugin<Bitsandbytes<BitsandbytesMode::nf4, F16>>());
  quantised(PrecisionPlugin<Bitsandbytes<BitsandbytesMode::int8_training>>());
}

TEST_CASE("[issue-5.5] a module that is set up again follows the new recipe and keeps its scales") {
  torch::nn::Linear layer(32, 16);
  Fabric<Cpu, SingleDevice, TransformerEngine<>> first({.precision = {.recipe = {.amax_history_len = 8}}});
  Fabric<Cpu, SingleDevice, TransformerEngine<>> second(
      {.precision = {.recipe = {.margin = 3, .amax_history_len = 4}}});
  const at::Tensor x = torch::randn({4, 32});
  auto model = first.setup(layer);
  first.backward(model(x).sum());
  const at::Tensor scale = layer->named_buffers()["fp8.scale"].clone();
  auto again = second.setup(layer);
  CHECK(layer->named_buffers()["fp8.amax_history"].sizes() == at::IntArrayRef{3, 4});
  CHECK(layer->named_buffers()["fp8.scale"].equal(scale));
  second.backward(again(x).sum());
  CHECK(layer->named_buffers()["fp8.steps"].item<int64_t>() == 2);    // once each
  CHECK(layer->named_buffers()["fp8.scale"].mul(8).allclose(scale));  // a margin of 3 bits
}

TEST_CASE("[issue-5.5] frozen weights, inputs without gradient and a layer used twice") {
  Fabric<Cpu, SingleDevice, TransformerEngine<>> fabric;
  torch::nn::Linear layer(torch::nn::LinearOptions(32, 32).bias(false));
  auto model = fabric.setup(torch::nn::Sequential(layer, layer));
  const at::Tensor x = torch::randn({4, 32});
  fabric.backward(model(x).sum());
  CHECK(layer->weight.grad().norm().item<float>() > 0);
  model->zero_grad();
  layer->weight.set_requires_grad(false);
  at::Tensor with_gradient = x.clone().requires_grad_();
  fabric.backward(model(with_gradient).sum());
  CHECK_FALSE(layer->weight.grad().defined());
  CHECK(with_gradient.grad().norm().item<float>() > 0);
}

TEST_CASE("[issue-5.5] a small network learns in FP8") {
  seed_everything(1);
  Fabric<Cpu, SingleDevice, TransformerEngine<>> fabric({.precision = {.recipe = {.amax_history_len = 16}}});
  const auto [images, labels] = digits(512);
  auto net = fabric.init_module([] { return Net(); });
  auto [model, optimizer] = fabric.setup(net, torch::optim::AdamW(net->parameters(), 3e-3));
  for (int step = 0; step < 80; ++step) {
    const int64_t at = step * 64 % 512;
    optimizer.zero_grad();
    const at::Tensor loss =
        torch::cross_entropy_loss(model(images.slice(0, at, at + 64)), labels.slice(0, at, at + 64));
    fabric.backward(loss);
    optimizer.step();
  }
  const torch::NoGradGuard no_grad;
  CHECK(model(images).argmax(1).eq(labels).to(torch::kFloat).mean().item<double>() > 0.9);
}
