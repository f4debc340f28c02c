// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/comm/agreement.hpp"
#include "fabric/error.hpp"
#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/exchange.hpp"
#include "fabric/shard/fill_units.hpp"
#include "fabric/shard/flat_unit.hpp"
#include "fabric/shard/gradient_reduction.hpp"
#include "fabric/shard/group_parameters.hpp"
#include "fabric/shard/offloaded_state.hpp"
#include "fabric/shard/options.hpp"
#include "fabric/shard/tensor_slice.hpp"
#include "fabric/shard/unit_order.hpp"
#include "fabric/shard/use_on_demand.hpp"
#include "fabric/side_stream.hpp"

namespace fabric {

/// What a strategy that shards keeps for a module: its parameters in units, which are made whole when they are used,
/// and whose gradients are summed over the ranks while backward still runs
/// (Rajbhandari et al., "ZeRO", SC 2020; Zhao et al., "PyTorch FSDP", VLDB 2023).
class ShardedModule : private detail::UnitOwner {
 public:
  /// How the strategy and the precision have the module kept; dtypes are those of its floating-point tensors.
  struct Layout {
    bool frees_parameters = true;
    bool frees_buckets = true;
    std::function<at::ScalarType(at::ScalarType)> compute{};  ///< From the dtype that a parameter has.
    std::function<at::ScalarType(at::ScalarType)> master{};
    std::function<at::ScalarType(at::ScalarType)> reduce{};
    std::function<at::ScalarType(at::ScalarType)> buffer{};
    at::Device master_device = at::kCPU;
    at::Device own_device = at::kCPU;
    std::string folder{};  ///< Where masters, and the parts that are gathered, are files; empty: in memory.
  };

  /// How much memory this rank holds for the module, in bytes.
  struct Memory {
    std::int64_t parameters = 0;  ///< Whole ones, and the parts from which they are gathered.
    std::int64_t masters = 0;     ///< What optimizers change, where that is not the same memory.
    std::int64_t gradients = 0;
  };

  /// Holds nothing before `setup`.
  ShardedModule() = default;
  ~ShardedModule() override {
    for (const auto& unit : units_) {
      if (unit->frees_parameters()) detail::UseOnDemand::instance().remove(*unit);
    }
  }

  /// Makes the ranks' parameters and buffers those of global rank 0, divides the parameters, and hooks into backward.
  /// Throws fabric::Error, on all ranks, when their modules differ.
  void setup(torch::nn::Module& module, ShardGroups groups, const ShardingOptions& options, const Layout& layout) {
    options_ = options;
    exchange_ = std::make_unique<detail::Exchange>(std::move(groups));
    const World& world = exchange_->groups().world;
    detail::refuse_foreign_slices(module, exchange_->groups().tensor);
    std::vector<std::string> description;
    for (const auto& [name, parameter] : parameters_of(module))
      description.push_back(detail::described(name, parameter));
    for (const auto& buffer : module.named_buffers()) {
      description.push_back(detail::described(buffer.key(), buffer.value()));
    }
    detail::require_agreement(world, "setup", description);
    const auto from_host = [&](at::Device device) { return world.device.is_cuda() && device.is_cpu(); };
    if (from_host(layout.master_device) || from_host(layout.own_device)) copies_.emplace(world.device);
    for (const NamedParameters& group : detail::group_parameters(module, options.units)) {
      const at::ScalarType kept = group.front().second.scalar_type();
      detail::UnitOptions unit{.compute = layout.compute(kept),
                               .master = layout.master(kept),
                               .reduce = layout.reduce(kept),
                               .device = world.device,
                               .master_device = layout.master_device,
                               .own_device = layout.own_device,
                               .folder = layout.folder,
                               .past_cache = options.nvme_direct,
                               .copies = copies_ ? &*copies_ : nullptr,
                               .frees_parameters = layout.frees_parameters,
                               .frees_buckets = layout.frees_buckets};
      // By the number, messages find each other: all modules of the process have their own.
      static int made = 0;
      units_.push_back(std::make_unique<detail::FlatUnit>(group, unit, *exchange_, pool_, made++));
    }
    detail::fill_units(module, units_, world);
    for (at::Tensor& buffer : module.buffers()) {
      const at::NoGradGuard no_grad;
      const at::ScalarType kept = buffer.scalar_type();
      if (kept != layout.buffer(kept)) converted_buffers_.emplace_back(buffer, kept);
      buffer.set_data(buffer.to(world.device, layout.buffer(kept)));
    }
    // With versions of their own: a forward may have saved one that the next forward shares again.
    for (const at::Tensor& buffer : module.buffers()) buffers_.push_back(buffer.variable_data());
    share(buffers_);
    std::vector<Unit*> trained;
    for (auto unit = units_.rbegin(); unit != units_.rend(); ++unit) {  // backward begins at the end
      if ((*unit)->trained()) trained.push_back(unit->get());
    }
    reduction_.emplace(std::move(trained), world, options_.find_unused_parameters, [this](Unit& unit) {
      if (&unit == last_) last_ = nullptr;
      if (!full_) unit.release();
    });
    for (const auto& unit : units_) begin(*unit);
    for (const auto& unit : units_) {
      for (const auto& slot : unit->slots()) {
        shards_.push_back(slot.shard);
        if (tensor_slice_of(slot.shard.parameter)) sliced_.insert(slot.shard.master.unsafeGetTensorImpl());
      }
    }
  }

  /// This rank's parts of all parameters, in the order of the units.
  [[nodiscard]] const std::vector<Shard>& shards() const { return shards_; }
  /// With whom they are divided.
  [[nodiscard]] const ShardGroups& groups() const { return exchange_->groups(); }

  /// The buffers that the precision has brought to another dtype, with the one that the module was made with, in which
  /// checkpoints have them.
  [[nodiscard]] const std::vector<std::pair<at::Tensor, at::ScalarType>>& converted_buffers() const {
    return converted_buffers_;
  }
  /// The masters with their names: what is clipped, and what optimizers have.
  [[nodiscard]] NamedParameters masters() const {
    NamedParameters named;
    for (const Shard& shard : shards_) named.emplace_back(shard.name, shard.master);
    return named;
  }
  /// The master of one of the module's parameters; undefined for other tensors.
  [[nodiscard]] at::Tensor master_of(const at::Tensor& parameter) const {
    for (const Shard& shard : shards_) {
      if (shard.parameter.is_same(parameter)) return shard.master;
    }
    return {};
  }

  /// Runs the module by `run()`. An exception leaves no unit whole.
  template <class Run>
  auto forward(Run&& run) {
    std::optional<ActivationCheckpointingGuard> recomputed;
    if (options_.activation_checkpointing) recomputed.emplace(*options_.activation_checkpointing);
    begin_forward();
    try {
      auto output = std::forward<Run>(run)();
      end_forward();
      return output;
    } catch (...) {
      release_all();
      throw;
    }
  }

  /// The backward is over: sums what has not been summed yet.
  void after_backward() {
    if (reduction_->finish()) wait_for_copies();  // the host is about to read the gradients
    release_all();
    backward_.begin();
  }
  /// The backward has failed: its gradients are dropped, and no unit stays whole.
  void abandon_backward() {
    reduction_->abandon();
    release_all();
    backward_.begin();
  }

  /// Throws fabric::Error when the gradients are not the mean over the ranks.
  void before_step() {
    after_backward();  // of a loss that was not given to fabric.backward
    reduction_->require_averaged();
    wait_for_copies();
    share_buffers();
  }
  /// The optimizer has changed the masters.
  void after_step() {
    stepped_ = true;
    changed(/*frozen=*/false);
  }
  /// Was there a step since setup?
  [[nodiscard]] bool has_stepped() const { return stepped_; }
  /// Somebody has changed the masters, of frozen parameters too: what is made from them is made anew.
  void changed(bool frozen = true) {
    wait_for_copies();
    for (const auto& unit : units_) {
      if (frozen || unit->trained()) unit->begin_changed();
    }
    for (const auto& unit : units_) {
      if (frozen || unit->trained()) unit->finish_changed();
    }
    wait_for_copies();
    last_ = nullptr;
  }
  /// An optimizer has dropped its gradients: what `no_backward_sync` kept of them goes, too.
  void after_zero_grad(const torch::optim::Optimizer& optimizer) {
    for (const auto& unit : units_) unit->drop_gradients();
    for_each_local_gradient(optimizer, [](at::Tensor& gradient) { gradient.reset(); });
    bool some_are_left = false;  // of other optimizers
    for (const Shard& shard : shards_) some_are_left = some_are_left || shard.parameter.grad().defined();
    reduction_->after_zero_grad(some_are_left);
  }
  /// Calls `visit(gradient)` with each gradient that `no_backward_sync` keeps on this rank for what the optimizer has.
  template <class Visit>
  void for_each_local_gradient(const torch::optim::Optimizer& optimizer, Visit&& visit) const {
    const ParameterSet theirs = parameter_set(optimizer);
    for (const Shard& shard : shards_) {
      at::Tensor& gradient = shard.parameter.mutable_grad();
      if (gradient.defined() && theirs.contains(shard.master.unsafeGetTensorImpl())) visit(gradient);
    }
  }

  /// Calls `function()` with all parameters whole. It may change them, in the same way on all ranks.
  template <class Function>
  void with_full_parameters(Function&& function) {
    const bool before = std::exchange(full_, true);  // it may be called within itself
    try {
      for (const auto& unit : units_) unit->gather();
      std::forward<Function>(function)();
      wait_for_copies();
      for (const auto& unit : units_) unit->take_whole();
    } catch (...) {
      full_ = before;
      release_all();
      throw;
    }
    full_ = before;
    release_all();
  }

  /// Is this master one of a slice, which other ranks of the tensor group do not have?
  [[nodiscard]] bool is_sliced(const at::Tensor& master) const {
    return sliced_.contains(master.unsafeGetTensorImpl());
  }

  [[nodiscard]] Memory memory() const {
    Memory memory;
    for (const auto& unit : units_) {
      memory.parameters += unit->held_parameters();
      memory.masters += unit->held_masters();
      memory.gradients += unit->held_gradients();
    }
    return memory;
  }
  /// The units themselves.
  [[nodiscard]] const std::vector<std::unique_ptr<detail::FlatUnit>>& units() const { return units_; }

  /// What optimizers keep for the unit of that number, if it is offloaded to files.
  [[nodiscard]] detail::OffloadedState& offloaded(std::size_t unit) {
    while (offloaded_.size() < units_.size()) {
      offloaded_.push_back(std::make_unique<detail::OffloadedState>(options_.nvme_path, options_.nvme_direct));
    }
    return *offloaded_[unit];
  }

  /// False inside no_backward_sync.
  bool sync_gradients = true;

 private:
  using Unit = detail::FlatUnit;

  void share(const std::vector<at::Tensor>& tensors) const {
    detail::broadcast_in_place(exchange_->groups().world.group, tensors);
  }
  /// Gives all ranks rank 0's buffers, if a forward may have changed them since.
  void share_buffers() {
    if (options_.broadcast_buffers && std::exchange(buffers_differ_, false)) share(buffers_);
  }

  void begin(Unit& unit) {
    if (unit.frees_parameters()) detail::UseOnDemand::instance().add(unit, *this);
    if (!unit.trained()) return;
    for (std::size_t i = 0; i < unit.slots().size(); ++i) {
      auto accumulator = torch::autograd::impl::grad_accumulator(unit.slots()[i].shard.parameter);
      accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
          [this, &unit, i, alive = std::weak_ptr<char>(alive_)](const torch::autograd::variable_list& outputs,
                                                                const torch::autograd::variable_list& /*inputs*/) {
            if (!alive.expired()) arrived(unit, i);
            return outputs;
          }));
      accumulators_.push_back(std::move(accumulator));  // which lives only as long as somebody holds it
    }
  }

  // ---- Parameters ----

  void begin_forward() {
    const bool trains = at::GradMode::is_enabled();
    if (trains && sync_gradients) share_buffers();
    if (trains) buffers_differ_ = !buffers_.empty();
    require_own_parameters();
    forward_.begin();
    in_forward_ = true;
    last_ = nullptr;
  }
  void end_forward() {
    in_forward_ = false;
    last_ = nullptr;
    if (!options_.reshard_after_forward && at::GradMode::is_enabled()) return;
    release_all();
    if (!at::GradMode::is_enabled()) wait_for_copies();  // what may change next is not what backward needs
  }
  /// The host's memory is about to change, which a device may still read.
  void wait_for_copies() const {
    if (copies_) copies_->synchronize();
  }
  void release_all() {
    in_forward_ = false;
    last_ = nullptr;
    if (full_) return;
    for (const auto& unit : units_) unit->release();
  }
  /// `module.to(...)` after setup would have replaced what is sharded, and the next step would undo changes in place.
  void require_own_parameters() const {
    for (const auto& unit : units_) {
      if (const Shard* shard = unit->changed_in_place()) {
        throw Error("fabric: the parameter " + shard->name +
                    " was changed in place since setup, which the next step would undo on all ranks: change it within "
                    "model.state()->with_full_parameters([&] { ... })");
      }
      for (const auto& slot : unit->slots()) {
        if (!unit->trained() && slot.shard.parameter.requires_grad()) {
          throw Error("fabric: the parameter " + slot.shard.name +
                      " was frozen at setup and is not any more: set the module up when it is to be trained, or freeze "
                      "it after setup");
        }
        if (slot.shard.parameter.storage().unsafeGetStorageImpl() == unit->storage()) continue;
        throw Error(
            "fabric: the parameter " + slot.shard.name +
            " is no longer the one that setup has sharded: it was moved or converted (module.to) since. Do that "
            "before setup");
      }
    }
  }

  void use(const std::vector<Unit*>& units) override {
    if (units.size() == 1 && units.front() == last_) return;  // mostly
    const std::lock_guard lock(mutex_);
    Unit* next = nullptr;
    for (Unit* unit : units) {
      if (unit == last_ && unit->state() == Unit::State::whole) continue;
      next = (in_forward_ ? forward_ : backward_).used(*unit);
      touch(*unit);
      make_room(units);
      unit->gather();
      last_ = unit;
    }
    if (units.size() > 1) last_ = nullptr;
    if (!options_.prefetch || next == nullptr || next->state() != Unit::State::released) return;
    std::vector<Unit*> needed = units;
    needed.push_back(next);
    if (options_.reshard_after_forward && needed.size() > static_cast<std::size_t>(options_.units_in_flight)) return;
    touch(*next);
    make_room(needed);
    next->begin_gather();
  }
  [[nodiscard]] bool refuses_changes() const override { return !full_; }

  void touch(Unit& unit) {
    std::erase(recent_, &unit);
    recent_.push_back(&unit);
  }
  /// Gives back the units that were used longest ago, until there is room for `needed` and no more than may be whole.
  void make_room(const std::vector<Unit*>& needed) {
    if (full_ || !options_.reshard_after_forward) return;
    const auto held = [](const Unit* unit) { return unit->state() != Unit::State::released; };
    auto count = std::count_if(recent_.begin(), recent_.end(), held);
    count += std::count_if(needed.begin(), needed.end(), [&](const Unit* unit) { return !held(unit); });
    for (Unit* unit : std::vector<Unit*>(recent_)) {
      if (count <= options_.units_in_flight) return;
      if (!held(unit) || std::find(needed.begin(), needed.end(), unit) != needed.end()) continue;
      unit->release();
      --count;
    }
  }

  void arrived(Unit& unit, std::size_t i) {
    const std::lock_guard lock(mutex_);
    sync_gradients ? reduction_->arrived(unit, i) : reduction_->arrived_locally(unit, i);
  }

  ShardingOptions options_;
  std::unique_ptr<detail::Exchange> exchange_;  // which units refer to
  detail::BufferPool pool_;                     // likewise
  std::optional<detail::SideStream> copies_;    // likewise
  std::vector<std::unique_ptr<Unit>> units_;
  std::vector<std::unique_ptr<detail::OffloadedState>> offloaded_;
  std::vector<Shard> shards_;
  ParameterSet sliced_;  // of the masters
  std::vector<at::Tensor> buffers_;
  std::vector<std::pair<at::Tensor, at::ScalarType>> converted_buffers_;
  bool buffers_differ_ = false;
  bool stepped_ = false;

  std::recursive_mutex mutex_;  // backward may run on other threads
  bool in_forward_ = false;
  bool full_ = false;
  Unit* last_ = nullptr;       // whole, and the last that was used
  std::vector<Unit*> recent_;  // the last used at the end
  detail::UnitOrder forward_;
  detail::UnitOrder backward_;

  using Accumulator = decltype(torch::autograd::impl::grad_accumulator(at::Tensor()));
  std::vector<Accumulator> accumulators_;
  std::shared_ptr<char> alive_ = std::make_shared<char>();  // hooks may outlive this
  std::optional<detail::GradientReduction> reduction_;
};

}  // namespace fabric
