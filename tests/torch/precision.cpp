// SPDX-License-Identifier: Apache-2.0
//
// What each precision does to tensors, modules and the process's state, against the reference rows that Lightning gave.
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <nlohmann/json.hpp>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/gzip.hpp"

namespace {

using namespace fabric;
using Json = nlohmann::json;

/// The reference's outcome for a plugin on a machine without GPUs.
Json reference(const std::string& name, const std::string& precision) {
  for (const std::string& line : tests::gunzip_lines(FABRIC_SOURCE_DIR "/tests/oracle/data/precision.jsonl.gz")) {
    const Json row = Json::parse(line);
    if (row["kind"] != "plugin" || !row["host"].empty() || row["plugin"]["class"] != name) continue;
    const Json& outcome = row["outcome"];
    if (!outcome["ok"] || outcome["precision_value"] != precision || outcome.value("precision_device", "cpu") != "cpu")
      continue;
    return outcome;
  }
  throw std::runtime_error("no row for " + name + " " + precision);
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

struct State {
  at::ScalarType dtype = default_dtype();
  bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
  at::ScalarType autocast_dtype = at::autocast::get_autocast_dtype(at::kCPU);
  friend bool operator==(const State&, const State&) = default;
};

/// Precision policies with the reference's class and value.
struct IsF32 : F32 {
  using Policy = F32;
  static constexpr auto row = std::pair{"Precision", "32-true"};
};
struct IsF64 : F64 {
  using Policy = F64;
  static constexpr auto row = std::pair{"DoublePrecision", "64-true"};
};
struct IsBF16 : BF16 {
  using Policy = BF16;
  static constexpr auto row = std::pair{"HalfPrecision", "bf16-true"};
};
struct IsBF16Mixed : BF16Mixed {
  using Policy = BF16Mixed;
  static constexpr auto row = std::pair{"MixedPrecision", "bf16-mixed"};
};

}  // namespace

TEMPLATE_TEST_CASE("[issue-3.4] a precision does what the reference's plugin does", "", IsF32, IsF64, IsBF16,
                   IsBF16Mixed) {
  using Plugin = PrecisionPlugin<typename TestType::Policy>;
  const Json row = reference(TestType::row.first, TestType::row.second);
  const State before;

  SECTION("module") {
    BuffersImpl module;
    Plugin::convert_module(module);
    CHECK(module.named_parameters()["weight"].scalar_type() == dtype(row["convert_module"]["param"][0]));
    CHECK(module.named_buffers()["mean"].scalar_type() == dtype(row["convert_module"]["float_buffer"][0]));
    CHECK(module.named_buffers()["count"].scalar_type() == dtype(row["convert_module"]["int_buffer"][0]));
  }
  SECTION("inputs and outputs, integers, booleans and complex numbers among them") {
    for (const auto& [from, to] : row["convert_input"].items()) {
      INFO(from);
      CHECK(Plugin::convert_input(torch::ones({2}, dtype(from))).scalar_type() == dtype(to));
    }
    for (const auto& [from, to] : row["convert_output"].items()) {
      INFO(from);
      CHECK(Plugin::convert_output(torch::ones({2}, dtype(from))).scalar_type() == dtype(to));
    }
  }
  SECTION("nested inputs") {
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
  SECTION("while a module is made") {
    {
      [[maybe_unused]] const typename Plugin::InitContext context;
      CHECK(default_dtype() == dtype(row["module_init_context"]["default"]));
      CHECK(dtype_of_new_linear() == dtype(row["module_init_context"]["new_linear"]));
    }
    CHECK(State() == before);
  }
  SECTION("while forward runs") {
    const Json& inside = row["forward_context"];
    {
      typename Plugin::ForwardContext context(at::kCPU);
      CHECK(default_dtype() == dtype(inside["default"]));
      CHECK(dtype_of_new_linear() == dtype(inside["new_linear"]));
      CHECK(at::autocast::is_autocast_enabled(at::kCPU) == inside.contains("autocast"));
      if (inside.contains("autocast"))
        CHECK(at::autocast::get_autocast_dtype(at::kCPU) == dtype(inside["autocast"]["cpu"]));
    }
    CHECK(State() == before);
  }
  SECTION("an exception leaves no trace") {
    CHECK_THROWS([] {
      typename Plugin::ForwardContext context(at::kCPU);
      throw std::runtime_error("from forward");
    }());
    CHECK_THROWS([] {
      [[maybe_unused]] const typename Plugin::InitContext context;
      throw std::runtime_error("from a constructor");
    }());
    CHECK(State() == before);
    CHECK(torch::mm(torch::ones({2, 2}), torch::ones({2, 2})).scalar_type() == at::kFloat);
  }
}

TEST_CASE("[issue-3.4] a tensor that has the dtype already is not copied") {
  const auto tensor = torch::ones({2}, torch::kDouble);
  CHECK(PrecisionPlugin<F64>::convert_input(tensor).is_same(tensor));
  CHECK(PrecisionPlugin<F32>::convert_input(tensor).is_same(tensor));
  const auto integers = torch::ones({2}, torch::kLong);
  CHECK(PrecisionPlugin<BF16Mixed>::convert_input(integers).is_same(integers));
}

TEST_CASE("[issue-3.4] nested autocast keeps its cache of cast weights until the outermost ends") {
  const State before;
  {
    const AutocastGuard outer(at::kCPU, at::kBFloat16);
    {
      const AutocastGuard inner(at::kCPU, at::kHalf);
      CHECK(at::autocast::get_autocast_dtype(at::kCPU) == at::kHalf);
    }
    CHECK(at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16);
    CHECK(at::autocast::is_autocast_enabled(at::kCPU));
  }
  CHECK(State() == before);
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
  const State before;
  Fabric<Cpu, SingleDevice, BF16Mixed> mixed;
  CHECK_THROWS_WITH(mixed.setup(torch::nn::Functional(throws))(torch::ones({1})), "from forward");
  Fabric<Cpu, SingleDevice, F64> f64;
  CHECK_THROWS_WITH(f64.setup(torch::nn::Functional(throws))(torch::ones({1})), "from forward");
  CHECK(State() == before);
}
