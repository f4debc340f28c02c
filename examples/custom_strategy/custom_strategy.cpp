// SPDX-License-Identifier: Apache-2.0
//
// A strategy from outside the library: it averages all gradients after backward, in one go. Two parts make it: a
// policy, which names it, and an engine, which says what happens around a module.
//   custom_strategy --strategy average --devices 2

#include <cstdio>
#include <exception>

#include <CLI/CLI.hpp>
#include <fabric/fabric.hpp>
#include <torch/torch.h>

struct Average {
  static constexpr fabric::StrategyFacts facts{
      .name = "Average", .flag = "average", .start_method = fabric::StartMethod::popen, .built_in = false};
};

template <>
class fabric::Engine<fabric::Cpu, Average> {
 public:
  struct Options {};
  struct ModuleState {
    World world;
    std::vector<at::Tensor> parameters;
    bool local = false;  // inside no_backward_sync
  };
  struct SyncGuard {
    ModuleState& state;
    ~SyncGuard() { state.local = false; }
  };

  explicit Engine(const Options& /*options*/) {}
  static World launch(const Selection& selection, at::Device device) {
    return join_world(selection, device, {.timeout = std::chrono::minutes(5)});
  }
  static void setup(ModuleState& state, torch::nn::Module& module, const World& world) {
    state = {world, module.parameters()};
    const at::NoGradGuard no_grad;
    for (at::Tensor& parameter : state.parameters) parameter.copy_(broadcast(world, parameter));
  }
  template <class Run>
  static auto forward(ModuleState& /*state*/, Run&& run) {
    return run();
  }
  static void after_backward(ModuleState& state) {
    if (state.local) return;
    for (at::Tensor& parameter : state.parameters) {
      if (parameter.grad().defined()) parameter.mutable_grad() = all_reduce(state.world, parameter.grad());
    }
  }
  static void before_step(ModuleState& /*state*/) {}
  static void after_zero_grad(ModuleState& /*state*/, const torch::optim::Optimizer& /*optimizer*/) {}
  static SyncGuard no_backward_sync(ModuleState& state, bool enabled) {
    state.local = enabled;
    return {state};
  }
};

namespace {

/// Fits a plane to points that each rank draws for itself.
template <class F>
void train(F& fabric) {
  fabric.launch();
  fabric::seed_everything(0);
  torch::nn::Linear plane(2, 1);
  torch::optim::SGD sgd(plane->parameters(), 0.5);
  auto [model, optimizer] = fabric.setup(plane, sgd);
  fabric::seed_everything(1 + static_cast<std::uint64_t>(fabric.global_rank()));
  for (int step = 0; step < 100; ++step) {
    const auto points = torch::rand({64, 2});
    const auto heights = points.sum(1, true);
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(model(points), heights);
    fabric.backward(loss);
    optimizer.step();
  }
  const auto least = fabric.all_reduce(plane->weight, fabric::ReduceOp::min);
  const auto most = fabric.all_reduce(plane->weight, fabric::ReduceOp::max);
  fabric.print("processes=", fabric.world_size(), " error=", (most - 1).abs().max().template item<double>(),
               " equal=", at::equal(least, most) ? "yes" : "no");
}

}  // namespace

int main(int argc, char** argv) try {
  fabric::Flags flags;
  CLI::App app("Trains with a strategy of its own");
  fabric::add_flags(app, flags);
  CLI11_PARSE(app, argc, argv);
  using namespace fabric;
  using OnWhat = Menu<Accelerators<Cpu>, Strategies<SingleDevice, Average>, Precisions<F32, F64>>;
  dispatch<OnWhat>(resolve_here(flags, registry_with<Average>), [](auto& fabric) { train(fabric); });
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "custom_strategy: %s\n", error.what());
  return 1;
}
