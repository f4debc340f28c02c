// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/torch.h>

#include "fabric/comm/agreement.hpp"
#include "fabric/error.hpp"
#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/module/deferred_init.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/exchange.hpp"
#include "fabric/shard/flat_unit.hpp"
#include "fabric/shard/group_parameters.hpp"
#include "fabric/shard/offloaded_state.hpp"
#include "fabric/shard/options.hpp"
#include "fabric/shard/tensor_slice.hpp"
#include "fabric/shard/use_on_demand.hpp"

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
    std::vector<std::string> description;
    for (const auto& [name, parameter] : parameters_of(module)) description.push_back(describe(name, parameter));
    for (const auto& buffer : module.named_buffers()) description.push_back(describe(buffer.key(), buffer.value()));
    detail::require_agreement(world, "setup", description);
    for (const NamedParameters& group : detail::group_parameters(module, options.units)) {
      const at::ScalarType kept = group.front().second.scalar_type();
      detail::UnitOptions unit{.compute = layout.compute(kept),
                               .master = layout.master(kept),
                               .reduce = layout.reduce(kept),
                               .device = world.device,
                               .master_device = layout.master_device,
                               .own_device = layout.own_device,
                               .folder = layout.folder,
                               .frees_parameters = layout.frees_parameters,
                               .frees_buckets = layout.frees_buckets};
      units_.push_back(std::make_unique<detail::FlatUnit>(group, unit, *exchange_, static_cast<int>(units_.size())));
    }
    fill_units(module);
    for (at::Tensor& buffer : module.buffers()) {
      const at::NoGradGuard no_grad;
      buffer.set_data(buffer.to(world.device, layout.buffer(buffer.scalar_type())));
    }
    buffers_ = module.buffers();
    share(buffers_);
    for (const auto& unit : units_) begin(*unit);
    for (auto unit = units_.rbegin(); unit != units_.rend(); ++unit) {  // backward begins at the end
      if ((*unit)->trained()) order_.push_back(unit->get());
    }
    for (const auto& unit : units_) {
      for (const auto& slot : unit->slots()) {
        shards_.push_back(slot.shard);
        if (tensor_slice_of(slot.shard.parameter)) sliced_.insert(slot.shard.master.unsafeGetTensorImpl());
      }
    }
  }

  /// This rank's parts of all parameters, in the order of the units.
  [[nodiscard]] const std::vector<Shard>& shards() const { return shards_; }
  [[nodiscard]] const ShardGroups& groups() const { return exchange_->groups(); }

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
    if (std::exchange(backward_runs_, false)) finish_backward();
    release_all();
    backward_.begin();
  }

  /// Throws fabric::Error when the gradients are not the mean over the ranks.
  void before_step() {
    after_backward();  // of a loss that was not given to fabric.backward
    if (!unused_.empty()) {
      throw Error("fabric: these parameters took no part in the loss, so that their gradients cannot be averaged: " +
                  std::exchange(unused_, {}) +
                  ". Set the option find_unused_parameters, or leave them out by requires_grad_(false) before setup");
    }
    if (unaveraged_) {
      throw Error(
          "fabric: the gradients were not averaged over the ranks: the last backward ran under no_backward_sync. Step "
          "after a backward outside of it");
    }
    share_buffers();
  }
  /// The optimizer has changed the masters.
  void after_step() { changed(); }
  /// Somebody has changed the masters: what is made from them is made anew.
  void changed() {
    for (const auto& unit : units_) unit->begin_changed();
    for (const auto& unit : units_) unit->finish_changed();
    last_ = nullptr;
  }
  void after_zero_grad() {
    unaveraged_ = false;
    unused_.clear();
    for (const auto& unit : units_) {
      unit->drop_gradients();
      for (const auto& slot : unit->slots()) slot.shard.parameter.mutable_grad().reset();  // kept by no_backward_sync
    }
  }

  /// Calls `function()` with all parameters whole. It may change them, in the same way on all ranks.
  template <class Function>
  void with_full_parameters(Function&& function) {
    full_ = true;
    try {
      for (const auto& unit : units_) unit->gather();
      std::forward<Function>(function)();
      for (const auto& unit : units_) unit->take_whole();
    } catch (...) {
      full_ = false;
      release_all();
      throw;
    }
    full_ = false;
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
  /// The units, for tests and reports.
  [[nodiscard]] const std::vector<std::unique_ptr<detail::FlatUnit>>& units() const { return units_; }

  /// What optimizers keep for the unit of that number, if it is offloaded to files.
  [[nodiscard]] detail::OffloadedState& offloaded(std::size_t unit) {
    while (offloaded_.size() < units_.size()) {
      offloaded_.push_back(std::make_unique<detail::OffloadedState>(options_.nvme_path));
    }
    return *offloaded_[unit];
  }

  /// False inside no_backward_sync.
  bool sync_gradients = true;

 private:
  using Unit = detail::FlatUnit;

  /// In which order units are used, as it was seen the last time.
  class Order {
   public:
    void begin() {
      if (!seen_.empty()) known_ = std::exchange(seen_, {});
      seen_.clear();
    }
    /// Notes a use; returns the unit that came next the last time, or null.
    Unit* used(Unit& unit) {
      seen_.push_back(&unit);
      const bool as_known = seen_.size() < known_.size() && known_[seen_.size() - 1] == &unit;
      return as_known ? known_[seen_.size()] : nullptr;
    }

   private:
    std::vector<Unit*> known_;
    std::vector<Unit*> seen_;
  };

  /// "weight: Float [1, 2], trained".
  static std::string describe(const std::string& name, const at::Tensor& tensor) {
    std::ostringstream text;
    text << name << ": " << at::toString(tensor.scalar_type()) << ' ' << tensor.sizes()
         << (tensor.requires_grad() ? ", trained" : "");
    return text.str();
  }
  void share(const std::vector<at::Tensor>& tensors) const {
    const World& world = exchange_->groups().world;
    if (!world.group || tensors.empty()) return;
    constexpr std::size_t bytes_at_once = 250UL * 1024 * 1024;
    c10d::broadcast_coalesced(world.group, tensors, bytes_at_once);
  }
  /// Gives the units the module's values, as soon as all of one unit's are there: a module that was made without memory
  /// gets them one by one, so that no more than a unit or two are whole at a time.
  void fill_units(torch::nn::Module& module) {
    struct Place {
      Unit* unit;
      std::size_t slot;
    };
    std::unordered_map<const c10::TensorImpl*, Place> places;
    std::unordered_map<const Unit*, std::vector<at::Tensor>> values;
    const auto fill_if_complete = [&](Unit& unit) {
      const auto& own = values.at(&unit);
      if (!std::all_of(own.begin(), own.end(), [](const at::Tensor& value) { return value.defined(); })) return;
      unit.fill(own, [&](const at::Tensor& exact) { share({exact}); });
      values.erase(&unit);
    };
    for (const auto& unit : units_) {
      auto& own = values[unit.get()];
      for (const auto& slot : unit->slots()) {
        const at::Tensor& parameter = slot.shard.parameter;
        places.emplace(parameter.unsafeGetTensorImpl(), Place{unit.get(), own.size()});
        own.push_back(parameter.is_meta() ? at::Tensor() : parameter.detach());
      }
      fill_if_complete(*unit);
    }
    const Materialise options{.device = exchange_->groups().world.device};
    materialise(module, options, [&](const std::string& /*name*/, const at::Tensor& slot, const at::Tensor& real) {
      const auto place = places.find(slot.unsafeGetTensorImpl());
      if (place == places.end()) return detail::become(slot, real);  // a buffer
      values.at(place->second.unit)[place->second.slot] = real;
      fill_if_complete(*place->second.unit);
    });
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
  }
  void release_all() {
    in_forward_ = false;
    last_ = nullptr;
    if (full_) return;
    for (const auto& unit : units_) unit->release();
  }
  /// `module.to(...)` after setup would have replaced what is sharded.
  void require_own_parameters() const {
    for (const auto& unit : units_) {
      for (const auto& slot : unit->slots()) {
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

  // ---- Gradients ----

  void arrived(Unit& unit, std::size_t i) {
    if (!sync_gradients) {
      unaveraged_ = true;
      return;
    }
    const std::lock_guard lock(mutex_);
    unaveraged_ = false;
    backward_runs_ = true;
    unit.slots()[i].arrived = true;
    const auto& slots = unit.slots();
    if (!std::all_of(slots.begin(), slots.end(), [](const auto& slot) { return slot.arrived; })) return;
    if (std::find(complete_.begin(), complete_.end(), &unit) != complete_.end()) return;
    complete_.push_back(&unit);
    while (next_ < order_.size() && std::find(complete_.begin(), complete_.end(), order_[next_]) != complete_.end()) {
      reduce(*order_[next_++]);
    }
  }
  /// Begins to sum a unit's gradients, and gives its parameters back, which backward no longer needs.
  void reduce(Unit& unit) {
    constexpr std::size_t at_once = 2;
    if (leaving_.size() >= at_once) finish_oldest();
    unit.begin_reduce();
    leaving_.push_back(&unit);
    if (&unit == last_) last_ = nullptr;
    if (!full_) unit.release();
  }
  void finish_oldest() {
    Unit& unit = *leaving_.front();
    leaving_.erase(leaving_.begin());
    unit.finish_reduce([&](std::size_t i) { return is_used(unit, i); });
  }
  [[nodiscard]] bool is_used(const Unit& unit, std::size_t i) const {
    return !options_.find_unused_parameters || used_.empty() || used_.at(&unit)[i];
  }

  void finish_backward() {
    std::string missing;
    for (Unit* unit : order_) {
      for (const auto& slot : unit->slots()) {
        if (!slot.arrived && slot.shard.parameter.requires_grad()) {
          missing += (missing.empty() ? "" : ", ") + slot.shard.name;
        }
      }
    }
    if (options_.find_unused_parameters) find_used();
    if (!options_.find_unused_parameters) unused_ = missing;
    while (next_ < order_.size()) reduce(*order_[next_++]);
    while (!leaving_.empty()) finish_oldest();
    // What came late, from a second backward through the same graph.
    for (Unit* unit : order_) {
      for (auto& slot : unit->slots()) slot.arrived = false;
    }
    next_ = 0;
    agree_on_order();
    complete_.clear();
    used_.clear();
  }
  /// From the second backward on, gradients are sent in the order in which they came in the first, on rank 0.
  void agree_on_order() {
    if (std::exchange(order_is_known_, true)) return;
    for (Unit* unit : order_) {
      if (std::find(complete_.begin(), complete_.end(), unit) == complete_.end()) complete_.push_back(unit);
    }
    std::vector<std::int64_t> numbers;
    for (const Unit* unit : complete_) numbers.push_back(unit->number());
    at::Tensor agreed = torch::tensor(numbers, at::kLong).to(exchange_->groups().world.device);
    share({agreed});
    agreed = agreed.cpu();
    order_.clear();
    for (std::int64_t i = 0; i < agreed.numel(); ++i) {
      order_.push_back(units_[static_cast<std::size_t>(agreed[i].item<std::int64_t>())].get());
    }
  }
  /// Which parameters had a part in the loss on any rank.
  void find_used() {
    std::vector<std::int64_t> marks;
    for (const Unit* unit : order_) {
      for (const auto& slot : unit->slots()) marks.push_back(slot.arrived ? 1 : 0);
    }
    const World& world = exchange_->groups().world;
    at::Tensor all = torch::tensor(marks, at::kLong).to(world.device);
    all = all_reduce(world, std::move(all), ReduceOp::max).cpu();
    std::int64_t at = 0;
    for (const Unit* unit : order_) {
      auto& used = used_[unit];
      for (std::size_t i = 0; i < unit->slots().size(); ++i) used.push_back(all[at++].item<std::int64_t>() != 0);
    }
  }

  ShardingOptions options_;
  std::unique_ptr<detail::Exchange> exchange_;  // which units refer to
  std::vector<std::unique_ptr<Unit>> units_;
  std::vector<std::unique_ptr<detail::OffloadedState>> offloaded_;
  std::vector<Shard> shards_;
  std::unordered_set<const c10::TensorImpl*> sliced_;  // of the masters
  std::vector<at::Tensor> buffers_;
  bool buffers_differ_ = false;

  std::recursive_mutex mutex_;  // backward may run on other threads
  bool in_forward_ = false;
  bool full_ = false;
  Unit* last_ = nullptr;       // whole, and the last that was used
  std::vector<Unit*> recent_;  // the last used at the end
  Order forward_;
  Order backward_;

  using Accumulator = decltype(torch::autograd::impl::grad_accumulator(at::Tensor()));
  std::vector<Accumulator> accumulators_;
  std::shared_ptr<char> alive_ = std::make_shared<char>();  // hooks may outlive this
  std::vector<Unit*> order_;                                // in which gradients are sent, the same on all ranks
  std::size_t next_ = 0;                                    // in order_
  std::vector<Unit*> complete_;                             // whose gradients have all come, in this order
  std::vector<Unit*> leaving_;                              // on their way
  std::unordered_map<const Unit*, std::vector<bool>> used_;
  bool order_is_known_ = false;
  bool backward_runs_ = false;
  bool unaveraged_ = false;
  std::string unused_;
};

}  // namespace fabric
