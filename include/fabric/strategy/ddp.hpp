// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "fabric/comm/agreement.hpp"
#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/processes.hpp"
#include "fabric/libtorch.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/policy/strategy.hpp"
#include "fabric/shard/tensor_slice.hpp"
#include "fabric/strategy/ddp_hooks.hpp"
#include "fabric/strategy/engine.hpp"
#include "fabric/strategy/sync_guard.hpp"
#include "fabric/tree.hpp"

namespace fabric {

/// What may be tuned of `Ddp`.
struct DdpOptions {
  bool static_graph = false;            ///< Every step uses the same parameters: found out once, in the first.
  bool gradient_as_bucket_view = true;  ///< Gradients lie in the buckets themselves, which saves a copy of each.
  bool broadcast_buffers = true;        ///< Buffers (BatchNorm's statistics) are rank 0's in each step and after it.
  double bucket_cap_mb = 25;            ///< Size of the gradient buckets. The first one is 1 MB, to start early.
  GradientCompression compression = GradientCompression::none;
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};  ///< Of each collective.
  bool detect_desync = false;                                   ///< See LaunchOptions, as for the next one.
  std::string log_dir{};
};

namespace detail {

/// The parameters, by their index, with gradients of a backward that kept them on their rank.
struct Unaveraged {
  std::vector<bool> which;
  bool any = false;
};

}  // namespace detail

/// What `Ddp` keeps for a module: c10d's Reducer, which averages gradients bucket by bucket while backward still runs.
template <bool find_unused_parameters>
class DdpModule {
 public:
  DdpModule();
  ~DdpModule();
  DdpModule(const DdpModule&) = delete;
  DdpModule& operator=(const DdpModule&) = delete;

  /// Makes parameters and buffers those of rank 0 on all ranks and hooks into backward. Throws fabric::Error, on all of
  /// them, when their modules do not have the same parameters and buffers.
  void setup(torch::nn::Module& module, const World& world, const DdpOptions& options);

  /// Runs the module by `run()` with the reducer prepared for its backward.
  template <class Run>
  auto forward(Run&& run) {
    if (!reducer_ || !at::GradMode::is_enabled()) return std::forward<Run>(run)();
    prepare_for_forward();
    auto output = std::forward<Run>(run)();
    std::vector<at::Tensor> outputs;
    if (looks_for_unused() || delays_first_all_reduce()) {
      tree::for_each(output, [&](const at::Tensor& tensor) { outputs.push_back(tensor); });
    }
    prepare_for_backward(outputs);
    return output;
  }

  /// Makes the gradients, which are views of buckets, look like tensors of their own, since `torch::optim`'s zero_grad
  /// detaches each in place and that is refused for views. They share the bucket's memory still, which is what the
  /// reducer looks at.
  void after_backward() {
    if (!options_.gradient_as_bucket_view) return;
    for (const at::Tensor& parameter : parameters_) {
      at::Tensor& gradient = parameter.mutable_grad();
      if (gradient.defined() && gradient.is_view()) gradient = gradient.variable_data();
    }
  }

  /// Throws fabric::Error when gradients were not averaged: a parameter took no part in the loss, the last backward
  /// kept gradients local, or the module was called past its wrapper. Then shares the buffers, so that the ranks agree
  /// when they evaluate, each at its own pace.
  void before_step();
  /// The mean of the ranks' losses: an optimizer that goes by its loss must go the same way on all of them.
  [[nodiscard]] at::Tensor mean_loss(const at::Tensor& loss) const { return all_reduce(world_, loss.detach()); }
  /// An optimizer's gradients are gone, and with them what was not averaged, unless others have some of it.
  void after_zero_grad(const torch::optim::Optimizer& optimizer);

  /// False inside no_backward_sync.
  bool sync_gradients = true;

 private:
  template <at::ScalarType dtype>
  void compress() {
    reducer_->register_comm_hook(std::make_unique<CompressionHook<dtype>>(world_.group));
  }

  [[nodiscard]] bool looks_for_unused() const { return find_unused_parameters && !options_.static_graph; }
  void prepare_for_forward();
  void prepare_for_backward(const std::vector<at::Tensor>& outputs);

  /// Gives all ranks rank 0's buffers, if a forward may have changed them since.
  void share_buffers() {
    if (!options_.broadcast_buffers || !std::exchange(buffers_differ_, false)) return;
    detail::broadcast_in_place(world_.group, buffers_);
  }

  /// With a static graph the first backward finds out how often each parameter is used; reducing waits until it is
  /// over.
  [[nodiscard]] bool delays_first_all_reduce() const { return options_.static_graph && !*first_backward_seen_; }
  void delay_first_all_reduce(const std::vector<at::Tensor>& outputs);

  /// Runs `check`, which fails when the last backward missed parameters, with an error that names them.
  template <class Check>
  void naming_unused(Check&& check) {
    try {
      check();
    } catch (const c10::Error& error) {
      const std::string reason = error.what_without_backtrace();
      const auto at = reason.find("indices which did not receive grad for rank ");
      if (at == std::string::npos) throw;
      std::istringstream indices(reason.substr(reason.find(": ", at) + 2));
      std::string unused;
      for (std::size_t index = 0; indices >> index;) unused += (unused.empty() ? "" : ", ") + names_.at(index);
      throw Error(
          "fabric: Ddp: these parameters took no part in the loss, so that their gradients cannot be averaged: " +
          unused + ". Use DdpFindUnusedParameters (" + std::string(DdpFindUnusedParameters::facts.flag.view()) +
          ") or its like for spawned and forked processes, or leave them out by requires_grad_(false)");
    }
  }

  World world_;
  DdpOptions options_;
  bool buffers_differ_ = false;
  // Shared with hooks, which may outlive this.
  std::shared_ptr<bool> first_backward_seen_ = std::make_shared<bool>(false);
  std::shared_ptr<detail::Unaveraged> unaveraged_ = std::make_shared<detail::Unaveraged>();
  std::vector<at::Tensor> parameters_;
  std::unordered_map<size_t, std::string> names_;  // of parameters_, by index
  std::vector<at::Tensor> buffers_;
  std::shared_ptr<libtorch::Reducer> reducer_;
  std::shared_ptr<c10d::Logger> logger_;  // the reducer crashes without one when the unused parameters change
};

// Out of the class, and so not inline: fabric/separate.hpp has them compiled once.
template <bool find_unused_parameters>
DdpModule<find_unused_parameters>::DdpModule() = default;
template <bool find_unused_parameters>
DdpModule<find_unused_parameters>::~DdpModule() = default;

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::prepare_for_forward() {
  naming_unused([&] {  // both look at how the last backward ended
    if (sync_gradients) reducer_->prepare_for_forward();
    reducer_->rebuild_buckets();
  });
  if (sync_gradients) share_buffers();
}

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::prepare_for_backward(const std::vector<at::Tensor>& outputs) {
  buffers_differ_ = true;
  if (!sync_gradients) return;
  if (delays_first_all_reduce()) delay_first_all_reduce(outputs);
  reducer_->prepare_for_backward(looks_for_unused() ? outputs : std::vector<at::Tensor>());
}

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::setup(torch::nn::Module& module, const World& world,
                                              const DdpOptions& options) {
  world_ = world;
  options_ = options;
  std::vector<at::Tensor> replicated;
  std::vector<std::string> description;
  for (const auto& [name, parameter] : parameters_of(module)) {
    if (tensor_slice_of(parameter)) {
      throw Error("fabric: Ddp: '" + name +
                  "' holds this rank's slice of a parameter (parallelize_module), and Ddp would average it with other "
                  "slices. Use ModelParallel, or average gradients over the mesh's data group yourself");
    }
    description.push_back(detail::described(name, parameter));
    replicated.push_back(parameter.detach());
    if (!parameter.requires_grad()) continue;
    names_.emplace(parameters_.size(), name);
    parameters_.push_back(parameter);
  }
  // With versions of their own: a forward may have saved one that the next forward shares again.
  for (const at::Tensor& buffer : module.buffers()) buffers_.push_back(buffer.variable_data());
  for (const at::Tensor& buffer : buffers_) replicated.push_back(buffer.detach());
  for (const auto& buffer : module.named_buffers()) {
    description.push_back(detail::described(buffer.key(), buffer.value()));
  }
  detail::require_agreement(world, "setup", description);
  detail::broadcast_in_place(world_.group, replicated);
  if (parameters_.empty()) return;  // nothing to train, nothing to reduce

  constexpr double mb = 1024.0 * 1024.0;
  const auto capacity = static_cast<int64_t>(options.bucket_cap_mb * mb);
  const auto first_capacity = std::min(capacity, static_cast<int64_t>(mb));
  auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(
      parameters_, {static_cast<size_t>(first_capacity), static_cast<size_t>(capacity)});
  reducer_ = libtorch::make_reducer({.parameters = parameters_,
                                     .buckets = {buckets.rbegin(), buckets.rend()},  // backward begins at the end
                                     .group = world_.group,
                                     .bucket_bytes = capacity,
                                     .first_bucket_bytes = first_capacity,
                                     .find_unused_parameters = find_unused_parameters,
                                     .gradient_as_bucket_view = options.gradient_as_bucket_view,
                                     .names = names_});
  logger_ = std::make_shared<c10d::Logger>(reducer_);
  reducer_->set_logger(logger_);
  unaveraged_->which.resize(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    parameters_[i].register_hook(
        [i, reducer = std::weak_ptr(reducer_), unaveraged = unaveraged_](const at::Tensor& /*gradient*/) {
          const auto alive = reducer.lock();
          if (alive && !alive->expects_gradients()) {
            unaveraged->which[i] = unaveraged->any = true;
          } else if (unaveraged->any) {
            *unaveraged = {.which = std::vector<bool>(unaveraged->which.size())};  // this averages all that there are
          }
        });
  }
  if (options.static_graph) reducer_->set_static_graph();
  switch (options.compression) {
    case GradientCompression::none: break;
    case GradientCompression::f16: return compress<at::kHalf>();
    case GradientCompression::bf16: return compress<at::kBFloat16>();
  }
}

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::after_zero_grad(const torch::optim::Optimizer& optimizer) {
  if (!unaveraged_->any) return;
  const ParameterSet theirs = parameter_set(optimizer);
  unaveraged_->any = false;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const bool gone = !parameters_[i].grad().defined() || theirs.contains(parameters_[i].unsafeGetTensorImpl());
    unaveraged_->which[i] = unaveraged_->which[i] && !gone;
    unaveraged_->any = unaveraged_->any || unaveraged_->which[i];
  }
}

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::delay_first_all_reduce(const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    output.register_hook([reducer = reducer_, seen = first_backward_seen_](const at::Tensor& /*gradient*/) {
      if (std::exchange(*seen, true)) return;
      torch::autograd::Engine::get_default_engine().queue_callback([reducer] { reducer->delay_all_reduce(); });
    });
  }
}

template <bool find_unused_parameters>
void DdpModule<find_unused_parameters>::before_step() {
  if (!reducer_) return;
  naming_unused([&] { reducer_->check_finalized(); });
  if (unaveraged_->any) {
    throw Error(
        "fabric: Ddp: the gradients were not averaged over the ranks: the last backward ran under no_backward_sync, "
        "or its forward was not called through what `setup` returned. Step after a backward outside "
        "no_backward_sync, and call the wrapped module; its other methods by `mark_forward_method`");
  }
  share_buffers();
}

namespace detail {

/// `Ddp` for tensors on `A`; `find_unused_parameters` comes from the policy.
template <class A, bool find_unused_parameters>
class DdpEngine {
 public:
  using Options = DdpOptions;
  using ModuleState = DdpModule<find_unused_parameters>;

  explicit DdpEngine(const Options& options) : options_(options) {}
  /// `options` with what a strategy object brought in the selection.
  static Options merged(Options options, const StrategyOptions& brought) {
    options.static_graph = options.static_graph || brought.static_graph;
    if (brought.bucket_cap_mb > 0) options.bucket_cap_mb = brought.bucket_cap_mb;
    return options;
  }

  World launch(const Selection& selection, at::Device device) {
    return join_world(selection, device, launch_options());
  }
  [[nodiscard]] LaunchOptions launch_options() const {
    return {.timeout = options_.timeout, .detect_desync = options_.detect_desync, .log_dir = options_.log_dir};
  }
  void setup(ModuleState& state, torch::nn::Module& module, const World& world) {
    state.setup(module, world, options_);
  }
  template <class Run>
  static auto forward(ModuleState& state, Run&& run) {
    return state.forward(std::forward<Run>(run));
  }
  static void after_backward(ModuleState& state) { state.after_backward(); }
  static void before_step(ModuleState& state) { state.before_step(); }
  static at::Tensor mean_loss(const ModuleState& state, const at::Tensor& loss) { return state.mean_loss(loss); }
  static void after_zero_grad(ModuleState& state, const torch::optim::Optimizer& optimizer) {
    state.after_zero_grad(optimizer);
  }
  static SyncGuard<ModuleState> no_backward_sync(ModuleState& state, bool enabled) { return {state, enabled}; }

 private:
  Options options_;
};

}  // namespace detail

/// All of the family: they differ in how their processes begin, which `launch` reads from the selection.
template <class A, class S>
requires(detail::has_collectives<A>&& S::facts.built_in&& S::facts.family == StrategyFamily::ddp) class Engine<A, S>
    : public detail::DdpEngine<A, S::facts.find_unused_parameters> {
  using detail::DdpEngine<A, S::facts.find_unused_parameters>::DdpEngine;
};

}  // namespace fabric
