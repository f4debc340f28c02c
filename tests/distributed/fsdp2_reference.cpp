// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// timeout: 300
// also: cuda
//
// Twenty steps of a transformer and of a CNN with BatchNorm on two ranks, with AdamW and clipping, beside the losses
// that Python's FSDP2 had with the same weights and batches: tests/reference/fsdp2.py made them.
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#include "support/job.hpp"
#include "support/ranks.hpp"
#include "support/reference.hpp"
#include "support/sharded_policies.hpp"
#include "support/sharding_models.hpp"

namespace {

using namespace fabric;
using namespace fabric::tests;

const Json& reference() {
  static const Json data = read_reference("fsdp2.json.gz");
  return data;
}

struct Trace {
  std::vector<double> losses, norms;        // the loss of this rank
  std::map<std::string, double> checksums;  // of the parameters at the end
};

/// The checksums of the parameters, of which this rank may hold parts only.
template <class F, class Model>
std::map<std::string, double> checksums(const F& fabric, const Model& model) {
  std::map<std::string, std::int64_t> indices;
  for (const auto& item : model->named_parameters()) indices.emplace(item.key(), indices.size());
  std::map<std::string, double> sums;
  if constexpr (requires { model.state()->shards(); }) {
    for (const auto& shard : model.state()->shards()) {
      sums[shard.name] = sharding::checksum(shard.master, indices.at(shard.name), shard.begin, shard.parameter.numel());
    }
    for (auto& item : sums)
      item.second =
          fabric.all_reduce(at::scalar_tensor(item.second, at::kDouble), ReduceOp::sum).template item<double>();
  } else {
    for (const auto& item : model->named_parameters()) {
      sums[item.key()] = sharding::checksum(item.value(), indices.at(item.key()));
    }
  }
  return sums;
}

template <class Model, class F>
Trace train(F& fabric, at::ScalarType dtype, double max_norm) {
  std::optional<DoubleOutputs> outputs;
  if (dtype == at::kDouble) outputs.emplace();
  const Json& data = reference();
  torch::nn::ModuleHolder<Model> net;
  sharding::set_weights(*net);
  net->to(dtype);
  optim::AdamW adamw(net->parameters(), optim::AdamWOptions(data["lr"].get<double>())
                                            .eps(data["eps"].get<double>())
                                            .weight_decay(data["weight_decay"].get<double>()));
  auto [model, optimizer] = fabric.setup(net, adamw);
  Trace trace;
  for (int step = 0; step < data["steps"]; ++step) {
    const auto [x, y] = fabric.to_device(Model::batch(step, fabric.global_rank(), dtype));
    optimizer.zero_grad();
    const at::Tensor loss = sharding::loss_of(model(x), y);
    fabric.backward(loss);
    const at::Tensor norm = fabric.clip_gradients(model, ClipNorm{.max_norm = max_norm});
    optimizer.step();
    trace.losses.push_back(loss.template item<double>());
    trace.norms.push_back(norm.template item<double>());
  }
  trace.checksums = checksums(fabric, model);
  return trace;
}

double relative(double ours, const Json& theirs) {
  const auto value = theirs.get<double>();
  return std::abs(ours - value) / std::max(1.0, std::abs(value));
}

/// How far we may be from Python.
struct Tolerance {
  double losses;
  double norms = losses;
  double checksums = 100 * losses;  ///< These count an element 64 times or so.
};

/// Trains on two ranks and compares with the trace of `precision`.
template <class S, class P, class Model>
void compare(const char* network, const char* precision, at::ScalarType dtype, const Tolerance& tolerance,
             const typename Engine<Tested, S>::Options& options = {}) {
  on_ranks<P, S>(options, [&](auto& fabric) {
    const Json& expected = reference()[network][precision];
    const Trace trace = train<Model>(fabric, dtype, expected["max_norm"]);
    double losses = 0;
    double norms = 0;
    double checksums = 0;
    for (std::size_t step = 0; step < trace.losses.size(); ++step) {
      losses = std::max(losses, relative(trace.losses[step], expected["losses"][step][fabric.global_rank()]));
      norms = std::max(norms, relative(trace.norms[step], expected["norms"][step]));
    }
    REQUIRE(trace.checksums.size() == expected["parameters"].size());
    for (const auto& [name, sum] : trace.checksums) {
      checksums = std::max(checksums, relative(sum, expected["parameters"][name]));
    }
    CAPTURE(network, precision, losses, norms, checksums);
    REQUIRE(trace.losses.size() == expected["losses"].size());
    CHECK(losses <= tolerance.losses);
    CHECK(norms <= tolerance.norms);
    CHECK(checksums <= tolerance.checksums);
  });
}

template <class S>
void compare_all() {
  compare<S, F64, sharding::TransformerImpl>("transformer", "f64", at::kDouble, {1e-12});
  compare<S, F64, sharding::CnnImpl>("cnn", "f64", at::kDouble, {1e-12});
  compare<S, F32, sharding::TransformerImpl>("transformer", "f32", at::kFloat, {1e-5});
  compare<S, F32, sharding::CnnImpl>("cnn", "f32", at::kFloat, {1e-5});
}

}  // namespace

TEST_CASE("[issue-8.accept] Ddp has the losses, norms and parameters of Python's FSDP2") { compare_all<Ddp>(); }
TEST_CASE("[issue-8.accept] ZeRO 1 has them") { compare_all<Zero<1>>(); }
TEST_CASE("[issue-8.accept] ZeRO 2 has them") { compare_all<Zero<2>>(); }
TEST_CASE("[issue-8.accept] ZeRO 3 has them") { compare_all<Zero<3>>(); }
TEST_CASE("[issue-8.accept] fully sharded, they are the same") { compare_all<Sharded>(); }

// What rounds otherwise now and then soon is a whole rounding of bfloat16 apart, so that other kernels, or a sum in
// bfloat16 whose order differs, can be compared by some of them only.
TEST_CASE("[issue-8.5] parameters in bfloat16 with exact masters train as under FSDP2's MixedPrecisionPolicy") {
  const Tolerance rounded{std::ldexp(1, -8), std::ldexp(1, -6), 4};
  const Tolerance exact{0, 1e-6, 0};  // norms are sums of squares in another order
  compare<DeepSpeed<3>, BF16Mixed, sharding::TransformerImpl>(
      "transformer", "bf16", at::kFloat, same_kernels() ? exact : rounded, {.reduce_dtype = at::kFloat});
  compare<DeepSpeed<3>, BF16Mixed, sharding::TransformerImpl>("transformer", "bf16, reduced in bf16", at::kFloat,
                                                              rounded);
}

TEST_CASE("[issue-8.accept] with the kernels that Python had, in bfloat16 to the last digit") {
  if (std::same_as<Tested, Cuda> || same_kernels() || variable("LOCAL_RANK", "0") != "0") return;
  Process program({"/proc/self/exe"}, {{"ATEN_CPU_CAPABILITY", "default"},  // those of same_everywhere.py
                                       {"ONEDNN_MAX_CPU_ISA", "SSE41"},
                                       {"MKL_CBWR", "COMPATIBLE"}});
  const int code = program.wait(150);
  INFO(program.output());
  REQUIRE(code == 0);
}
