// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/device_mesh.hpp"
#include "fabric/comm/process_group.hpp"
#include "fabric/comm/subgroup.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/device.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/processes.hpp"
#include "fabric/module/deferred.hpp"
#include "fabric/policy/strategy_precision.hpp"
#include "fabric/precision/precision_plugin.hpp"
#include "fabric/precision/sharded_precision.hpp"
#include "fabric/shard/adopt_optimizer.hpp"
#include "fabric/shard/offload.hpp"
#include "fabric/shard/options.hpp"
#include "fabric/shard/sharded_clip.hpp"
#include "fabric/shard/sharded_module.hpp"
#include "fabric/shard/tensor_parallel.hpp"
#include "fabric/strategy/engine.hpp"
#include "fabric/strategy/sync_guard.hpp"

namespace fabric {

namespace detail {

/// The ranks of a job in shard groups of `size` neighbours. All ranks call this together.
inline ShardGroups make_shard_groups(const World& world, int size) {
  const World alone = world_of(world, {});
  ShardGroups groups{.world = world, .shard = world, .prefetch = world, .replicate = world, .tensor = alone};
  if (size == world.size) {
    groups.replicate = alone;
  } else if (size == 1) {
    groups.shard = alone;
  } else {
    std::vector<int> neighbours;
    std::vector<int> peers;
    for (int rank = 0; rank < world.size; ++rank) {
      if (rank / size == world.global_rank / size) neighbours.push_back(rank);
      if (rank % size == world.global_rank % size) peers.push_back(rank);
    }
    groups.shard = world_of(world, make_subgroup(world, neighbours, "shard"));
    groups.replicate = world_of(world, make_subgroup(world, peers, "replicate"));
  }
  groups.prefetch = groups.shard;
  if (world.device.is_cuda() && groups.shard.size > 1) {
    // NCCL runs what one group does in its order: gathering must not wait for the reductions before it.
    std::vector<int> ranks;
    const int first = groups.shard.size == world.size ? 0 : world.global_rank / size * size;
    for (int rank = first; rank < first + groups.shard.size; ++rank) ranks.push_back(rank);
    groups.prefetch = world_of(world, make_subgroup(world, ranks, "prefetch"));
  }
  return groups;
}

/// The strategies that shard, on one engine; `S` says what of it they use.
template <class A, class S>
class ShardedEngine {
 public:
  using Options = ShardingOptions;
  using ModuleState = ShardedModule;
  /// What a precision does here.
  template <class P>
  using Plugin =
      std::conditional_t<P::facts.kind == PrecisionKind::custom || P::facts.kind == PrecisionKind::bitsandbytes,
                         PrecisionPlugin<P>, ShardedPrecision<S, P>>;
  /// Units move to the device one by one.
  static constexpr bool moves_modules = false;

  explicit ShardedEngine(const Options& options) : options_(options) { check_options(); }

  /// `options` with what a strategy object brought in the selection.
  static Options merged(Options options, const StrategyOptions& brought) {
    if (brought.sharding != Sharding::full) options.sharding = brought.sharding;
    if (brought.tensor_parallel_size > 0) options.tensor_parallel_size = brought.tensor_parallel_size;
    return options;
  }

  World launch(const Selection& selection, at::Device device) {
    return join_world(selection, device, launch_options());
  }
  [[nodiscard]] LaunchOptions launch_options() const {
    return {.timeout = options_.timeout, .detect_desync = options_.detect_desync, .log_dir = options_.log_dir};
  }

  void setup(ShardedModule& state, torch::nn::Module& module, const World& world, const StrategyPrecision& precision) {
    const ShardGroups& groups = groups_of(world);
    if (!options_.tensor_parallel.entries.empty()) {
      require_memory(module, world.device);
      parallelize_module(module, groups.tensor, options_.tensor_parallel);
    }
    Options options = options_;
    if (options.sharding == Sharding::grad_op) options.reshard_after_forward = false;
    const OwnPages own_pages(world.device);
    state.setup(module, groups, options, layout(world, precision));
    if (world.device.is_cpu()) return_freed_memory();  // of the module as it was whole
  }
  /// The ranks among which data are divided.
  [[nodiscard]] World data_world(const World& world) const { return groups_of(world).world; }
  static void adopt(torch::optim::Optimizer& optimizer, const std::vector<std::shared_ptr<ShardedModule>>& states) {
    adopt_optimizer(optimizer, states);
  }
  template <class Run>
  static auto forward(ShardedModule& state, Run&& run) {
    return state.forward(std::forward<Run>(run));
  }
  /// `clip_gradients` of the masters of modules, or of an optimizer that has them.
  template <class Owner>
  static at::Tensor clip_gradients(const std::vector<std::shared_ptr<ShardedModule>>& states, const Owner& owner,
                                   const ClipNorm& clip) {
    return clip_sharded_gradients(states, owner, clip);
  }
  /// `step()`, which steps the optimizer, for all parameters at once or, where its state is in files, for one unit
  /// after the other.
  template <class Step>
  static auto step(const std::vector<std::shared_ptr<ShardedModule>>& states, torch::optim::Optimizer& optimizer,
                   const Step& step) {
    if constexpr (facts.optimizer_offload == Offload::nvme) {
      return step_by_unit(states, optimizer, step);
    } else {
      // The first step makes the optimizer's state.
      std::optional<OwnPages> own_pages;
      for (const auto& state : states) {
        if (state->has_stepped() || state->shards().empty()) continue;
        own_pages.emplace(state->shards().front().master.device());
        break;
      }
      return step();
    }
  }
  static void after_backward(ShardedModule& state) { state.after_backward(); }
  static void abandon_backward(ShardedModule& state) { state.abandon_backward(); }
  static void before_step(ShardedModule& state) { state.before_step(); }
  static void after_step(ShardedModule& state) { state.after_step(); }
  static void after_zero_grad(ShardedModule& state, const torch::optim::Optimizer& optimizer) {
    state.after_zero_grad(optimizer);
  }
  /// What `no_backward_sync` keeps on this rank of an optimizer's gradients.
  static std::vector<at::Tensor> local_gradients(const std::vector<std::shared_ptr<ShardedModule>>& states,
                                                 const torch::optim::Optimizer& optimizer) {
    std::vector<at::Tensor> gradients;
    for (const auto& state : states) {
      state->for_each_local_gradient(optimizer, [&](const at::Tensor& gradient) { gradients.push_back(gradient); });
    }
    return gradients;
  }
  static SyncGuard<ShardedModule> no_backward_sync(ShardedModule& state, bool enabled) { return {state, enabled}; }

 private:
  static constexpr StrategyFacts facts = S::facts;
  static constexpr bool is_deepspeed = facts.stage > 0;  // whose stage says what is sharded

  void check_options() const {
    std::string problems;
    if (is_deepspeed && options_.sharding != Sharding::full) {
      problems += "\n  sharding: DeepSpeed's stage says what is sharded; choose DeepSpeed<1>, <2> or <3>";
    }
    if (options_.shard_group_size != 0 && options_.sharding != Sharding::hybrid) {
      problems += "\n  shard_group_size: only Sharding::hybrid has groups";
    }
    if (options_.shard_group_size < 0) problems += "\n  shard_group_size: one or more ranks, or 0 for those of a node";
    if (options_.units_in_flight < 1) {
      problems += "\n  units_in_flight: " + std::to_string(options_.units_in_flight) + "; one or more is legal";
    }
    const bool divides = !options_.tensor_parallel.entries.empty() || options_.tensor_parallel_size > 1;
    if (divides && (is_deepspeed || facts.family == StrategyFamily::fsdp)) {
      problems += "\n  tensor_parallel: only ModelParallel divides layers";
    }
    if (options_.tensor_parallel_size > 1 && options_.tensor_parallel.entries.empty()) {
      problems += "\n  tensor_parallel_size: without a plan (tensor_parallel) no layer is divided";
    }
    if (!problems.empty()) throw Error("fabric: the options of " + std::string(facts.name.view()) + ":" + problems);
  }

  /// Made when they are first needed, by all ranks together.
  [[nodiscard]] const ShardGroups& groups_of(const World& world) const {
    if (groups_) return *groups_;
    int tensor_size = std::max(options_.tensor_parallel_size, 1);
    if (options_.tensor_parallel_size == 0 && !options_.tensor_parallel.entries.empty())
      tensor_size = local_size(world);
    if (tensor_size == 1) {
      groups_ = make_shard_groups(world, shard_group_size(world));
    } else {
      const DeviceMesh mesh = make_mesh(world, tensor_size);
      groups_ = make_shard_groups(mesh.data, shard_group_size(mesh.data));
      groups_->tensor = mesh.tensor;
    }
    return *groups_;
  }

  [[nodiscard]] int shard_group_size(const World& world) const {
    switch (options_.sharding) {
      case Sharding::full:
      case Sharding::grad_op: return world.size;
      case Sharding::none: return 1;
      case Sharding::hybrid: break;
    }
    const int size = options_.shard_group_size != 0 ? options_.shard_group_size : local_size(world);
    if (world.size % size == 0) return size;
    throw Error("fabric: Sharding::hybrid: groups of " + std::to_string(size) + " do not divide the " +
                std::to_string(world.size) + " ranks: set shard_group_size to a divisor");
  }
  /// How many of the world's ranks, which may be some of a job's, a node has: local ranks rise from one to the next
  /// until a node ends. All call this.
  static int local_size(const World& world) {
    const at::Tensor own = torch::tensor({static_cast<std::int64_t>(world.local_rank)}).to(world.device);
    const at::Tensor local_ranks = all_gather(world, own).flatten().cpu();
    int most = 1;
    int run = 1;
    for (std::int64_t i = 1; i < world.size; ++i) {
      const bool rises = local_ranks[i].item().toLong() > local_ranks[i - 1].item().toLong();
      run = rises ? run + 1 : 1;
      most = std::max(most, run);
    }
    return most;
  }

  [[nodiscard]] ShardedModule::Layout layout(const World& world, const StrategyPrecision& precision) const {
    const bool converts = precision.module.has_value() || precision.compute != Scalar::f32;
    const auto converted = [converts](Scalar to) {
      return [converts, to = dtype_of(to)](at::ScalarType kept) {
        return converts && at::isFloatingType(kept) ? to : kept;
      };
    };
    ShardedModule::Layout layout;
    layout.compute = converted(precision.compute);
    layout.reduce = converted(precision.reduce);
    const bool converts_buffers = precision.module.has_value() || precision.buffers != Scalar::f32;
    layout.buffer = [converts_buffers, to = dtype_of(precision.buffers)](at::ScalarType kept) {
      return converts_buffers && at::isFloatingType(kept) ? to : kept;
    };
    if (options_.reduce_dtype) layout.reduce = [to = *options_.reduce_dtype](at::ScalarType /*kept*/) { return to; };
    // Mixed precisions leave masters as they are; DeepSpeed keeps 32-bit copies of half floats besides.
    const bool exact = is_deepspeed && precision.module && *precision.module != Scalar::f64;
    layout.master = [](at::ScalarType kept) { return kept; };
    if (precision.module) layout.master = converted(exact ? Scalar::f32 : *precision.module);
    layout.master_device = is_offloaded(facts.optimizer_offload) ? at::Device(at::kCPU) : world.device;
    layout.own_device = is_offloaded(facts.parameter_offload) ? at::Device(at::kCPU) : world.device;
    // One rank alone has all of them all the time, unless they wait elsewhere than where they are used.
    const bool elsewhere = layout.own_device != world.device || facts.parameter_offload == Offload::nvme;
    const bool frees = groups_of(world).shard.size > 1 || elsewhere;
    layout.frees_parameters = frees && (!is_deepspeed || facts.stage == 3);
    layout.frees_buckets = !is_deepspeed || facts.stage > 1;
    if (facts.optimizer_offload == Offload::nvme) layout.folder = options_.nvme_path;
    return layout;
  }
  static constexpr bool is_offloaded(Offload offload) { return offload != Offload::none; }

  Options options_;
  mutable std::optional<ShardGroups> groups_;
};

}  // namespace detail

/// Fsdp, DeepSpeed and ModelParallel, on Cpu (by gloo) and Cuda (by NCCL); which goes with which is the rules'
/// business.
template <class A, class S>
requires(detail::has_collectives<A>&& S::facts.built_in&& is_sharded(S::facts)) class Engine<A, S>
    : public detail::ShardedEngine<A, S> {
  using detail::ShardedEngine<A, S>::ShardedEngine;
};

}  // namespace fabric
