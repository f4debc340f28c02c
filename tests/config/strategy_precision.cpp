// SPDX-License-Identifier: Apache-2.0
//
// What each precision comes to under each strategy, against every row that Lightning Fabric gave.
#include "fabric/policy/strategy_precision.hpp"

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "fabric/config.hpp"
#include "support/catch.hpp"
#include "support/gzip.hpp"

namespace {

using namespace fabric;
using Json = nlohmann::json;

// What the sharding engines ask for, as they do: at compile time.
static_assert(strategy_precision_v<Fsdp, F32>.reduce == Scalar::f32);
static_assert(strategy_precision_v<Fsdp, F16Mixed>.scaling == GradientScaling::sharded_scaler);
static_assert(strategy_precision_v<Fsdp, BF16Mixed>.compute == Scalar::bf16);
static_assert(strategy_precision_v<Fsdp, BF16Mixed>.module == std::nullopt);
static_assert(strategy_precision_v<FsdpCpuOffload, BF16> == strategy_precision_v<Fsdp, BF16>);
static_assert(strategy_precision_v<DeepSpeed<3>, F16>.scaling == GradientScaling::engine);
static_assert(strategy_precision_v<DeepSpeed<1>, BF16Mixed>.autocast == std::nullopt);
static_assert(strategy_precision_v<XlaDdp, BF16>.module == std::nullopt);
static_assert(strategy_precision_v<XlaFsdp, F16>.variable == "XLA_USE_F16");
static_assert(strategy_precision_v<Ddp, F16Mixed> == strategy_precision_v<SingleDevice, F16Mixed>);

std::vector<Json> rows(const std::string& kind) {
  std::vector<Json> found;
  const auto data = std::filesystem::path(__FILE__).parent_path().parent_path() / "oracle" / "data";
  for (const std::string& line : tests::gunzip_lines(data / "precision.jsonl.gz")) {
    Json row = Json::parse(line);
    if (row["kind"] == kind) found.push_back(std::move(row));
  }
  return found;
}

std::string name_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::f16: return "float16";
    case Scalar::bf16: return "bfloat16";
    case Scalar::f32: return "float32";
    case Scalar::f64: return "float64";
  }
  return "";
}
bool is_float(const std::string& dtype) {
  return dtype == "float16" || dtype == "bfloat16" || dtype == "float32" || dtype == "float64";
}

/// The policy behind a `--precision`, and one strategy whose plugin has the reference's class.
std::optional<PrecisionFacts> precision_of(const std::string& value, const Json& keywords) {
  const Json weights = keywords.value("weights_dtype", Json::object());
  if (value == "transformer-engine" && weights.value("dtype", "") == "float16") return TransformerEngine<F16>::facts;
  for (const PrecisionFacts& facts : {F32::facts, F64::facts, F16::facts, BF16::facts, F16Mixed::facts,
                                      BF16Mixed::facts, TransformerEngine<>::facts}) {
    if (std::string_view(facts.flag) == value) return facts;
  }
  return std::nullopt;
}
std::optional<PrecisionFacts> bitsandbytes_of(const std::string& mode) {
  if (mode == "int8" || mode == "int8-training") return Bitsandbytes<BitsandbytesMode::int8>::facts;
  return Bitsandbytes<BitsandbytesMode::nf4>::facts;
}
StrategyFacts strategy_of(const std::string& plugin) {
  if (plugin == "FSDPPrecision") return Fsdp::facts;
  if (plugin == "DeepSpeedPrecision") return DeepSpeed<>::facts;
  if (plugin == "XLAPrecision") return XlaDdp::facts;
  return SingleDevice::facts;
}

/// Rows that no policy can ask for, and why.
std::string no_counterpart(const Json& row) {
  const std::string name = row["plugin"]["class"];
  const Json keywords = row["plugin"].value("kwargs", Json::object());
  if (name == "MixedPrecision" && keywords["precision"] == "16-true") return "mixed precision that is not mixed";
  if (name == "HalfPrecision" && keywords.value("precision", "") == "32-true") return "half precision that is not half";
  if (row["outcome"].value("forward_context", Json::object()).contains("error")) return "a GPU that is not there";
  if (keywords.contains("scaler")) return "an unrelated object as scaler";
  if (keywords.contains("fallback_compute_dtype")) return "another dtype outside of the FP8 layers";
  if (name == "BitsandbytesPrecision") {
    const bool int8 = keywords["mode"].get<std::string>().starts_with("int8");
    if (int8 && keywords.contains("dtype")) return "int8 in another dtype than half floats";
    if (!int8 && !keywords.contains("dtype") && row["host"].empty()) return "the dtype chosen by what the GPU can do";
  }
  return {};
}

std::string flag_of(const std::string& name, const Json& keywords) {
  if (keywords.contains("precision")) return keywords["precision"];
  return name == "DoublePrecision"              ? "64-true"
         : name == "HalfPrecision"              ? "16-true"
         : name == "TransformerEnginePrecision" ? "transformer-engine"
                                                : "32-true";
}

std::string scaler_name(GradientScaling scaling) {
  return scaling == GradientScaling::scaler           ? "GradScaler"
         : scaling == GradientScaling::sharded_scaler ? "ShardedGradScaler"
                                                      : "";
}

/// The conversions that the reference reports, as the traits have them.
void check(const Json& outcome, const StrategyPrecision& traits) {
  const Json& module = outcome["convert_module"];
  if (module.contains("param")) {
    CHECK(module["param"][0] == name_of(traits.module.value_or(Scalar::f32)));
    CHECK(module["float_buffer"][0] == name_of(traits.module.value_or(Scalar::f32)));
    CHECK(module["int_buffer"][0] == "int64");
  }
  for (const auto& [from, to] : outcome["convert_input"].items()) {
    CHECK(to == (is_float(from) && traits.input ? name_of(*traits.input) : from));
  }
  for (const auto& [from, to] : outcome["convert_output"].items()) {
    CHECK(to == (is_float(from) && traits.converts_output ? "float32" : from));
  }
  CHECK(outcome["module_init_context"]["default"] == name_of(traits.init));
  CHECK(outcome["tensor_init_context"]["default"] == name_of(traits.init));
  const Json& forward = outcome["forward_context"];
  CHECK(forward["default"] == name_of(traits.forward));
  CHECK(forward.contains("autocast") == traits.autocast.has_value());
  if (traits.autocast) {
    for (const auto& [device, dtype] : forward["autocast"].items()) CHECK(dtype == name_of(*traits.autocast));
  }
  CHECK(outcome.value("scaler", "") == scaler_name(traits.scaling));
  if (outcome.contains("fsdp_mixed_precision")) {
    const Json& sharded = outcome["fsdp_mixed_precision"];
    CHECK(sharded["param_dtype"] == name_of(traits.compute));
    CHECK(sharded["reduce_dtype"] == name_of(traits.reduce));
    CHECK(sharded["buffer_dtype"] == name_of(traits.buffers));
  }
  const std::string variable = outcome.contains("env_set") ? outcome["env_set"].begin().key() : "";
  CHECK(variable == std::string_view(traits.variable));
}

}  // namespace

TEST_CASE("[issue-5.7] every plugin row has the dtypes that the traits say, or is refused by a rule, or is named") {
  std::map<std::string, int> counts;
  for (const Json& row : rows("plugin")) {
    INFO(row.dump());
    const std::string missing = no_counterpart(row);
    if (!missing.empty()) {
      ++counts[missing];
      continue;
    }
    const std::string name = row["plugin"]["class"];
    const Json keywords = row["plugin"].value("kwargs", Json::object());
    const auto precision = name == "BitsandbytesPrecision" ? bitsandbytes_of(keywords["mode"])
                                                           : precision_of(flag_of(name, keywords), keywords);
    REQUIRE(precision);
    const Json& outcome = row["outcome"];
    const StrategyFacts strategy = strategy_of(name);
    const AcceleratorFacts accelerator = is_xla(strategy) ? Xla::facts : Cuda::facts;
    const RuleId refusal = first_refusal({accelerator, strategy, *precision});
    if (!outcome["ok"]) {
      CHECK(refusal != RuleId::none);
      ++counts["refused"];
      continue;
    }
    CHECK(refusal == RuleId::none);
    check(outcome, strategy_precision(strategy, *precision));
    ++counts["compared"];
  }
  const std::map<std::string, int> listed{{"compared", 69},
                                          {"refused", 6},
                                          {"a GPU that is not there", 3},
                                          {"mixed precision that is not mixed", 6},
                                          {"half precision that is not half", 2},
                                          {"an unrelated object as scaler", 6},
                                          {"another dtype outside of the FP8 layers", 2},
                                          {"int8 in another dtype than half floats", 4},
                                          {"the dtype chosen by what the GPU can do", 4}};
  INFO(Json(counts).dump());
  CHECK(counts == listed);
}

TEST_CASE("[issue-5.7] a flag under a strategy comes to the same precision") {
  int compared = 0;
  for (const Json& row : rows("from_flag")) {
    INFO(row.dump());
    const Json& flag = row["precision"];
    const std::string strategy = row["strategy"];
    const std::string text = flag.is_string() ? flag.get<std::string>() : std::to_string(flag.get<int>());
    const Host host{.cuda_devices = 2};
    const Resolution resolution = resolve({.accelerator = "cuda",
                                           .strategy = std::string_view(strategy),
                                           .devices = 1,
                                           .precision = std::string_view(text)},
                                          {}, host);
    const Json& outcome = row["outcome"];
    ++compared;
    CHECK(resolution.ok() != outcome.contains("error"));
    if (!resolution.ok()) continue;
    const Selection& selection = resolution;
    const StrategyPrecision traits = strategy_precision(selection.strategy, selection.precision);
    CHECK(outcome.value("scaler", "") == scaler_name(traits.scaling));
    if (outcome.contains("mixed")) {
      CHECK(outcome["mixed"]["param_dtype"] == name_of(traits.compute));
      CHECK(outcome["mixed"]["reduce_dtype"] == name_of(traits.reduce));
      CHECK(outcome["mixed"]["buffer_dtype"] == name_of(traits.buffers));
    }
    if (outcome.contains("weights_dtype")) CHECK(outcome["weights_dtype"] == name_of(*traits.module));
  }
  CHECK(compared == 30);
}

TEST_CASE("[issue-5.7] DeepSpeed's own configuration says the same of half floats") {
  int compared = 0;
  for (const Json& row : rows("deepspeed_config")) {
    INFO(row.dump());
    if (row.contains("strategy_kwargs") && row["strategy_kwargs"].contains("config")) continue;  // the user's own texts
    ++compared;
    const auto precision = precision_of(row["precision"], Json::object());
    const Json& outcome = row["outcome"];
    CHECK((first_refusal({Cuda::facts, DeepSpeed<>::facts, *precision}) != RuleId::none) == outcome.contains("error"));
    if (outcome.contains("error")) continue;
    const Json& config = outcome["config"];
    const StrategyPrecision traits = strategy_precision(DeepSpeed<>::facts, *precision);
    CHECK(config.contains("fp16") == (traits.scaling == GradientScaling::engine));
    CHECK(config.contains("bf16") == (traits.compute == Scalar::bf16));
    if (!config.contains("fp16")) continue;
    DynamicLossScale scale;
    if (row.contains("strategy_kwargs")) {
      scale.loss_scale = row["strategy_kwargs"].value("loss_scale", scale.loss_scale);
      scale.initial_scale_power = row["strategy_kwargs"].value("initial_scale_power", scale.initial_scale_power);
    }
    CHECK(config["fp16"] == Json({{"enabled", true},
                                  {"loss_scale", scale.loss_scale},
                                  {"initial_scale_power", scale.initial_scale_power},
                                  {"loss_scale_window", scale.loss_scale_window},
                                  {"hysteresis", scale.hysteresis},
                                  {"min_loss_scale", scale.min_loss_scale}}));
  }
  CHECK(compared == 66);
}
