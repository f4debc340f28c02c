// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
//
// Twenty steps of a transformer and of a CNN with BatchNorm on two ranks, with AdamW and clipping, beside the losses
// that Python's FSDP2 had with the same weights and batches: tests/reference/fsdp2.py made them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"
#include "support/sharding_models.hpp"

namespace {

using namespace fabric;
using namespace fabric::tests;

const Json& reference() {
  static const Json data = read_reference("fsdp2.json.gz");
  return data;
}

/// In which a forward returns what it computes in, so that 64-bit digits are compared and not 32-bit outputs.
struct DefaultDtype {
  explicit DefaultDtype(at::ScalarType dtype) { torch::set_default_dtype(c10::scalarTypeToTypeMeta(dtype)); }
  ~DefaultDtype() { torch::set_default_dtype(caffe2::TypeMeta::Make<float>()); }
};

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
Trace train(F& fabric, at::ScalarType dtype) {
  const DefaultDtype outputs(dtype);
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
    const auto [x, y] = Model::batch(step, fabric.global_rank(), dtype);
    optimizer.zero_grad();
    const at::Tensor loss = sharding::loss_of(model(x), y);
    fabric.backward(loss);
    const at::Tensor norm = fabric.clip_gradients(model, ClipNorm{.max_norm = data["max_norm"]});
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

/// Trains on two ranks and compares with the trace of `precision`. The differences may be `tolerance`.
template <class S, class P, class Model>
void compare(const char* network, const char* precision, at::ScalarType dtype, double tolerance) {
  at::set_num_threads(1);
  int rank = -1;
  try {
    Fabric<Cpu, S, P> fabric({.devices = 2, .strategy = {.timeout = std::chrono::seconds(60)}});
    fabric.launch();
    rank = fabric.global_rank();
    const Json& expected = reference()[network][precision];
    const Trace trace = train<Model>(fabric, dtype);
    double loss = 0;
    double norm = 0;
    double checksum = 0;
    for (std::size_t step = 0; step < trace.losses.size(); ++step) {
      loss = std::max(loss, relative(trace.losses[step], expected["losses"][step][rank]));
      norm = std::max(norm, relative(trace.norms[step], expected["norms"][step]));
    }
    REQUIRE(trace.checksums.size() == expected["parameters"].size());
    for (const auto& [name, sum] : trace.checksums) {
      checksum = std::max(checksum, relative(sum, expected["parameters"][name]));
    }
    CAPTURE(rank, network, precision, loss, norm, checksum);
    REQUIRE(trace.losses.size() == expected["losses"].size());
    REQUIRE(loss <= tolerance);
    REQUIRE(norm <= tolerance);
    REQUIRE(checksum <= 100 * tolerance);  // it counts an element 64 times or so
    fabric.barrier();
  } catch (const std::exception& error) {
    std::cout << "rank " << rank << ": " << error.what() << std::endl;
    std::exit(1);
  } catch (...) {  // a failed REQUIRE, which Catch has reported
    std::cout << "rank " << rank << " failed" << std::endl;
    std::exit(1);
  }
}

template <class S>
void compare_both() {
  compare<S, F64, sharding::TransformerImpl>("transformer", "f64", at::kDouble, 1e-12);
  compare<S, F64, sharding::CnnImpl>("cnn", "f64", at::kDouble, 1e-12);
  compare<S, F32, sharding::TransformerImpl>("transformer", "f32", at::kFloat, 1e-5);
  compare<S, F32, sharding::CnnImpl>("cnn", "f32", at::kFloat, 1e-5);
}

}  // namespace

TEST_CASE("[issue-8.accept] Ddp has the losses, norms and parameters of Python's FSDP2") { compare_both<Ddp>(); }
