// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/module/clip_gradients.hpp"
#include "fabric/optim/step_scale.hpp"

namespace fabric {

/// What may be tuned of a `GradScaler`; the names and defaults are PyTorch's.
struct GradScalerOptions {
  double init_scale = 65536.0;          ///< The first factor.
  double growth_factor = 2.0;           ///< The factor grows by this after `growth_interval` good steps in a row,
  double backoff_factor = 0.5;          ///< and shrinks by this after a skipped one.
  std::int64_t growth_interval = 2000;  ///< In iterations.
  int hysteresis = 1;    ///< Shrink at the so many-th skipped step since the factor last grew. PyTorch has 1.
  double min_scale = 0;  ///< The factor does not shrink below this.
};

/// Whether a step of an optimizer changed the parameters, or was skipped since gradients overflowed. On a GPU the
/// answer may still be under way: asking waits for it, not asking does not. `if (optimizer.step()) scheduler.step();`
class Stepped {
 public:
  /// `found_inf` is one element, zero for a step that was made.
  explicit Stepped(at::Tensor found_inf) : found_inf_(std::move(found_inf)) {}
  explicit operator bool() const { return found_inf_.item<float>() == 0; }

 private:
  at::Tensor found_inf_;
};

/// Multiplies the loss so that small gradients survive in half floats, divides the gradients by the same before they
/// are used, skips steps whose gradients overflowed, and adapts the factor (Micikevicius et al., "Mixed Precision
/// Training", ICLR 2018). Step for step the numbers of `torch.amp.GradScaler`.
///
/// There is no stage to get wrong: gradients are unscaled once, by who first needs them so, and the factor is updated
/// once for all steps since the last backward, before the next. Gradients that were not used up by then, because their
/// optimizer steps less often, are brought to the new factor, so that what a backward adds to them fits.
class GradScaler {
 public:
  using Options = GradScalerOptions;

  /// Gives gradients that will be added to an optimizer's later, and are scaled until then.
  using Waiting = std::function<std::vector<at::Tensor>()>;

  /// The gradients of one optimizer's parameters.
  class Gradients {
   public:
    Gradients(std::shared_ptr<torch::optim::Optimizer> optimizer, Waiting waiting)
        : optimizer_(std::move(optimizer)), waiting_(std::move(waiting)) {}

   private:
    friend class GradScaler;
    [[nodiscard]] bool unscaled() const { return found_inf_.defined(); }

    std::shared_ptr<torch::optim::Optimizer> optimizer_;
    Waiting waiting_;
    at::Tensor found_inf_;  // undefined while the gradients are scaled
    bool used_ = false;     // by a step since then
  };

  /// Throws fabric::Error that names every option that makes no sense.
  explicit GradScaler(const Options& options = {})
      : options_(options),
        scale_(at::full({}, options.init_scale, at::kFloat)),
        growth_tracker_(at::zeros({}, at::kInt)) {
    std::string problems;
    const auto require = [&](bool good, const char* name, double value, const char* legal) {
      if (!good) problems += std::string("\n  ") + name + " is " + std::to_string(value) + ": " + legal;
    };
    require(std::isfinite(options.init_scale) && options.init_scale > 0, "init_scale", options.init_scale,
            "more than 0 is legal");
    require(std::isfinite(options.growth_factor) && options.growth_factor > 1, "growth_factor", options.growth_factor,
            "more than 1 is legal");
    require(options.backoff_factor > 0 && options.backoff_factor < 1, "backoff_factor", options.backoff_factor,
            "between 0 and 1 is legal");
    require(options.growth_interval > 0, "growth_interval", static_cast<double>(options.growth_interval),
            "1 or more is legal");
    require(options.hysteresis > 0, "hysteresis", options.hysteresis, "1 or more is legal");
    require(options.min_scale >= 0 && options.min_scale <= options.init_scale, "min_scale", options.min_scale,
            "from 0 to init_scale is legal");
    if (!problems.empty()) throw Error("fabric: GradScaler:" + problems);
  }

  /// Goes to the device of `world`, whose ranks agree from then on whether gradients overflowed.
  void join(const World& world) {
    world_ = world;
    scale_ = scale_.to(world.device);
    growth_tracker_ = growth_tracker_.to(world.device);
  }

  /// Keeps track of an optimizer's gradients, and of those that wait, while the result lives.
  [[nodiscard]] std::shared_ptr<Gradients> watch(std::shared_ptr<torch::optim::Optimizer> optimizer,
                                                 Waiting waiting = {}) {
    auto gradients = std::make_shared<Gradients>(std::move(optimizer), std::move(waiting));
    std::erase_if(watched_, [](const std::weak_ptr<Gradients>& known) { return known.expired(); });
    watched_.push_back(gradients);
    return gradients;
  }

  /// The loss times the factor, to call backward on.
  [[nodiscard]] at::Tensor scale(const at::Tensor& loss) {
    update();
    for_each_watched([&](Gradients& gradients) {
      gradients.used_ = false;
      if (!gradients.unscaled()) return;
      multiply(by_device_and_dtype(gradients), scale_);
      gradients.found_inf_.reset();
    });
    was_used_ = true;
    return loss * scale_;
  }

  /// Divides the gradients by the factor, unless that was done since the last backward. On all ranks together. Throws
  /// fabric::Error for gradients in half floats, which have no room for it.
  void unscale(Gradients& gradients) {
    if (gradients.unscaled()) return;
    if (!was_used_) {
      throw Error(
          "fabric: GradScaler: gradients are to be unscaled, but no loss was scaled: call fabric.backward(loss), not "
          "loss.backward()");
    }
    const at::NoGradGuard no_grad;
    at::Tensor found_inf = at::zeros({}, scale_.options());
    const at::Tensor inverse = scale_.reciprocal();
    for (auto& tensors : by_device_and_dtype(gradients)) {
      const at::Device device = tensors.front().device();
      if (tensors.front().scalar_type() == at::kHalf) refuse_half(*gradients.optimizer_);
      at::Tensor found = device == found_inf.device() ? found_inf : at::zeros({}, found_inf.options().device(device));
      at::_amp_foreach_non_finite_check_and_unscale_(tensors, found, inverse.to(device));
      if (!found.is_same(found_inf)) found_inf = at::maximum(found_inf, found.to(found_inf.device()));
    }
    gradients.found_inf_ = all_reduce(world_, std::move(found_inf), ReduceOp::max);
  }
  /// Likewise those of all optimizers.
  void unscale() {
    for_each_watched([&](Gradients& gradients) { unscale(gradients); });
  }
  /// A step uses the gradients. Throws fabric::Error when one has done so since the last backward, and there are some.
  void use(Gradients& gradients) {
    if (std::exchange(gradients.used_, true) && !by_device_and_dtype(gradients).empty()) {
      throw Error(
          "fabric: GradScaler: this optimizer has made its step since a loss was last scaled: call "
          "fabric.backward(loss), not loss.backward(), and step once after it");
    }
  }

  /// Did gradients that are unscaled now hold an infinity or NaN? Waits for the device.
  [[nodiscard]] bool found_inf() const {
    bool found = false;
    for_each_watched([&](const Gradients& gradients) {
      found = found || (gradients.unscaled() && gradients.found_inf_.item<float>() != 0);
    });
    return found;
  }

  /// Unscales, then steps unless the gradients overflowed. `gradients` are those of `optimizer`.
  template <class O>
  Stepped step(O& optimizer, Gradients& gradients) {
    unscale(gradients);
    const at::Tensor& found_inf = gradients.found_inf_;
    found_inf_ = found_inf_.defined() ? at::maximum(found_inf_, found_inf) : found_inf;
    Stepped stepped(found_inf);
    if constexpr (TakesStepScale<O>) {
      optimizer.step(StepScale{{}, found_inf});
    } else if (stepped) {
      optimizer.step();
    }
    return stepped;
  }

  /// Adapts the factor to the steps since the last update; without any, nothing happens. Comes by itself before the
  /// next backward.
  void update() {
    if (!found_inf_.defined()) return;
    auto [scale, growth_tracker, patience] = updated();
    become(std::move(scale), std::move(growth_tracker));
    patience_ = patience;
  }

  /// The factor of the next backward. Waits for the device.
  [[nodiscard]] double get_scale() const { return updated().scale.item<float>(); }
  /// How many good iterations there were since the factor last changed. Waits for the device.
  [[nodiscard]] std::int64_t get_growth_tracker() const { return updated().growth_tracker.item<int>(); }
  /// As it was made, or as the state that was loaded says.
  [[nodiscard]] const Options& options() const { return options_; }

  /// Everything that a resumed run needs, under the keys of Python's GradScaler.
  [[nodiscard]] Value state_dict() const {
    Dict state{{"scale", get_scale()},
               {"growth_factor", options_.growth_factor},
               {"backoff_factor", options_.backoff_factor},
               {"growth_interval", options_.growth_interval},
               {"_growth_tracker", get_growth_tracker()}};
    if (options_.hysteresis > 1) state["cur_hysteresis"] = std::int64_t{updated().patience};  // DeepSpeed's name
    return state;
  }
  /// Takes a state of `state_dict`, or of Python's. Throws fabric::Error, and then has changed nothing.
  void load_state_dict(const Value& state) {
    const auto& entries = state.as<Dict>("the state of GradScaler");
    const Options options{
        .init_scale = entries.at("scale").as_number("GradScaler's scale"),
        .growth_factor = entries.at("growth_factor").as_number("GradScaler's growth_factor"),
        .backoff_factor = entries.at("backoff_factor").as_number("GradScaler's backoff_factor"),
        .growth_interval = entries.at("growth_interval").as<std::int64_t>("GradScaler's growth_interval")};
    const auto tracker = entries.at("_growth_tracker").as<std::int64_t>("GradScaler's _growth_tracker");
    GradScaler loaded(options);  // which checks them
    if (tracker < 0) throw Error("fabric: GradScaler's _growth_tracker is " + std::to_string(tracker) + ", below 0");
    std::int64_t patience = options_.hysteresis;
    if (const Value* saved = entries.find("cur_hysteresis")) {
      patience = std::clamp<std::int64_t>(saved->as<std::int64_t>("GradScaler's cur_hysteresis"), 1, patience);
    }
    become(loaded.scale_.to(world_.device), at::full({}, tracker, growth_tracker_.options()));
    patience_ = static_cast<int>(patience);
    options_.growth_factor = options.growth_factor;
    options_.backoff_factor = options.backoff_factor;
    options_.growth_interval = options.growth_interval;
  }

 private:
  template <class Visit>
  void for_each_watched(Visit&& visit) const {
    for (const std::weak_ptr<Gradients>& known : watched_) {
      if (const auto gradients = known.lock()) visit(*gradients);
    }
  }

  /// The tensors that hold the gradients (of sparse ones, their values).
  static std::vector<std::vector<at::Tensor>> by_device_and_dtype(const Gradients& gradients) {
    std::vector<at::Tensor> all;
    for (const auto& group : gradients.optimizer_->param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        const at::Tensor& gradient = parameter.grad();
        if (gradient.defined()) all.push_back(gradient.is_sparse() ? gradient._values() : gradient);
      }
    }
    return detail::by_device_and_dtype(all);
  }

  [[noreturn]] static void refuse_half(const torch::optim::Optimizer& optimizer) {
    std::string places;
    std::size_t place = 0;
    for (const auto& group : optimizer.param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        if (parameter.grad().defined() && parameter.grad().scalar_type() == at::kHalf) {
          places += (places.empty() ? "" : ", ") + std::to_string(place);
        }
        ++place;
      }
    }
    throw Error("fabric: GradScaler: gradients in half floats cannot be unscaled (parameters " + places +
                " of the optimizer): keep the weights in 32 bits under F16Mixed, or use F16 without a scaler");
  }

  static void multiply(const std::vector<std::vector<at::Tensor>>& gradients, const at::Tensor& factor) {
    const at::NoGradGuard no_grad;
    for (const auto& tensors : gradients) at::_foreach_mul_(tensors, factor.to(tensors.front().device()));
  }

  struct Updated {
    at::Tensor scale;
    at::Tensor growth_tracker;
    int patience;
  };
  /// All of it with the steps since the last update.
  [[nodiscard]] Updated updated() const {
    if (!found_inf_.defined()) return {scale_, growth_tracker_, patience_};
    at::Tensor scale = scale_.clone();
    at::Tensor growth_tracker = growth_tracker_.clone();
    at::_amp_update_scale_(scale, growth_tracker, found_inf_, options_.growth_factor, options_.backoff_factor,
                           options_.growth_interval);
    int patience = patience_;
    if (options_.hysteresis > 1) {  // which waits for the device
      if (found_inf_.item<float>() == 0) {
        if ((scale > scale_).item<bool>()) patience = options_.hysteresis;
      } else if (patience > 1) {
        --patience;
        scale = scale_.clone();
      }
    }
    if (options_.min_scale > 0) scale.clamp_min_(options_.min_scale);
    return {scale, growth_tracker, patience};
  }
  /// From here on the factor is `scale`, for gradients that are scaled too.
  void become(at::Tensor scale, at::Tensor growth_tracker) {
    for_each_watched([&](Gradients& gradients) {
      const at::Tensor ratio = scale / scale_;
      if (!gradients.unscaled()) multiply(by_device_and_dtype(gradients), ratio);
      if (gradients.waiting_) multiply(detail::by_device_and_dtype(gradients.waiting_()), ratio);
    });
    scale_ = std::move(scale);
    growth_tracker_ = std::move(growth_tracker);
    found_inf_.reset();
  }

  Options options_;
  World world_;
  at::Tensor scale_;                    // float32, no dimensions
  at::Tensor growth_tracker_;           // int32, no dimensions
  at::Tensor found_inf_;                // over the steps since the last update; undefined if there were none
  int patience_ = options_.hysteresis;  // how many more skipped steps until the factor shrinks
  bool was_used_ = false;
  std::vector<std::weak_ptr<Gradients>> watched_;
};

}  // namespace fabric
