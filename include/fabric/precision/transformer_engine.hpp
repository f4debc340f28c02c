// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/precision/autocast.hpp"
#include "fabric/precision/fp8.hpp"
#include "fabric/precision/linear_substitute.hpp"
#include "fabric/precision/precision_plugin.hpp"
#include "fabric/precision/true_precision.hpp"

namespace fabric {

/// What may be chosen of `TransformerEngine` at run time.
struct TransformerEngineOptions {
  Fp8Recipe recipe{};
  std::vector<std::string> ignore_modules{};  ///< Layers whose names begin so stay in the weights' dtype.
  bool replace_layers = true;                 ///< False: everything stays in the weights' dtype.
};

namespace detail {

class Fp8Linear;

/// The layers that one `setup` found. Their scales change together, once in each backward.
class Fp8Layers : public std::enable_shared_from_this<Fp8Layers> {
 public:
  Fp8Layers(const Fp8Recipe& recipe, const World& world) : recipe_(recipe), world_(world) {}

  [[nodiscard]] const Fp8Recipe& recipe() const { return recipe_; }
  inline void add(const std::shared_ptr<Fp8Linear>& layer);

  /// Called in each layer's backward: new scales when this backward ends.
  void update_after_backward() {
    const int backward = torch::autograd::get_current_graph_task_id();
    if (std::exchange(backward_, backward) == backward) return;
    torch::autograd::Engine::get_default_engine().queue_callback([self = shared_from_this()] { self->update(); });
  }
  inline void update();

 private:
  Fp8Recipe recipe_;
  World world_;
  std::vector<std::weak_ptr<Fp8Linear>> layers_;
  at::Tensor bound_;   // (operands): the largest number of each one's type
  int backward_ = -1;  // the last one that asked for new scales
};

/// A linear layer in FP8: input, weight and gradient are quantised, each by a scale of its own, and the three products
/// of a step are products of FP8 numbers. Registered as the layer's child "fp8", so that its scales are in checkpoints.
class Fp8Linear : public LinearSubstitute {
 public:
  enum Operand : int64_t { input = 0, weight = 1, gradient = 2, operands = 3 };

  explicit Fp8Linear(at::Device device) : LinearSubstitute("Fp8Linear"), kernel_(fp8::kernel_for(device)) {
    const auto options = at::TensorOptions(device).dtype(at::kFloat);
    scale_ = register_buffer("scale", at::ones({operands}, options));
    amax_history_ = register_buffer("amax_history", at::zeros({operands, 0}, options));
    steps_ = register_buffer("steps", at::zeros({}, options.dtype(at::kLong)));
  }

  /// From here on one of these, by their recipe. Its scales stay; so does its history, if that is as long.
  void join(std::shared_ptr<Fp8Layers> layers) {
    layers_ = std::move(layers);
    const int64_t length = layers_->recipe().amax_history_len;
    if (amax_history_.size(1) != length) {
      amax_history_.set_data(at::zeros({operands, length}, amax_history_.options()));
    }
  }
  inline at::Tensor product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) override;

  /// An operand as FP8. Its largest magnitude is remembered for the scales to come while gradients are recorded:
  /// evaluation changes nothing.
  at::Tensor quantise(const at::Tensor& tensor, Operand operand, bool remember) {
    if (remember && tensor.numel() > 0) {
      at::Tensor amax = amax_history_.select(0, operand).select(0, 0);
      constexpr double largest = std::numeric_limits<double>::infinity();
      at::maximum_out(amax, amax, at::linalg_vector_norm(tensor.detach(), largest, {}, false, at::kFloat));
    }
    return fp8::quantise(tensor, scale_.select(0, operand), type(operand));
  }
  /// In memory of its own, since cuBLAS takes no scale that lies at an odd address.
  [[nodiscard]] at::Tensor inverse_scale(Operand operand) const { return scale_.select(0, operand).reciprocal(); }
  [[nodiscard]] at::ScalarType type(Operand operand) const {
    return operand == gradient ? fp8::backward_type(layers_->recipe()) : fp8::forward_type(layers_->recipe());
  }
  [[nodiscard]] const std::shared_ptr<Fp8Layers>& layers() const { return layers_; }
  [[nodiscard]] fp8::Kernel kernel() const { return kernel_; }

  at::Tensor& scale() { return scale_; }
  at::Tensor& amax_history() { return amax_history_; }
  at::Tensor& steps() { return steps_; }

 private:
  std::shared_ptr<Fp8Layers> layers_;
  fp8::Kernel kernel_;
  at::Tensor scale_;         // (operands)
  at::Tensor amax_history_;  // (operands, length)
  at::Tensor steps_;         // ()
};

inline void Fp8Layers::add(const std::shared_ptr<Fp8Linear>& layer) {
  if (layer->layers().get() == this) return;
  layer->join(shared_from_this());
  layers_.push_back(layer);
}

inline void Fp8Layers::update() {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> scales;
  std::vector<at::Tensor> histories;
  at::Tensor step;
  for (const auto& weak : layers_) {
    const auto layer = weak.lock();
    if (!layer || layer->layers().get() != this) continue;
    scales.push_back(layer->scale());
    histories.push_back(layer->amax_history());
    step = layer->steps().add_(1);
  }
  if (scales.empty()) return;
  at::Tensor scale = at::cat(scales);         // (layers x operands)
  at::Tensor history = at::cat(histories);    // (layers x operands, length)
  if (recipe_.reduce_amax && world_.group) {  // all layers, whichever ran: the ranks must agree on the shape
    history.select(1, 0).copy_(all_reduce(world_, history.select(1, 0), ReduceOp::max));
  }
  if (!bound_.defined() || bound_.device() != scale.device()) {
    const auto forward = static_cast<float>(fp8::largest(fp8::forward_type(recipe_)));
    const auto backward = static_cast<float>(fp8::largest(fp8::backward_type(recipe_)));
    bound_ = at::tensor({forward, forward, backward}, scale.options());
  }
  fp8::update_scales(history, scale, bound_.repeat(static_cast<int64_t>(scales.size())), step, recipe_);
  at::_foreach_copy_(scales, scale.split(Fp8Linear::operands));
  at::_foreach_copy_(histories, history.split(Fp8Linear::operands));
}

/// The three products of a step, without a graph of their own.
class Fp8Product : public torch::autograd::Function<Fp8Product> {
 public:
  struct Layer : torch::CustomClassHolder {
    explicit Layer(std::shared_ptr<Fp8Linear> pointer) : layer(std::move(pointer)) {}
    std::shared_ptr<Fp8Linear> layer;
  };

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& w,
                            const std::optional<at::Tensor>& bias, const std::shared_ptr<Fp8Linear>& layer,
                            bool remember) {
    const at::Tensor inverse_x = layer->inverse_scale(Fp8Linear::input);
    const at::Tensor inverse_w = layer->inverse_scale(Fp8Linear::weight);
    const at::Tensor x8 = layer->quantise(x, Fp8Linear::input, remember);
    const at::Tensor w8 = layer->quantise(w, Fp8Linear::weight, remember);
    context->save_for_backward({x8, w8, inverse_x, inverse_w});
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["layer"] = c10::IValue::make_capsule(c10::make_intrusive<Layer>(layer));
    return fp8::product(x8, w8, inverse_x, inverse_w, bias, w.scalar_type(), /*fast=*/true, layer->kernel());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    if (at::GradMode::is_enabled()) {
      throw Error("fabric: FP8: a gradient of a gradient (create_graph) cannot be computed through FP8 layers");
    }
    const auto holder = context->saved_data["layer"].toCapsule();
    Fp8Linear& layer = *static_cast<const Layer&>(*holder).layer;
    const auto saved = context->get_saved_variables();
    const at::Tensor& x8 = saved[0];
    const at::Tensor& w8 = saved[1];
    const at::Tensor& g = gradients[0];
    const at::Tensor inverse_g = layer.inverse_scale(Fp8Linear::gradient);
    const at::Tensor g8 = layer.quantise(g, Fp8Linear::gradient, /*remember=*/true);
    layer.layers()->update_after_backward();

    torch::autograd::variable_list result(5);
    const auto product = [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& inverse_b) {
      return fp8::product(a, b, inverse_g, inverse_b, {}, g.scalar_type(), /*fast=*/false, layer.kernel());
    };
    if (context->needs_input_grad(0)) result[0] = product(g8, w8.t(), saved[3]);
    if (context->needs_input_grad(1)) result[1] = product(g8.t(), x8.t(), saved[2]);
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = g.sum(0);
    return result;
  }
};

inline at::Tensor Fp8Linear::product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = x.to(w.scalar_type()).reshape({-1, x.size(-1)});
  const auto self = std::static_pointer_cast<Fp8Linear>(shared_from_this());
  const at::Tensor out = Fp8Product::apply(rows, w, bias, self, at::GradMode::is_enabled());
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  return out.reshape(sizes);
}

}  // namespace detail

/// `transformer-engine`: linear layers train in FP8 with delayed scaling; everything else is in `Weights`, weights
/// included. On CUDA the products run on tensor cores (`at::_scaled_mm`), on the CPU they are emulated: 32-bit products
/// of the same FP8 numbers.
template <class Weights>
class PrecisionPlugin<TransformerEngine<Weights>> : public detail::TruePrecision<TransformerEngine<Weights>> {
  using Base = detail::TruePrecision<TransformerEngine<Weights>>;

 public:
  using Options = TransformerEngineOptions;

  class ForwardContext {
   public:
    explicit ForwardContext(at::DeviceType device) : dtype_(Base::dtype), autocast_(device, Base::dtype) {}

   private:
    DefaultDtypeGuard dtype_;
    AutocastGuard autocast_;
    SubstitutedLinears linears_;
  };

  /// Brings the module to the weights' dtype and its linear layers to FP8, but for those that are ignored, or have a
  /// size that is no multiple of 16, which FP8's kernels need. Layers that are in FP8 already follow this recipe from
  /// here on. Says on standard error (rank 0) which layers stay in the weights' dtype. Throws fabric::Error for a
  /// recipe that means nothing, and for layers whose weights are quantised (Bitsandbytes).
  static void convert_module(torch::nn::Module& module, const Options& options = {}, const World& world = {}) {
    fp8::check(options.recipe);
    const auto linears = detail::linears_of(module);
    for (const auto& [name, layer] : linears) {
      const auto known = LinearSubstitutes::instance().find(layer->weight);
      if (!known || std::dynamic_pointer_cast<detail::Fp8Linear>(known)) continue;
      throw Error("fabric: setup: FP8: the weight of " + (name.empty() ? "the module" : name) +
                  " was quantised by Bitsandbytes before: make the module anew");
    }
    detail::convert_floats(module, Base::dtype);
    if (!options.replace_layers) return;
    const auto layers = std::make_shared<detail::Fp8Layers>(options.recipe, world);
    std::vector<std::string> left;
    for (const auto& [name, layer] : linears) {
      if (detail::is_ignored(name, options.ignore_modules)) continue;
      const int64_t in = layer->weight.size(1);
      const int64_t out = layer->weight.size(0);
      if (in % 16 != 0 || out % 16 != 0) {
        left.push_back((name.empty() ? "the module itself" : name) + " (" + std::to_string(in) + " -> " +
                       std::to_string(out) + ")");
        continue;
      }
      auto substitute = std::dynamic_pointer_cast<detail::Fp8Linear>(LinearSubstitutes::instance().find(layer->weight));
      if (!substitute) {
        substitute = std::make_shared<detail::Fp8Linear>(layer->weight.device());
        LinearSubstitutes::instance().add(layer->weight, substitute);
      }
      layers->add(substitute);
      if (!layer->named_children().contains("fp8")) layer->register_module("fp8", substitute);
    }
    if (world.is_global_zero()) say(module, linears, left, options);
  }

 private:
  static void say(const torch::nn::Module& module, const std::vector<detail::NamedLinear>& linears,
                  const std::vector<std::string>& left, const Options& options) {
    const std::string dtype(Weights::facts.name.view());
    if (!left.empty()) {
      detail::note("FP8 takes layers whose sizes are multiples of 16; these stay in " + dtype + ": " +
                   detail::joined(left) + ". Pad their sizes to change that");
    }
    std::vector<std::string> attention;
    for (const auto& item : module.named_modules("", /*include_self=*/false)) {
      if (dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(item.value().get()) != nullptr) {
        attention.push_back(item.key());
      }
    }
    if (!attention.empty()) {
      detail::note("the input projections of MultiheadAttention are no Linear and stay in " + dtype + ": " +
                   detail::joined(attention));
    }
    if (const auto vain = detail::ignored_in_vain(linears, options.ignore_modules); !vain.empty()) {
      detail::note("ignore_modules: no linear layer's name begins with " + detail::joined(vain));
    }
  }
};

}  // namespace fabric
