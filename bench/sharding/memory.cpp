// SPDX-License-Identifier: Apache-2.0
//
// The processes whose memory is measured.

#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fabric/dispatch.hpp>
#include <fmt/format.h>
#include <malloc.h>
#include <nlohmann/json.hpp>

#include "run_on.hpp"
#include "task.hpp"
#include "transformer.hpp"

namespace bench {
namespace {

using Menu = fabric::Menu<
    fabric::Accelerators<fabric::Cpu>,
    fabric::Strategies<fabric::Ddp, fabric::DeepSpeed<1>, fabric::DeepSpeed<2>, fabric::DeepSpeed<3>,
                       fabric::DeepSpeed<1, fabric::Offload::cpu>, fabric::DeepSpeed<3, fabric::Offload::cpu>,
                       fabric::DeepSpeed<3, fabric::Offload::nvme>>,
    fabric::Precisions<fabric::BF16Mixed>>;

/// A line of /proc/self/status that counts kilobytes, in bytes.
std::int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  throw std::runtime_error("/proc/self/status has no " + key);
}

/// Makes this moment's resident memory the peak.
void forget_peak() {
  std::ofstream file("/proc/self/clear_refs");
  if (!(file << "5" << std::flush)) throw std::runtime_error("cannot write /proc/self/clear_refs");
}

/// A step of a small model of the same kind, so that what the libraries load and keep for themselves, such as code, is
/// not counted as a model's.
void warm_up() {
  const Shape shape = shape_of("small");
  Transformer net(shape);
  fabric::optim::AdamW adamw(net->parameters(), fabric::optim::AdamWOptions(learning_rate));
  const Text text = make_text(shape);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    net->to(dtype);
    loss_of(net->forward(text.inputs), text.targets).backward();
    if (dtype == at::kFloat) adamw.step();
    adamw.zero_grad();
  }
}

/// What a rank should need at most, in bytes, by its parts.
std::map<std::string, std::int64_t> expected(const Shape& shape, const fabric::StrategyFacts& strategy,
                                             std::int64_t ranks) {
  const std::int64_t all = shape.parameters();
  const std::int64_t unit = shape.block_parameters();
  const std::int64_t own = all / ranks;
  std::map<std::string, std::int64_t> parts;
  const bool sharded = strategy.stage > 0;
  // In files: of the unit that is stepped, the one that leaves and the one that comes.
  const std::int64_t kept = strategy.optimizer_offload == fabric::Offload::nvme ? 3 * unit / ranks
                            : sharded                                           ? own
                                                                                : all;
  parts["master"] = 4 * kept;
  parts["moments"] = 8 * kept;
  // Under Ddp those are what is computed with, in copies of bfloat16 that autocast keeps until the forward is over.
  parts["parameters"] = 2 * (strategy.parameter_offload == fabric::Offload::nvme ? kept
                             : strategy.stage == 3                               ? own
                                                                                 : all);
  parts["gradients"] = sharded ? 4 * own + (strategy.stage == 1 ? 2 * all : 0) : 4 * all;
  // Whole parameters and gradients of the one that computes and of the one that comes or goes.
  parts["units"] = sharded ? 2 * (2 * unit + 2 * unit) : 0;
  // Of each token and block backward needs in bfloat16: x, its normalised copy, q, k, v, what attention gives, x again,
  // its normalised copy, and four times as wide the layer before gelu and after it.
  const std::int64_t tokens = shape.rows * shape.tokens;
  parts["activations"] = 2 * tokens * (shape.layers * 16 * shape.width + 2 * shape.width + 2 * shape.vocabulary);
  return parts;
}

}  // namespace

void measure_memory(const Task& task) {
  const Shape shape = shape_of(task.model);
  run_on<Menu>(task, [&](auto& fabric) {
    using F = std::remove_reference_t<decltype(fabric)>;
    warm_up();
    fabric.barrier();
    malloc_trim(0);
    forget_peak();
    const std::int64_t before = status("VmRSS");

    torch::manual_seed(0);
    auto net = fabric.init_module([&] { return Transformer(shape); }, {.empty = true});
    torch::manual_seed(1 + static_cast<std::uint64_t>(fabric.global_rank()));
    const Text text = make_text(shape);
    auto [model, optimizer] =
        fabric.setup(net, fabric::optim::AdamW(net->parameters(), fabric::optim::AdamWOptions(learning_rate)));
    const std::int64_t built = status("VmHWM") - before;
    double loss = 0;
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const at::Tensor value = loss_of(model(text.inputs), text.targets);
      fabric.backward(value);
      optimizer.step();
      loss = value.item<double>();
    }
    const auto most = [&](std::int64_t bytes) {
      return fabric.all_reduce(torch::tensor(bytes), fabric::ReduceOp::max).template item<std::int64_t>();
    };
    const std::int64_t peak = most(status("VmHWM") - before);
    const std::int64_t most_built = most(built);
    const auto parts = expected(shape, fabric::PoliciesOf<F>::combination.strategy, fabric.world_size());
    fabric.print(nlohmann::json{{"peak", peak}, {"built", most_built}, {"loss", loss}, {"parts", parts}}.dump());
  });
}

}  // namespace bench
