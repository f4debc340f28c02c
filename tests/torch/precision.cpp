// SPDX-License-Identifier: Apache-2.0
// labels: torch precision
//
// What each precision does to tensors, modules and the process's state, against the reference rows that Lightning gave.
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <boost/hana/adapt_struct.hpp>
#include <nlohmann/json.hpp>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/gzip.hpp"

namespace {

using namespace fabric;
using Json = nlohmann::json;

/// The rows that say what Lightning's plugins do.
std::vector<Json> plugin_rows() {
  std::vector<Json> rows;
  for (const std::string& line : tests::gunzip_lines(FABRIC_SOURCE_DIR "/tests/oracle/data/precision.jsonl.gz")) {
    Json row = Json::parse(line);
    if (row["kind"] == "plugin") rows.push_back(std::move(row));
  }
  return rows;
}

at::ScalarType dtype(const Json& name) {
  static const std::map<std::string, at::ScalarType> types{
      {"float16", at::kHalf},   {"bfloat16", at::kBFloat16}, {"float32", at::kFloat},
      {"float64", at::kDouble}, {"int64", at::kLong},        {"int32", at::kInt},
      {"int8", at::kChar},      {"bool", at::kBool},         {"complex64", at::kComplexFloat}};
  return types.at(name.get<std::string>());
}

at::ScalarType default_dtype() { return c10::typeMetaToScalarType(c10::get_default_dtype()); }
at::ScalarType dtype_of_new_linear() { return torch::nn::Linear(1, 1)->weight.scalar_type(); }

struct BuffersImpl : torch::nn::Module {
  BuffersImpl() {
    register_parameter("weight", torch::ones({2}));
    register_buffer("mean", torch::ones({2}));
    register_buffer("count", torch::ones({2}, torch::kLong));
  }
};

struct ThreadState {
  at::ScalarType dtype = default_dtype();
  bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
  at::ScalarType autocast_dtype = at::autocast::get_autocast_dtype(at::kCPU);
  friend bool operator==(const ThreadState&, const ThreadState&) = default;
};

/// Does a plugin convert a module as the row says?
template <class Plugin>
void check_module(const Json& row) {
  BuffersImpl module;
  Plugin::convert_module(module);
  CHECK(module.named_parameters()["weight"].scalar_type() == dtype(row["convert_module"]["param"][0]));
  CHECK(module.named_buffers()["mean"].scalar_type() == dtype(row["convert_module"]["float_buffer"][0]));
  CHECK(module.named_buffers()["count"].scalar_type() == dtype(row["convert_module"]["int_buffer"][0]));
}

/// Inputs and outputs: integers, booleans and complex numbers among them, and nested ones.
template <class Plugin>
void check_inputs_and_outputs(const Json& row) {
  for (const auto& [from, to] : row["convert_input"].items()) {
    INFO("from " << from);
    CHECK(Plugin::convert_input(torch::ones({2}, dtype(from))).scalar_type() == dtype(to));
  }
  for (const auto& [from, to] : row["convert_output"].items()) {
    INFO("from " << from);
    CHECK(Plugin::convert_output(torch::ones({2}, dtype(from))).scalar_type() == dtype(to));
  }
  const Json& nested = row["convert_nested"];
  struct Inputs {
    std::tuple<at::Tensor, std::string, int> a;
    std::pair<at::Tensor, at::Tensor> b;
  };
  const Inputs out =
      Plugin::convert_input(Inputs{{torch::ones({2}), "s", 3}, {torch::ones({2}, torch::kInt), torch::ones({2})}});
  CHECK(std::get<0>(out.a).scalar_type() == dtype(nested["a0"]));
  CHECK(std::get<1>(out.a) == nested["a1"]);
  CHECK(std::get<2>(out.a) == nested["a2"]);
  CHECK(out.b.first.scalar_type() == dtype(nested["b0"]));
}

/// The process's state while a module is made and while it runs, and afterwards, also after an exception.
template <class Plugin>
void check_contexts(const Json& row, at::DeviceType device) {
  const ThreadState before;
  {
    [[maybe_unused]] const typename Plugin::InitContext context;
    CHECK(default_dtype() == dtype(row["module_init_context"]["default"]));
    CHECK(dtype_of_new_linear() == dtype(row["module_init_context"]["new_linear"]));
  }
  CHECK(ThreadState() == before);
  const Json& inside = row["forward_context"];
  {
    typename Plugin::ForwardContext context(device);
    CHECK(default_dtype() == dtype(inside["default"]));
    CHECK(dtype_of_new_linear() == dtype(inside["new_linear"]));
    CHECK(at::autocast::is_autocast_enabled(device) == inside.contains("autocast"));
    if (inside.contains("autocast")) {
      const Json& type = inside["autocast"][c10::DeviceTypeName(device, true)];
      CHECK(at::autocast::get_autocast_dtype(device) == dtype(type));
    }
  }
  CHECK(ThreadState() == before);
  CHECK_FALSE(at::autocast::is_autocast_enabled(device));
  CHECK_THROWS([&] {
    typename Plugin::ForwardContext context(device);
    throw std::runtime_error("from forward");
  }());
  CHECK_THROWS([] {
    [[maybe_unused]] const typename Plugin::InitContext context;
    throw std::runtime_error("from a constructor");
  }());
  CHECK(ThreadState() == before);
}

/// The state that is saved with a checkpoint: that of the scaler, if there is one.
template <class Plugin>
void check_state(const Json& row) {
  CHECK(Plugin::has_scaler == row.contains("scaler"));
  std::set<std::string> keys;
  if constexpr (Plugin::has_scaler) {
    const Value state = GradScaler().state_dict();
    for (const auto& [key, value] : state.as<Dict>("the state")) keys.insert(std::get<std::string>(key));
  }
  CHECK(keys == row["state_keys"].get<std::set<std::string>>());
}

/// What a plugin does is what the traits say of its precision on one device.
template <class P>
void check_traits() {
  using Plugin = PrecisionPlugin<P>;
  constexpr StrategyPrecision traits = strategy_precision_v<SingleDevice, P>;
  static_assert(Plugin::has_scaler == (traits.scaling == GradientScaling::scaler));
  [[maybe_unused]] const typename Plugin::InitContext context;
  CHECK(default_dtype() == dtype_of(traits.init));
  CHECK(Plugin::convert_input(torch::ones({1}, torch::kDouble)).scalar_type() ==
        (traits.input ? dtype_of(*traits.input) : at::kDouble));
}

template <class P>
void check_plugin(const Json& row) {
  using Plugin = PrecisionPlugin<P>;
  static const std::map<std::string, at::DeviceType> devices{{"cpu", at::kCPU}, {"cuda", at::kCUDA}, {"mps", at::kMPS}};
  check_module<Plugin>(row);
  check_inputs_and_outputs<Plugin>(row);
  check_contexts<Plugin>(row, devices.at(row.value("precision_device", "cpu")));
  check_state<Plugin>(row);
  check_traits<P>();
}

/// A batch as users have them: nested, adapted for Hana, with integers, texts and what else a model is told.
class Tokens {
 public:
  at::Tensor ids, mask, weights;
};
enum class Mode { train };
struct Sample {
  Tokens tokens;
  std::map<std::string, std::vector<at::Tensor>> images;
  std::optional<at::Tensor> target;
  std::pair<at::Tensor, std::string> named;
  Mode mode = Mode::train;
  double temperature = 0;
  std::variant<int, at::Tensor> choice;
};

/// By class and value of the reference's plugin.
const std::map<std::pair<std::string, std::string>, void (*)(const Json&)> counterparts{
    {{"Precision", "32-true"}, check_plugin<F32>},
    {{"DoublePrecision", "64-true"}, check_plugin<F64>},
    {{"HalfPrecision", "16-true"}, check_plugin<F16>},
    {{"HalfPrecision", "bf16-true"}, check_plugin<BF16>},
    {{"MixedPrecision", "16-mixed"}, check_plugin<F16Mixed>},
    {{"MixedPrecision", "bf16-mixed"}, check_plugin<BF16Mixed>},
};

/// Why a row has no plugin here.
std::string no_counterpart(const Json& row) {
  const std::string name = row["plugin"]["class"];
  const Json keywords = row["plugin"].value("kwargs", Json::object());
  if (name == "FSDPPrecision" || name == "DeepSpeedPrecision" || name == "XLAPrecision")
    return "a strategy's own: see config/strategy_precision.cpp";
  if (name == "TransformerEnginePrecision" || name == "BitsandbytesPrecision") return "replaces layers";
  if (name == "MixedPrecision" && keywords["precision"] == "16-true") return "no type says it: mixed, but not mixed";
  if (name == "HalfPrecision" && keywords.value("precision", "") == "32-true") return "no type says it: half, but full";
  if (keywords.contains("scaler")) return "no type says it: BF16Mixed has no option for a scaler";
  if (row["outcome"].value("forward_context", Json::object()).contains("error")) return "a GPU that is not there";
  return {};
}

// Without a scaler there is nothing to tune.
static_assert(std::is_same_v<decltype(Fabric<Cpu, SingleDevice, BF16Mixed>::Options::precision), NoOptions>);
// That F16Mixed does not compile on Cpu is in compile_fail/cpu_f16_mixed.cpp.
static_assert(!CompatibleWith<Cpu, SingleDevice, F16Mixed> && CompatibleWith<Cuda, SingleDevice, F16Mixed>);

}  // namespace

BOOST_HANA_ADAPT_STRUCT(Tokens, ids, mask, weights);

TEST_CASE("[issue-3.4][issue-5.1] a precision does what the reference's plugin does, row by row") {
  std::map<std::string, int> counts;
  for (const Json& row : plugin_rows()) {
    INFO(row.dump());
    const std::string missing = no_counterpart(row);
    ++counts[missing];
    if (!missing.empty()) continue;
    const Json& outcome = row["outcome"];
    REQUIRE(outcome["ok"]);
    counterparts.at({outcome["precision"], outcome["precision_value"]})(outcome);
  }
  INFO(Json(counts).dump());
  CHECK(counts == std::map<std::string, int>{{"", 21},
                                             {"a strategy's own: see config/strategy_precision.cpp", 36},
                                             {"replaces layers", 34},
                                             {"no type says it: mixed, but not mixed", 6},
                                             {"no type says it: half, but full", 2},
                                             {"no type says it: BF16Mixed has no option for a scaler", 2},
                                             {"a GPU that is not there", 1}});
}

TEMPLATE_TEST_CASE("[issue-5.8] nested inputs and outputs are converted, all but what is no real float", "", F64, F16,
                   BF16, F16Mixed, BF16Mixed) {
  using Plugin = PrecisionPlugin<TestType>;
  const auto integers = torch::tensor({1, 2});
  const auto complex = torch::ones({1}, torch::kComplexFloat);
  const Sample sample{{integers, torch::ones({2}, torch::kBool), torch::ones({2})},
                      {{"left", {torch::ones({1}), torch::ones({1}, torch::kByte)}}, {"right", {complex}}},
                      torch::ones({1}, torch::kDouble),
                      {torch::ones({1}), "name"},
                      Mode::train,
                      0.1,
                      torch::ones({1}, torch::kHalf)};
  const auto check = [&](const Sample& result, at::ScalarType expected) {
    CHECK(result.tokens.ids.is_same(integers));
    CHECK(result.tokens.mask.scalar_type() == at::kBool);
    CHECK(result.tokens.weights.scalar_type() == expected);
    CHECK(result.images.at("left")[0].scalar_type() == expected);
    CHECK(result.images.at("left")[1].scalar_type() == at::kByte);
    CHECK(result.images.at("right")[0].is_same(complex));
    CHECK(result.target->scalar_type() == expected);
    CHECK(result.named.first.scalar_type() == expected);
    CHECK(result.named.second == "name");
    CHECK(result.temperature == 0.1);
    CHECK(std::get<at::Tensor>(result.choice).scalar_type() == expected);
  };
  check(Plugin::convert_input(sample), Plugin::dtype);
  check(Plugin::convert_output(sample), at::kFloat);
  CHECK(sample.tokens.weights.scalar_type() == at::kFloat);
  if constexpr (CompatibleWith<Cpu, SingleDevice, TestType>) {  // and so does a forward
    Fabric<Cpu, SingleDevice, TestType> fabric;
    struct Echo : torch::nn::Module {
      Sample forward(const Sample& given) { return seen = given; }
      Sample seen;
    };
    const auto echo = std::make_shared<Echo>();
    const auto model = fabric.setup(echo);
    check(model(sample), at::kFloat);
    check(echo->seen, Plugin::dtype);
  }
}

TEST_CASE("[issue-5.1] 16-mixed on a CPU is refused as a type, and falls back from strings, with a note") {
  const Selection selection =
      resolve_for<Menu<Accelerators<Cpu>, Strategies<SingleDevice>, Precisions<F16Mixed, BF16Mixed>>>(
          {.accelerator = "cpu", .devices = 1, .precision = "16-mixed"});
  CHECK(selection.precision == BF16Mixed::facts);
  CHECK(selection.notes.has(Note::fp16_amp_cpu_to_bf16));
}

TEST_CASE("[issue-3.4] a tensor that has the dtype already is not copied") {
  const auto tensor = torch::ones({2}, torch::kDouble);
  CHECK(PrecisionPlugin<F64>::convert_input(tensor).is_same(tensor));
  CHECK(PrecisionPlugin<F32>::convert_input(tensor).is_same(tensor));
  const auto integers = torch::ones({2}, torch::kLong);
  CHECK(PrecisionPlugin<BF16Mixed>::convert_input(integers).is_same(integers));
}

TEST_CASE("[issue-3.4] nested autocast keeps its cache of cast weights until the outermost ends") {
  const ThreadState before;
  {
    const AutocastGuard outer(at::kCPU, at::kBFloat16);
    {
      const AutocastGuard inner(at::kCPU, at::kHalf);
      CHECK(at::autocast::get_autocast_dtype(at::kCPU) == at::kHalf);
    }
    CHECK(at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16);
    CHECK(at::autocast::is_autocast_enabled(at::kCPU));
  }
  CHECK(ThreadState() == before);
}

namespace {

/// Uses its weight itself. (`torch::nn::Linear` uses a view of it, which autocast does not keep.)
struct LinearImpl : torch::nn::Module {
  at::Tensor weight{register_parameter("weight", torch::ones({2, 2}))};
  at::Tensor forward(const at::Tensor& x) { return at::linear(x, weight); }
};
TORCH_MODULE(Linear);

/// A weight of ones and what it makes of ones, to see whether it is the weight of now that is used.
struct Probe {
  Fabric<Cpu, SingleDevice, BF16Mixed> fabric;
  Linear linear;
  torch::optim::SGD sgd{linear->parameters(), 1.0};
  decltype(fabric.setup(linear)) model = fabric.setup(linear);
  decltype(fabric.setup(sgd)) optimizer = fabric.setup(sgd);
  at::Tensor x = torch::ones({1, 2});

  double output() { return model(x).sum().item<double>(); }
};

}  // namespace

TEST_CASE("[issue-5.1] no forward sees weights from before the last step, however long autocast goes on") {
  Probe probe;
  const auto outer = probe.fabric.autocast();
  CHECK(probe.output() == 4);
  probe.fabric.backward(probe.model(probe.x).sum());  // the gradient is 1
  probe.optimizer.step();
  CHECK(probe.output() == 0);
}

TEST_CASE("[issue-5.1] the cache of cast weights goes with the outermost autocast") {
  Probe probe;
  CHECK(probe.output() == 4);
  {
    const torch::NoGradGuard no_grad;
    probe.linear->weight.fill_(2);  // not by an optimizer
  }
  CHECK(probe.output() == 8);
}

TEST_CASE("[issue-5.1] an evaluation inside of autocast does not cost the training forward its gradients") {
  Probe probe;
  const auto outer = probe.fabric.autocast();
  {
    const torch::NoGradGuard no_grad;
    CHECK(probe.output() == 4);
  }
  probe.fabric.backward(probe.model(probe.x).sum());
  REQUIRE(probe.linear->weight.grad().defined());
  CHECK(probe.linear->weight.grad().eq(1).all().item<bool>());
}

TEST_CASE("[issue-5.1] several forwards share one step") {
  Probe probe;
  {
    const auto outer = probe.fabric.autocast();  // and the weight is cast once
    const auto first = probe.model(probe.x).sum();
    const auto second = probe.model(probe.x * 2).sum();
    probe.fabric.backward(first);
    probe.fabric.backward(second);
  }
  CHECK(probe.linear->weight.grad().eq(3).all().item<bool>());
  probe.optimizer.zero_grad();
  probe.fabric.backward(probe.model(probe.x).sum() + probe.model(probe.x * 2).sum());
  CHECK(probe.linear->weight.grad().eq(3).all().item<bool>());
}

TEST_CASE("[issue-5.1] an autocast to another dtype inside of autocast gets weights in its own dtype") {
  Probe probe;
  const auto outer = probe.fabric.autocast();
  const auto dtype_of_product = [&] { return torch::linear(probe.x, probe.linear->weight).scalar_type(); };
  CHECK(dtype_of_product() == at::kBFloat16);
  {
    const AutocastGuard inner(at::kCPU, at::kHalf);
    CHECK(dtype_of_product() == at::kHalf);
  }
  CHECK(dtype_of_product() == at::kBFloat16);
}

TEST_CASE("[issue-3.4] Fabric runs a module in its precision: weights, arithmetic and output") {
  const auto run = [](auto& fabric) {
    at::ScalarType inside{};
    auto net = fabric.init_module([] { return torch::nn::Linear(2, 2); });
    auto model = fabric.setup(net);
    auto probe = fabric.setup(torch::nn::Functional([&inside](const at::Tensor& x) {
      inside = torch::mm(x, torch::ones({2, 2}, x.options())).scalar_type();
      return x;
    }));
    const auto output = model(torch::ones({1, 2}, torch::kDouble).to(at::kFloat));
    probe(torch::ones({2, 2}));
    fabric.backward(output.sum());
    return std::tuple{net->weight.scalar_type(), inside, output.scalar_type(), net->weight.grad().scalar_type()};
  };
  Fabric<Cpu, SingleDevice, F32> f32;
  CHECK(run(f32) == std::tuple{at::kFloat, at::kFloat, at::kFloat, at::kFloat});
  Fabric<Cpu, SingleDevice, F64> f64;
  CHECK(run(f64) == std::tuple{at::kDouble, at::kDouble, at::kFloat, at::kDouble});
  Fabric<Cpu, SingleDevice, F16> f16;
  CHECK(run(f16) == std::tuple{at::kHalf, at::kHalf, at::kFloat, at::kHalf});
  Fabric<Cpu, SingleDevice, BF16> bf16;
  CHECK(run(bf16) == std::tuple{at::kBFloat16, at::kBFloat16, at::kFloat, at::kBFloat16});
  Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
  CHECK(run(mixed) == std::tuple{at::kFloat, at::kBFloat16, at::kFloat, at::kFloat});
}

TEST_CASE("[issue-3.6] autocast() runs operators outside a module as in its forward") {
  Fabric<Cpu, SingleDevice, BF16Mixed> fabric;
  const auto x = torch::ones({2, 2});
  {
    const auto context = fabric.autocast();
    CHECK(torch::mm(x, x).scalar_type() == at::kBFloat16);
  }
  CHECK(torch::mm(x, x).scalar_type() == at::kFloat);
}

TEST_CASE("[issue-3.4] an exception in forward leaves the process's state as it was") {
  const auto throws = [](const at::Tensor&) -> at::Tensor { throw std::runtime_error("from forward"); };
  const ThreadState before;
  Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
  CHECK_THROWS_WITH(mixed.setup(torch::nn::Functional(throws))(torch::ones({1})), "from forward");
  Fabric<Cpu, SingleDevice, F64> f64;
  CHECK_THROWS_WITH(f64.setup(torch::nn::Functional(throws))(torch::ones({1})), "from forward");
  CHECK(ThreadState() == before);
}
