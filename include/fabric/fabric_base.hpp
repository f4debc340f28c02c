// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/nn/module.h>

#include "fabric/callback.hpp"
#include "fabric/comm/agreement.hpp"
#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/resolve_here.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/data/data_loader.hpp"
#include "fabric/device.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/preemption.hpp"
#include "fabric/loggers/logger.hpp"
#include "fabric/module/deferred.hpp"
#include "fabric/module/fabric_module.hpp"
#include "fabric/policy/rules.hpp"
#include "fabric/random.hpp"
#include "fabric/tree.hpp"

namespace fabric {

/// The part of `Fabric` that is the same for all policies: who this process is, what it says to the other ranks, to
/// loggers and to callbacks. Not to be used by itself. A template for the sake of fabric/separate.hpp alone: what is
/// defined out of the class is compiled once in such a program.
template <class = void>
class FabricBase {
 public:
  FabricBase(const FabricBase&) = delete;
  FabricBase& operator=(const FabricBase&) = delete;

  /// The tensors of a tree, or a module, on this rank's device.
  template <class T>
  [[nodiscard]] tree::Bare<T> to_device(T&& value) const {
    require_launch("to_device");
    if constexpr (ModuleArgument<T>) {
      auto module = detail::shared_module(value);
      module->to(device_);
      return std::forward<T>(value);
    } else {
      return tree::map(std::forward<T>(value), [this](const at::Tensor& tensor) { return tensor.to(device_); });
    }
  }

  /// Runs `function` on global rank 0 (with `local`: on each node's local rank 0) before the other ranks do, so that
  /// the first finds nothing and the others what it made, such as a download. Returns what `function` returns.
  template <class Function>
  auto rank_zero_first(Function&& function, bool local = false) const {
    require_launch("rank_zero_first");
    const bool first = local ? world_.local_rank == 0 : is_global_zero();
    if (!first) barrier();
    if constexpr (std::is_void_v<std::invoke_result_t<Function>>) {
      std::forward<Function>(function)();
      if (first) barrier();
    } else {
      auto result = std::forward<Function>(function)();
      if (first) barrier();
      return result;
    }
  }

  /// Writes the values and a line end to standard output, on global rank 0 only.
  template <class... Values>
  void print(const Values&... values) const {
    if (!is_global_zero()) return;
    std::ostringstream line;
    (line << ... << values);
    std::puts(line.str().c_str());
    std::fflush(stdout);
  }

  /// Tells the loggers a metric, on global rank 0 only. A tensor must have one element.
  void log(const std::string& name, double value, std::optional<std::int64_t> step = std::nullopt);
  void log(const std::string& name, const at::Tensor& value, std::optional<std::int64_t> step = std::nullopt);
  /// Several metrics as one row.
  void log_dict(const Metrics& metrics, std::optional<std::int64_t> step = std::nullopt);

  /// Calls `hook` on each callback that has it, in their order.
  template <class Hooks, class... Parameters, class... Arguments>
  void call(void (Hooks::*hook)(Parameters...), const Arguments&... arguments) {
    for (const auto& callback : callbacks_) {
      if (auto* hooks = dynamic_cast<Hooks*>(callback.get())) (hooks->*hook)(arguments...);
    }
  }

  /// True on all ranks, at the same call, once one of them has been sent SIGTERM or SIGUSR1: time to save, to leave the
  /// loop and to end with `preempted_exit_code`. To be called by all ranks at the end of each step, where it costs
  /// nothing. From the first call on, these signals no longer end the process.
  [[nodiscard]] static bool should_stop() { return detail::should_stop(); }

  /// See fabric::seed_everything: the same on all ranks, so that they make equal modules.
  static std::uint64_t seed_everything(std::uint64_t seed = 0) { return fabric::seed_everything(seed); }

  /// Waits for all ranks.
  void barrier() const;
  /// See fabric::all_reduce: a tree combined over the ranks, on all of them.
  template <class T>
  [[nodiscard]] auto all_reduce(T&& value, ReduceOp op = ReduceOp::mean) const {
    require_launch("all_reduce");
    return fabric::all_reduce(world_, std::forward<T>(value), op);
  }
  /// See fabric::reduce: combined on rank `root` alone.
  template <class T>
  [[nodiscard]] auto reduce(T&& value, ReduceOp op = ReduceOp::mean, int root = 0) const {
    require_launch("reduce");
    return fabric::reduce(world_, std::forward<T>(value), op, root);
  }
  /// See fabric::all_gather: (world size, *shape) for each tensor of the tree.
  template <class T>
  [[nodiscard]] auto all_gather(T&& value) const {
    require_launch("all_gather");
    return fabric::all_gather(world_, std::forward<T>(value));
  }
  /// Rank `root`'s tree, text or number, on all ranks.
  template <class T>
  [[nodiscard]] auto broadcast(T&& value, int root = 0) const {
    require_launch("broadcast");
    if constexpr (std::is_convertible_v<T, std::string>) {
      return fabric::broadcast(world_, std::string(std::forward<T>(value)), root);
    } else if constexpr (std::is_arithmetic_v<tree::Bare<T>>) {
      return fabric::broadcast(world_, value, root);
    } else {
      return fabric::broadcast(world_, std::forward<T>(value), root);
    }
  }

  [[nodiscard]] int global_rank() const { return world_.global_rank; }
  [[nodiscard]] int local_rank() const { return world_.local_rank; }
  [[nodiscard]] int node_rank() const { return world_.node_rank; }
  [[nodiscard]] int world_size() const { return world_.size; }
  [[nodiscard]] bool is_global_zero() const { return world_.is_global_zero(); }
  [[nodiscard]] at::Device device() const { return device_; }
  [[nodiscard]] const World& world() const { return world_; }
  [[nodiscard]] const Selection& selection() const { return selection_; }

 protected:
  /// Throws fabric::Error if the selection is not of the policies `own`.
  FabricBase(const Selection& selection, const Combination& own, std::vector<std::shared_ptr<Logger>> loggers,
             std::vector<std::shared_ptr<Callback>> callbacks);
  ~FabricBase();

  /// What `flags` come down to on this machine, with these devices.
  [[nodiscard]] static Selection resolved(Flags flags, const DevicesFlag& devices, const NumNodesFlag& num_nodes);

  /// Throws fabric::Error before launch(), under strategies of several processes.
  void require_launch(const char* what) const {
    if (!launched_ && is_parallel(selection_.strategy)) [[unlikely]]
      refuse_before_launch(what);
  }
  void require_first_launch() const;
  /// This process has come to `world`.
  void has_launched(World world);

  /// Throws fabric::Error unless all ranks have as many rows and deal them in the same way.
  void agree_on_rows(std::optional<std::size_t> rows, const LoaderOptions& options) const;
  /// Throws fabric::Error unless all ranks have a stream of this kind.
  void agree_on_stream(bool ends, const LoaderOptions& options) const;

  /// Gives a module its memory, if it was made without, on this rank's device.
  void place(torch::nn::Module& module) const;

  [[noreturn]] static void refuse_loss(const at::Tensor& loss);

  Selection selection_;
  std::vector<std::shared_ptr<Logger>> loggers_;
  std::vector<std::shared_ptr<Callback>> callbacks_;
  at::Device device_;
  World world_;
  bool launched_ = false;

 private:
  [[noreturn]] static void refuse_before_launch(const char* what);
};

template <class Unused>
FabricBase<Unused>::FabricBase(const Selection& selection, const Combination& own,
                               std::vector<std::shared_ptr<Logger>> loggers,
                               std::vector<std::shared_ptr<Callback>> callbacks)
    : selection_(selection),
      loggers_(std::move(loggers)),
      callbacks_(std::move(callbacks)),
      device_(device_of(selection, 0)) {
  if (!selects(selection, own)) {
    throw Error("fabric: this is a " + name_of(own) + ", but the selection says " +
                name_of({selection.accelerator, selection.strategy, selection.precision}));
  }
  if (is_parallel(own.strategy)) {
    // Before launch() a process that somebody else started has a rank already, and only rank 0 may print.
    world_.size = selection.world_size.value;
    world_.global_rank = selection.global_rank.value;
    world_.local_rank = selection.local_rank.value;
    world_.node_rank = selection.node_rank.value;
  } else {
    activate(device_);
  }
  world_.device = device_;
}

template <class Unused>
FabricBase<Unused>::~FabricBase() = default;

template <class Unused>
Selection FabricBase<Unused>::resolved(Flags flags, const DevicesFlag& devices, const NumNodesFlag& num_nodes) {
  flags.devices = devices;
  flags.num_nodes = num_nodes;
  return resolve_here(flags);
}

template <class Unused>
void FabricBase<Unused>::refuse_before_launch(const char* what) {
  throw Error(std::string("fabric: ") + what + " before launch(): call fabric.launch() first");
}

template <class Unused>
void FabricBase<Unused>::require_first_launch() const {
  if (launched_) throw Error("fabric: launch() was called twice on the same Fabric");
}

template <class Unused>
void FabricBase<Unused>::has_launched(World world) {
  world_ = std::move(world);
  device_ = device_of(selection_, world_.local_rank);
  activate(device_);
  world_.device = device_;
  launched_ = true;
}

template <class Unused>
void FabricBase<Unused>::log(const std::string& name, double value, std::optional<std::int64_t> step) {
  log_dict({{name, value}}, step);
}

template <class Unused>
void FabricBase<Unused>::log(const std::string& name, const at::Tensor& value, std::optional<std::int64_t> step) {
  if (is_global_zero() && !loggers_.empty()) log(name, value.item<double>(), step);
}

template <class Unused>
void FabricBase<Unused>::log_dict(const Metrics& metrics, std::optional<std::int64_t> step) {
  if (!is_global_zero()) return;
  for (const auto& logger : loggers_) logger->log_metrics(metrics, step);
}

template <class Unused>
void FabricBase<Unused>::barrier() const {
  require_launch("barrier");
  fabric::barrier(world_);
}

template <class Unused>
void FabricBase<Unused>::agree_on_rows(std::optional<std::size_t> rows, const LoaderOptions& options) const {
  const std::string seed = options.shuffle ? ", seed " + std::to_string(options.seed) : "";
  detail::require_agreement(world_, "setup_dataloader",
                            {"rows " + std::to_string(rows.value_or(0)),
                             "batches of " + std::to_string(options.batch_size) +
                                 (options.shuffle ? ", shuffled" : "") + (options.pad ? ", padded" : "") + seed});
}

template <class Unused>
void FabricBase<Unused>::agree_on_stream(bool ends, const LoaderOptions& options) const {
  detail::require_agreement(world_, "setup_dataloader",
                            {std::string("a stream ") + (ends ? "with an end" : "without end"),
                             "batches of " + std::to_string(options.batch_size) + (options.drop_last ? ", full" : "")});
}

template <class Unused>
void FabricBase<Unused>::place(torch::nn::Module& module) const {
  detail::require_memory(module, device_);
  module.to(device_);
}

template <class Unused>
void FabricBase<Unused>::refuse_loss(const at::Tensor& loss) {
  throw Error(std::string("fabric: backward of a tensor that no parameter has part in (") +
              (loss.defined() ? "requires_grad is false" : "it is undefined") +
              "): was it detached, made under NoGradGuard, or is it not the output of a module that `setup` returned?");
}

}  // namespace fabric
