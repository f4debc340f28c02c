// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"
#include "fabric/optim/bucket.hpp"
#include "fabric/optim/options.hpp"
#include "fabric/optim/saved_state.hpp"
#include "fabric/optim/step_scale.hpp"

namespace fabric::optim {

/// A `torch::optim::Optimizer` whose step is one call of a fused kernel for all parameters of a group that share device
/// and dtype. `Method` says which kernel, with what options and state; `detail::AdamMethod` is an example.
///
/// Takes LibTorch's own options, so that schedulers and code that sets `lr` in a group work; a group with `Maximize`
/// options climbs. State follows its parameter to another device or dtype.
template <class Method>
class FusedOptimizer : public torch::optim::Optimizer, public Stateful {
 public:
  using Options = typename Method::Options;

  /// Options that a group does not have are `defaults`. Throws fabric::Error for options out of range, for parameters
  /// that fused kernels cannot change (sparse, complex, with gaps in memory), and for one that comes twice.
  explicit FusedOptimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                          const Options& defaults = Options(Method::default_lr))
      : Optimizer(std::vector<torch::optim::OptimizerParamGroup>(), clone(defaults)) {
    check(defaults, "the defaults", {});
    for (const auto& group : groups) add_param_group(group);
  }
  explicit FusedOptimizer(std::vector<at::Tensor> parameters, const Options& defaults = Options(Method::default_lr))
      : FusedOptimizer(std::vector{torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults) {}

  /// Adds parameters with options of their own. Throws like the constructor, and then has added nothing.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
    const std::size_t first = count_before(param_groups().size());
    for (std::size_t i = 0; i < group.params().size(); ++i) {
      const std::string name = detail::parameter_name(first + i);
      detail::require_fusable(group.params()[i], name);
      for (std::size_t j = 0; j < i; ++j) refuse_if_same(group.params()[i], group.params()[j], name);
      for (const auto& own : param_groups()) {
        for (const at::Tensor& parameter : own.params()) refuse_if_same(group.params()[i], parameter, name);
      }
    }
    if (group.has_options()) check(options_of(group), "the group's options", {});
    const bool says_so = group.has_options() && is_maximize(group.options());
    const bool maximize = maximizes(says_so ? group.options() : *defaults_);
    Optimizer::add_param_group(group);
    auto& added = param_groups().back();  // whose options LibTorch 2.15 has made from the defaults
    if (maximize != maximizes(added.options())) {
      added.set_options(std::make_unique<Maximize<Options>>(options_of(added), maximize));
    }
    if constexpr (Method::state_from_the_start) {
      const at::NoGradGuard no_grad;
      for (const at::Tensor& parameter : added.params()) state_of(parameter, options_of(added));
    }
  }

  /// Changes the parameters that have a gradient. With a closure, calls that first (it clears the gradients, computes
  /// the loss and runs backward) and returns its loss.
  at::Tensor step(LossClosure closure = nullptr) override {
    at::Tensor loss;
    if (closure) {
      const at::AutoGradMode with_gradients(true);
      loss = closure();
    }
    update({});
    return loss;
  }
  /// A step on gradients that are still multiplied by `scale.grad_scale`, which is skipped where `scale.found_inf` is
  /// 1: then no parameter, state or count of steps changes.
  void step(const StepScale& scale) { update(scale); }

  /// The state in the layout of Python's `state_dict()`: what its `fused=True` optimizer of the same name loads. The
  /// tensors are the optimizer's own, not copies.
  [[nodiscard]] Value state_dict() const override {
    Dict state;
    List groups;
    std::int64_t index = 0;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      const auto& group = param_groups()[i];
      List indices;
      for (const at::Tensor& parameter : group.params()) {
        if (const ParamState* own = find_state(parameter)) {
          state[index] = detail::saved_tensors(*own, Method::state_names);
        }
        indices.items.emplace_back(index++);
      }
      Dict saved = detail::saved_options<Method>(options_of(group), maximizes(group.options()));
      if (i < more_.size()) {
        for (const auto& [key, value] : more_[i]) saved[key] = value;
      }
      saved["params"] = std::move(indices);
      groups.items.emplace_back(std::move(saved));
    }
    return Dict{{"state", std::move(state)}, {"param_groups", std::move(groups)}};
  }

  /// Takes over options and state that `state_dict()`, or an optimizer of this name in Python, fused or not, has saved.
  /// Tensors are copied to the parameters' devices and dtypes. Keys of a group that only Python knows (`initial_lr`)
  /// are kept for the next `state_dict()`. Throws fabric::Error that names everything that does not fit, and then has
  /// changed nothing.
  void load_state_dict(const Value& value) override {
    const at::NoGradGuard no_grad;
    detail::Problems problems(Method::name);
    const Dict* root = problems.dict(value, "the state");
    const List* groups = root ? problems.list(*root, "param_groups") : nullptr;
    const Dict* state = root ? problems.dict(*root, "state") : nullptr;
    if (groups && groups->items.size() != param_groups().size()) {
      problems.add(std::to_string(groups->items.size()) + " parameter groups, where this optimizer has " +
                   std::to_string(param_groups().size()));
    }
    problems.throw_if_any();

    std::vector<detail::SavedGroup<Options>> loaded;
    std::vector<std::pair<void*, std::unique_ptr<ParamState>>> states;
    std::vector<Dict::Key> known;
    std::size_t place = 0;
    for (std::size_t i = 0; i < groups->items.size(); ++i) {
      const auto& group = param_groups()[i];
      auto& saved = loaded.emplace_back(
          detail::read_group<Method>(groups->items[i], i, options_of(group), group.params().size(), problems));
      for (std::size_t k = 0; k < group.params().size(); ++k, ++place) {
        if (k >= saved.params.size()) continue;
        known.emplace_back(saved.params[k]);
        const Value* tensors = state->find(known.back());
        if (tensors == nullptr) continue;
        auto own = detail::read_state<Method>(*tensors, group.params()[k], detail::parameter_name(place),
                                              Method::states(saved.options), problems);
        if (own) states.emplace_back(group.params()[k].unsafeGetTensorImpl(), std::move(own));
      }
    }
    problems.add_strangers(*state, known);
    problems.throw_if_any();

    state_.clear();
    for (auto& [key, own] : states) state_[key] = std::move(own);
    more_.resize(loaded.size());
    for (std::size_t i = 0; i < loaded.size(); ++i) {
      auto& group = param_groups()[i];
      if (loaded[i].maximize || is_maximize(group.options())) {
        group.set_options(std::make_unique<Maximize<Options>>(loaded[i].options, loaded[i].maximize));
      } else {
        options_of(group) = loaded[i].options;
      }
      more_[i] = std::move(loaded[i].more);
    }
    plans_.clear();
  }

  /// Refused with fabric::Error: LibTorch's archives have no place for this state.
  void save(torch::serialize::OutputArchive& /*archive*/) const override { refuse_archive("saved to"); }
  void load(torch::serialize::InputArchive& /*archive*/) override { refuse_archive("loaded from"); }

 private:
  /// How a group's parameters fall into buckets, as long as it looks as it did when this was made.
  struct Plan {
    struct Entry {
      const c10::TensorImpl* parameter;
      const ParamState* state;  // null without one
      bool has_gradient;
      std::size_t bucket;
    };
    std::vector<Entry> entries;
    std::size_t states = 0;
    std::vector<detail::Bucket> buckets;
  };

  void update(const StepScale& scale) {
    const at::NoGradGuard no_grad;
    auto& groups = param_groups();
    plans_.resize(groups.size());
    // First all that may throw, so that a step is whole or has not begun.
    for (std::size_t i = 0; i < groups.size(); ++i) {
      if (gather(plans_[i], groups[i])) continue;
      // The momentum of SGD's first step is that step's gradient: a skipped step must not leave one.
      if (Method::has_first_step && scale.found_inf.defined() && scale.found_inf.template item<float>() != 0) return;
      plans_[i] = make_plan(groups[i], i);
      gather(plans_[i], groups[i]);
    }
    for (std::size_t i = 0; i < groups.size(); ++i) {
      const Options& options = options_of(groups[i]);
      const bool maximize = maximizes(groups[i].options());
      for (detail::Bucket& bucket : plans_[i].buckets) {
        const StepScale here = bucket.here(scale);
        bucket.count(1);
        const auto update_by_kernel = [&](const detail::Bucket& those) {
          Method::update(those, options, maximize, here);
        };
        if (!Method::right_in_16_bits && bucket.device.is_cpu() && at::isReducedFloatingType(bucket.dtype)) {
          detail::in_32_bits(bucket, update_by_kernel);
        } else {
          update_by_kernel(bucket);
        }
        if (here.found_inf.defined()) bucket.count_back(here.found_inf);
        bucket.gradients.clear();
        bucket.first_step = false;
      }
    }
  }

  /// Puts the gradients into the plan's buckets; false, with the buckets empty, if the group has changed since.
  bool gather(Plan& plan, const torch::optim::OptimizerParamGroup& group) const {
    const auto& parameters = group.params();
    for (detail::Bucket& bucket : plan.buckets) bucket.gradients.clear();
    if (plan.entries.size() != parameters.size() || plan.states != Method::states(options_of(group))) return false;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const at::Tensor& parameter = parameters[i];
      const auto& entry = plan.entries[i];
      const bool has_gradient = parameter.mutable_grad().defined();
      if (parameter.unsafeGetTensorImpl() != entry.parameter || has_gradient != entry.has_gradient) return false;
      if (!has_gradient) continue;
      detail::Bucket& bucket = plan.buckets[entry.bucket];
      if (parameter.scalar_type() != bucket.dtype || parameter.device() != bucket.device) return false;
      const ParamState* own = find_state(parameter);
      if (own != entry.state || !holds(bucket, bucket.gradients.size(), plan.states, own)) return false;
      bucket.gradients.push_back(detail::aligned_gradient(parameter));
    }
    return true;
  }

  /// Are the bucket's tensors at `place` still those of that state? Whoever offloads may have replaced some.
  static bool holds(const detail::Bucket& bucket, std::size_t place, std::size_t states, const ParamState* own) {
    if (own == nullptr) return true;
    if constexpr (Method::counts_steps) {
      if (!bucket.steps[place].is_same(own->step)) return false;
    }
    for (std::size_t k = 0; k < states; ++k) {
      if (!bucket.states[k][place].is_same(own->tensors[k])) return false;
    }
    return true;
  }

  Plan make_plan(const torch::optim::OptimizerParamGroup& group, std::size_t group_index) {
    const Options& options = options_of(group);
    Plan plan;
    plan.states = Method::states(options);
    std::size_t place = count_before(group_index);
    for (const at::Tensor& parameter : group.params()) {
      auto& entry = plan.entries.emplace_back();
      entry = {parameter.unsafeGetTensorImpl(), nullptr, parameter.mutable_grad().defined(), 0};
      const std::string name = detail::parameter_name(place++);
      if (!entry.has_gradient) continue;
      detail::require_fusable(parameter, name);  // once more: it may have been converted, or added by the base class
      const bool first_step = Method::has_first_step && plan.states > 0 && find_state(parameter) == nullptr;
      const ParamState* own = nullptr;
      if (plan.states > 0) own = entry.state = &state_of(parameter, options);
      entry.bucket = bucket_for(plan, parameter, first_step);
      detail::Bucket& bucket = plan.buckets[entry.bucket];
      bucket.parameters.push_back(parameter);
      if constexpr (Method::counts_steps) bucket.steps.push_back(own->step);
      for (std::size_t k = 0; k < plan.states; ++k) bucket.states[k].push_back(own->tensors[k]);
    }
    return plan;
  }

  static std::size_t bucket_for(Plan& plan, const at::Tensor& parameter, bool first_step) {
    for (std::size_t i = 0; i < plan.buckets.size(); ++i) {
      const detail::Bucket& bucket = plan.buckets[i];
      if (bucket.device == parameter.device() && bucket.dtype == parameter.scalar_type() &&
          bucket.first_step == first_step) {
        return i;
      }
    }
    plan.buckets.push_back({parameter.device(), parameter.scalar_type(), first_step});
    return plan.buckets.size() - 1;
  }

  /// How many parameters the groups before that one have.
  [[nodiscard]] std::size_t count_before(std::size_t group) const {
    std::size_t count = 0;
    for (std::size_t i = 0; i < group; ++i) count += param_groups()[i].params().size();
    return count;
  }

  /// Null for a parameter that has made no step yet.
  [[nodiscard]] const ParamState* find_state(const at::Tensor& parameter) const {
    const auto found = state_.find(parameter.unsafeGetTensorImpl());
    return found == state_.end() ? nullptr : static_cast<const ParamState*>(found->second.get());
  }
  /// The state, made or brought to the parameter's device and dtype if need be.
  ParamState& state_of(const at::Tensor& parameter, const Options& options) {
    auto& slot = state_[parameter.unsafeGetTensorImpl()];
    if (slot == nullptr) slot = std::make_unique<ParamState>();
    auto& own = static_cast<ParamState&>(*slot);
    if constexpr (Method::counts_steps) {
      const auto on_device = parameter.options().dtype(at::kFloat);
      own.step = own.step.defined() ? own.step.to(on_device) : at::zeros({}, on_device);
    }
    const double initial = Method::initial_state(static_cast<const Options&>(*defaults_));
    for (std::size_t k = 0; k < Method::states(options); ++k) {
      at::Tensor& tensor = own.tensors[k];
      tensor = tensor.defined() ? detail::like(tensor, parameter) : at::full_like(parameter, initial);
    }
    return own;
  }

  static bool is_maximize(const torch::optim::OptimizerOptions& options) {
    return dynamic_cast<const Maximize<Options>*>(&options) != nullptr;
  }
  static bool maximizes(const torch::optim::OptimizerOptions& options) {
    const auto* own = dynamic_cast<const Maximize<Options>*>(&options);
    return own != nullptr && own->maximize;
  }
  template <class Group>
  static auto& options_of(Group& group) {
    using Wanted = std::conditional_t<std::is_const_v<Group>, const Options, Options>;
    if (auto* own = dynamic_cast<Wanted*>(&group.options())) return *own;
    throw Error(std::string("fabric: ") + Method::name +
                ": a parameter group has the options of another optimizer: use " + Method::name + "Options");
  }
  static std::unique_ptr<torch::optim::OptimizerOptions> clone(const torch::optim::OptimizerOptions& options) {
    return options.clone();
  }
  static void check(const Options& options, const std::string& where, const Dict& group) {
    const std::string problems = detail::problems_of<Method>(options, group);
    if (!problems.empty()) throw Error(std::string("fabric: ") + Method::name + ": in " + where + problems);
  }
  static void refuse_if_same(const at::Tensor& added, const at::Tensor& own, const std::string& name) {
    if (added.is_same(own)) {
      throw Error(std::string("fabric: ") + Method::name + ": " + name +
                  " comes twice: each parameter belongs to one group, once");
    }
  }
  [[noreturn]] static void refuse_archive(const char* how) {
    throw Error(std::string("fabric: ") + Method::name + " cannot be " + how +
                " one of LibTorch's archives: use state_dict() and load_state_dict(), whose layout is Python's");
  }

  std::vector<Plan> plans_;  // of each group
  std::vector<Dict> more_;   // what load_state_dict found in each group besides the options
};

}  // namespace fabric::optim
