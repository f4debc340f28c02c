// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "fabric/callback.hpp"
#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/flags.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/data/data_loader.hpp"
#include "fabric/data/distributed_sampler.hpp"
#include "fabric/data/stream_loader.hpp"
#include "fabric/fabric_base.hpp"
#include "fabric/launch/processes.hpp"
#include "fabric/loggers/logger.hpp"
#include "fabric/module/clip_gradients.hpp"
#include "fabric/module/deferred.hpp"
#include "fabric/module/fabric_module.hpp"
#include "fabric/module/fabric_optimizer.hpp"
#include "fabric/module/known_modules.hpp"
#include "fabric/optim/state_tensors.hpp"
#include "fabric/policy/diagnose.hpp"
#include "fabric/policy/rules.hpp"
#include "fabric/policy/strategy.hpp"
#include "fabric/policy/strategy_precision.hpp"
#include "fabric/precision/grad_scaler.hpp"
#include "fabric/precision/precision_plugin.hpp"
#include "fabric/strategy/engine_diagnosis.hpp"

namespace fabric {

// What fabric/checkpoint.hpp defines.
class State;
class Value;
struct TorchFile;
/// What of an object is saved: for a name in the state, which of its keys. `{{"model", keep}}` with
/// `bool keep(const std::string& key, const Value&)` leaves out the model's parameters for which it returns false.
using Filter = std::map<std::string, std::function<bool(const std::string& key, const Value& value)>>;

namespace detail {

template <class Io>
struct Checkpointing;
template <class Io>
inline constexpr bool has_checkpoints = requires {
  sizeof(Checkpointing<Io>);
};
/// How long a rank waits for the others to come to the same save or load.
inline constexpr std::chrono::milliseconds default_patience = std::chrono::minutes(5);

}  // namespace detail

/// Runs a training loop on an accelerator, by a strategy, in a precision, in an environment, all named as types. The
/// loop is the user's own: it calls `setup` on its modules and optimizers and `backward` on its loss, and the types do
/// the rest. Policies that do not go together do not compile; the compiler then names the nearest ones that do.
template <class Accelerator, class Strategy, class Precision, class Environment>
class Fabric : public FabricBase<> {
  static_assert(diagnose<Accelerator, Strategy, Precision, Environment>());
  static_assert(diagnose_engine<Accelerator, Strategy, Precision, Environment>());

  using Base = FabricBase<>;
  using Code = detail::CodeFor<Accelerator, Strategy, Precision>;

 public:
  using Engine = typename Code::Engine;
  using Plugin = typename Code::Plugin;
  using PrecisionOptions = typename detail::OptionsOf<Plugin>::type;

  /// What may be chosen at run time.
  struct Options {
    DevicesFlag devices{};  ///< A count, indices, -1 for all; by default all GPUs, or one process on a CPU.
    NumNodesFlag num_nodes{};
    typename Engine::Options strategy{};
    PrecisionOptions precision{};  ///< The plugin's own, such as F16Mixed's GradScalerOptions.
    std::vector<std::shared_ptr<Logger>> loggers{};
    std::vector<std::shared_ptr<Callback>> callbacks{};
  };

  /// Resolves the options against this machine and its variables. Throws fabric::Error that names every problem.
  Fabric() : Fabric(Options{}) {}
  explicit Fabric(Options options)
      : Fabric(Base::resolved(own_flags, options.devices, options.num_nodes), std::move(options)) {}

  /// Runs on what the connector selected; `options.devices` and `num_nodes` are the selection's. Throws fabric::Error
  /// if the selection is of other policies.
  explicit Fabric(const Selection& selection, Options options = {})
      : Base(selection, own, std::move(options.loggers), std::move(options.callbacks)),
        engine_(merged(options.strategy, selection)),
        precision_(std::move(options.precision)),
        scaler_(make_scaler(precision_)) {
    if constexpr (Plugin::has_scaler) scaler_->join(world_);
  }

  ~Fabric() { detail::leave_process_group(world_); }
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  /// Starts or joins the other processes. Code after it runs in all of them. Once per Fabric; strategies of one process
  /// need not call it. `DdpSpawn` and `DdpFork` start all ranks anew: then this process only waits for them, and ends
  /// as they do. Throws fabric::Error for variables that contradict the options.
  void launch() {
    require_first_launch();
    has_launched(engine_.launch(selection_, device_));
    if constexpr (Plugin::has_scaler) scaler_->join(world_);
  }
  /// `launch()`, then `function(*this, arguments...)` in all processes. Returns what that returns; where the processes
  /// are spawned or forked for it, rank 0's result, in this process, which is no rank: numbers, texts, tensors, and
  /// vectors, pairs, tuples and optionals of these. A spawned process runs the program up to here to get at its
  /// function. An exception that leaves the function ends the job on all ranks.
  template <class Function, class... Arguments>
  decltype(auto) launch(Function&& function, Arguments&&... arguments) {
    const auto run = [&]() -> decltype(auto) {
      launch();
      return std::invoke(std::forward<Function>(function), *this, std::forward<Arguments>(arguments)...);
    };
    if constexpr (requires { engine_.launch_options(); } && Strategy::facts.start_method != StartMethod::popen) {
      using Result = std::remove_cvref_t<std::invoke_result_t<Function, Fabric&, Arguments...>>;
      return detail::launch_function<Result>(selection_, engine_.launch_options(), [&]() -> Result {
        const std::shared_ptr<void> after(nullptr, [this](void*) { detail::leave_process_group(world_); });
        return run();
      });
    } else {
      return detail::telling_failures(run);
    }
  }

  /// Prepares modules and optimizers for this Fabric: modules move to the device and become equal on all ranks. Returns
  /// the wrapped objects in the order of the arguments: one, or a tuple of several:
  /// `auto [model, optimizer] = fabric.setup(Net(), optimizer)`. An optimizer comes with, or after, the modules whose
  /// parameters it has. Throws fabric::Error before launch().
  template <class... Arguments>
  [[nodiscard]] auto setup(Arguments&&... arguments) {
    static_assert(sizeof...(Arguments) > 0, "fabric: setup takes modules and optimizers");
    static_assert(
        ((ModuleArgument<Arguments> || OptimizerArgument<Arguments>)&&...),
        "fabric: setup takes modules (ModuleHolder, pointer or reference to a torch::nn::Module) and optimizers");
    require_launch("setup");
    // First all modules, since a DDP optimizer must know the modules behind its parameters wherever it stands.
    auto modules = std::tuple{setup_if_module(std::forward<Arguments>(arguments))...};
    auto all = finish_setup(modules, std::index_sequence_for<Arguments...>{}, std::forward<Arguments>(arguments)...);
    if constexpr (sizeof...(Arguments) == 1) {
      return std::get<0>(std::move(all));
    } else {
      return all;
    }
  }

  /// Deals the rows of a `torch::data` dataset to the ranks, reshuffles them each epoch if asked, and moves each batch
  /// to the device. A data set that streams its rows gets a StreamLoader, which says what it must bring along.
  template <class Dataset>
  [[nodiscard]] auto setup_dataloader(Dataset&& dataset, const LoaderOptions& options) {
    static_assert(
        requires {
          typename std::remove_cvref_t<Dataset>::BatchType;
          dataset.size();
        },
        "fabric: setup_dataloader takes a dataset, not a loader: a loader's sampler cannot be made to deal rows to "
        "ranks");
    require_launch("setup_dataloader");
    using Loader = typename LoaderFor<std::remove_cvref_t<Dataset>>::type;
    if constexpr (StreamsRows<std::remove_cvref_t<Dataset>>) {
      const bool ends = std::remove_cvref_t<Dataset>::is_stateful || dataset.size().has_value();
      agree_on_stream(ends, options);
      return Loader(std::forward<Dataset>(dataset), data_world(), options, device_);
    } else {
      agree_on_rows(dataset.size(), options);
      const World data = data_world();
      const Shares shares{.replicas = static_cast<std::size_t>(data.size),
                          .rank = static_cast<std::size_t>(data.global_rank),
                          .shuffle = options.shuffle,
                          .seed = options.seed,
                          .pad = options.pad};
      return Loader(std::forward<Dataset>(dataset), shares, options, device_);
    }
  }

  /// `loss.backward()`, with the gradients averaged over the ranks if the strategy does that, and of a scaled loss if
  /// the precision does that. `gradient` is for losses that are no single number. Throws fabric::Error for a tensor
  /// without a history: one that was detached, say, or computed under NoGradGuard.
  void backward(const at::Tensor& loss, const at::Tensor& gradient = {}, bool retain_graph = false) {
    if (!loss.requires_grad()) [[unlikely]]
      refuse_loss(loss);
    try {
      if constexpr (Plugin::has_scaler) {
        scaler_->scale(loss).backward(gradient, retain_graph);
      } else {
        loss.backward(gradient, retain_graph);
      }
    } catch (...) {
      if constexpr (requires(ModuleState & state) { Engine::abandon_backward(state); }) {
        modules_.for_each([](ModuleState& state) { Engine::abandon_backward(state); });
      }
      detail::rethrow_naming_collective(world_);
    }
    modules_.for_each([](ModuleState& state) { Engine::after_backward(state); });
  }

  /// Clips the gradients of a module that `setup` returned, all together by their norm; returns the norm from before.
  /// Throws fabric::Error for a norm that is not finite, unless gradients overflowed and the scaler will skip the step.
  template <class M>
  at::Tensor clip_gradients(const FabricModule<M, Engine, Plugin>& model, const ClipNorm& clip) {
    finish_plain_backward();
    unscale();
    if constexpr (requires { Engine::clip_gradients({model.state()}, model.state()->masters(), clip); }) {
      return Engine::clip_gradients({model.state()}, model.state()->masters(), tolerant(clip));
    } else {
      return fabric::clip_gradients(model.module(), tolerant(clip));
    }
  }
  /// Clips each element of the gradients.
  template <class M>
  void clip_gradients(const FabricModule<M, Engine, Plugin>& model, const ClipValue& clip) {
    finish_plain_backward();
    unscale();
    if constexpr (requires { model.state()->masters(); }) {
      fabric::clip_gradients(model.state()->masters(), clip);
    } else {
      fabric::clip_gradients(model.module(), clip);
    }
  }
  /// Clips the gradients of an optimizer's parameters alone.
  template <class O, class Clip>
  auto clip_gradients(const FabricOptimizer<O, Engine, Plugin>& optimizer, const Clip& clip) {
    finish_plain_backward();
    if constexpr (Plugin::has_scaler) scaler_->unscale(*optimizer.scaling().gradients);
    if constexpr (requires { Engine::clip_gradients(optimizer.states(), optimizer.optimizer(), clip); }) {
      return Engine::clip_gradients(optimizer.states(), optimizer.optimizer(), tolerant(clip));
    } else {
      return fabric::clip_gradients(optimizer.optimizer(), tolerant(clip));
    }
  }

  /// What scales losses and gradients, for its factor and its state.
  [[nodiscard]] GradScaler& scaler() const requires Plugin::has_scaler { return *scaler_; }

  /// While the result lives, forward and backward of `model` keep gradients local, to accumulate over several batches
  /// without communication. `enabled` false changes nothing: `auto guard = fabric.no_backward_sync(model, i % 4 != 3)`.
  /// Both belong inside: under `Ddp`, as in PyTorch, a backward whose forward ran outside averages all the same.
  template <class M>
  [[nodiscard]] auto no_backward_sync(const FabricModule<M, Engine, Plugin>& model, bool enabled = true) {
    return engine_.no_backward_sync(*model.state(), enabled);
  }

  /// While the result lives, operators run as they do in a module's forward.
  [[nodiscard]] typename Plugin::ForwardContext autocast() const {
    return typename Plugin::ForwardContext(device_.type());
  }

  /// The module that `make()` returns, made in this precision's dtype and moved to the device.
  template <class Make>
  [[nodiscard]] auto init_module(Make&& make) const {
    [[maybe_unused]] const typename Plugin::InitContext context;
    return to_device(std::forward<Make>(make)());
  }
  /// The same, and with `{.empty = true}` without memory: `setup` does what `make()` remembers, so that a model can be
  /// built that is larger than memory where the strategy shards. Needs fabric/module/deferred_init.hpp; see
  /// `fabric::deferred_init` for what `make()` may do.
  template <class Make>
  [[nodiscard]] auto init_module(Make&& make, const InitOptions& options) const {
    static_assert(detail::has_deferred_init<Make>,
                  "fabric: init_module with options needs #include \"fabric/module/deferred_init.hpp\"");
    if (!options.empty) return init_module(std::forward<Make>(make));
    require_launch("init_module");
    [[maybe_unused]] const typename Plugin::InitContext context;
    return detail::DeferredInitialisation<Make>::run(std::forward<Make>(make));
  }

  /// While the result lives, modules that this thread makes are in this precision's dtype and, where the strategy
  /// shards, without memory until `setup`, as by `init_module` with `{.empty = true}`. For code that cannot be put into
  /// one function: `{ const auto scope = fabric.sharded_model(); net = Net(config); }`. Needs
  /// fabric/module/deferred_init.hpp. What cannot be remembered is thrown by `setup`.
  [[nodiscard]] auto sharded_model() const {
    static_assert(detail::has_deferred_init<Fabric>,
                  "fabric: sharded_model needs #include \"fabric/module/deferred_init.hpp\"");
    require_launch("sharded_model");
    return typename detail::DeferredInitialisation<Fabric>::template Scope<typename Plugin::InitContext>(
        /*defers=*/requires { Engine::moves_modules; });
  }

  /// Writes modules, optimizers, tensors, numbers and more into one file, which is there whole or not at all and which
  /// Python's `torch.load(path, weights_only=True)` reads. All ranks call it; rank 0 writes. `state` names what is
  /// saved: `fabric.save("last.pt", {{"model", model}, {"optimizer", optimizer}, {"epoch", epoch}})`, or it is a struct
  /// adapted with BOOST_HANA_ADAPT_STRUCT. `filter` leaves out keys; see fabric::Filter. `Io` is the format.
  ///
  /// Needs fabric/checkpoint.hpp. Throws fabric::Error on all ranks when one of them cannot do it or does not come
  /// within `patience`; what the file held before is then left as it is.
  template <class Io = TorchFile, class S = State>
  void save(const std::string& path, const S& state, const Filter& filter = {},
            std::chrono::milliseconds patience = detail::default_patience) const {
    static_assert(detail::has_checkpoints<Io>, "fabric: save and load need #include \"fabric/checkpoint.hpp\"");
    require_launch("save");
    detail::Checkpointing<Io>::save(*this, path, state, filter, patience);
  }
  /// Reads what `save` wrote, or Python's `torch.save` of a dict of state_dicts, into the objects that `state` names.
  /// Everything is checked first: if the file is damaged or does not fit, it throws fabric::Error that names the first
  /// wrong keys, and nothing is changed on any rank. With `strict` false, keys that only one side has are left out, and
  /// floats converted.
  template <class Io = TorchFile, class S = State>
  auto load(const std::string& path, S&& state, bool strict = true,
            std::chrono::milliseconds patience = detail::default_patience) const {
    static_assert(detail::has_checkpoints<Io>, "fabric: save and load need #include \"fabric/checkpoint.hpp\"");
    require_launch("load");
    return detail::Checkpointing<Io>::load(*this, path, state, strict, patience);
  }

 private:
  using ModuleState = typename Engine::ModuleState;
  struct NoScaler {};
  using Scaler = std::conditional_t<Plugin::has_scaler, std::shared_ptr<GradScaler>, NoScaler>;

  static constexpr Combination own = combination_v<Accelerator, Strategy, Precision, Environment>;
  static constexpr Flags own_flags = flags_for<Accelerator, Strategy, Precision, Environment>();

  /// The ranks among which data are divided: all, unless some work on the same.
  [[nodiscard]] World data_world() const {
    if constexpr (requires { engine_.data_world(world_); }) {
      return engine_.data_world(world_);
    } else {
      return world_;
    }
  }
  /// The program may have called `loss.backward()`: strategies that shard then have sums to finish.
  void finish_plain_backward() const {
    if constexpr (requires(ModuleState & state) { Engine::abandon_backward(state); }) {
      modules_.for_each([](ModuleState& state) { Engine::after_backward(state); });
    }
  }

  template <class T>
  auto setup_if_module(T&& argument) {
    if constexpr (ModuleArgument<T>) {
      auto module = detail::shared_module(std::forward<T>(argument));
      if constexpr (!requires { Engine::moves_modules; }) {
        place(*module);
      }
      if constexpr (requires { Plugin::convert_module(*module, precision_, world_); }) {
        Plugin::convert_module(*module, precision_, world_);
      } else {
        Plugin::convert_module(*module);
      }
      using M = typename decltype(module)::element_type;
      std::shared_ptr<ModuleState> state = modules_.know(*module);
      FabricModule<M, Engine, Plugin> wrapped(std::move(module), std::move(state), device_.type());
      if constexpr (requires { engine_.setup(*wrapped.state(), wrapped.module(), world_, StrategyPrecision()); }) {
        engine_.setup(*wrapped.state(), wrapped.module(), world_, strategy_precision_v<Strategy, Precision>);
      } else {
        engine_.setup(*wrapped.state(), wrapped.module(), world_);
      }
      return wrapped;
    } else {
      return 0;
    }
  }

  template <class Modules, std::size_t... i, class... Arguments>
  auto finish_setup(Modules& modules, std::index_sequence<i...> /*indices*/, Arguments&&... arguments) {
    return std::tuple{setup_if_optimizer(std::get<i>(modules), std::forward<Arguments>(arguments))...};
  }

  template <class Module, class T>
  auto setup_if_optimizer(Module& module, T&& argument) {
    if constexpr (ModuleArgument<T>) {
      return module;
    } else {
      auto optimizer = detail::shared_optimizer(std::forward<T>(argument));
      auto states = modules_.behind(*optimizer);
      if constexpr (requires { Engine::adopt(*optimizer, states); }) {
        Engine::adopt(*optimizer, states);
      } else if (!device_.is_cpu()) {
        optim::follow_parameters(*optimizer);
      }
      using O = typename decltype(optimizer)::element_type;
      detail::Scaling<Plugin> scaling;
      if constexpr (Plugin::has_scaler) {
        GradScaler::Waiting waiting;
        if constexpr (requires { Engine::local_gradients(states, *optimizer); }) {
          waiting = [states, watched = optimizer.get()] { return Engine::local_gradients(states, *watched); };
        }
        scaling = {scaler_, scaler_->watch(optimizer, std::move(waiting))};
      }
      return FabricOptimizer<O, Engine, Plugin>(std::move(optimizer), std::move(states), std::move(scaling));
    }
  }

  static Scaler make_scaler(const PrecisionOptions& options) {
    if constexpr (requires { Plugin::scaler_options(options); }) {
      return std::make_shared<GradScaler>(Plugin::scaler_options(options));
    } else if constexpr (Plugin::has_scaler) {
      return std::make_shared<GradScaler>(options);
    } else {
      return {};
    }
  }
  void unscale() {
    if constexpr (Plugin::has_scaler) scaler_->unscale();
  }
  /// A clipping that lets gradients be which overflowed.
  template <class Clip>
  Clip tolerant(Clip clip) const {
    if constexpr (Plugin::has_scaler && std::is_same_v<Clip, ClipNorm>) {
      clip.error_if_nonfinite = clip.error_if_nonfinite && !scaler_->found_inf();
    }
    return clip;
  }

  static typename Engine::Options merged(const typename Engine::Options& options, const Selection& selection) {
    if constexpr (requires { Engine::merged(options, selection.options); }) {
      return Engine::merged(options, selection.options);
    } else {
      return options;
    }
  }

  Engine engine_;
  [[no_unique_address]] PrecisionOptions precision_;
  [[no_unique_address]] Scaler scaler_;
  detail::KnownModules<ModuleState> modules_;
};

}  // namespace fabric
