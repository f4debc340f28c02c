// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/custom_class.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include "fabric/precision/linear_substitute.hpp"
#include "fabric/precision/quant_state.hpp"
#include "fabric/precision/quantisation.hpp"

namespace fabric::detail {

/// A module that holds parameters without a gradient, for the names in checkpoints.
struct Holder : torch::nn::Module {
  at::Tensor hold(const std::string& name, const at::Tensor& tensor) {
    return register_parameter(name, tensor, /*requires_grad=*/false);
  }
};

/// A layer of which another module, or the optimizer, holds the weight keeps that tensor; only what is in it changes.
inline void replace_weight(at::Tensor& weight, const at::Tensor& data) {
  weight.mutable_grad().reset();
  weight.set_requires_grad(false);
  weight.set_data(data);
}

/// Rows of any input, and back: (*, in) -> (rows, in), (rows, out) -> (*, out).
inline at::Tensor as_rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }
inline at::Tensor as_shape_of(const at::Tensor& x, const at::Tensor& rows) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows.size(1);
  return rows.reshape(sizes);
}

/// A linear layer whose weight is packed in 4 bits. Registered as the layer's child "weight", so that the names in a
/// checkpoint are the package's: "fc.weight" (the bytes), "fc.weight.absmax", "fc.weight.quant_map",
/// "fc.weight.quant_state.bitsandbytes__nf4", ...
class Linear4bit : public LinearSubstitute {
 public:
  /// Parts that are in the state under these names; `nested` ones undefined without double quantisation.
  struct Parts {
    at::Tensor packed, absmax, quant_map, nested_absmax, nested_quant_map;
    QuantState state;
  };

  /// Quantises a weight (out, in).
  [[nodiscard]] static Parts quantise(const at::Tensor& weight, quantisation::Code4 code, bool nested) {
    const at::Tensor exact = weight.scalar_type() == at::kDouble ? weight.to(at::kFloat) : weight;
    const auto [packed, absmax] = quantisation::quantise_4bit(exact.contiguous(), code);
    Parts parts{packed, absmax, quantisation::code_of(code, weight.device()),
                {},     {},     {code, exact.scalar_type(), {weight.size(0), weight.size(1)}, nested}};
    if (nested) {
      const at::Tensor offset = absmax.mean();
      parts.state.offset = offset.item<float>();
      parts.nested_quant_map = quantisation::dynamic_map(weight.device());
      const auto [codes, maxima] = quantisation::quantise_8bit(absmax - offset, parts.nested_quant_map);
      parts.absmax = codes;
      parts.nested_absmax = maxima;
    }
    return parts;
  }

  explicit Linear4bit(const Parts& parts) : LinearSubstitute("Linear4bit"), state_(parts.state) {
    const auto hold = [this](const char* name, const at::Tensor& tensor) {
      return tensor.defined() ? register_parameter(name, tensor, /*requires_grad=*/false) : tensor;
    };
    absmax_ = hold("absmax", parts.absmax);
    quant_map_ = hold("quant_map", parts.quant_map);
    nested_absmax_ = hold("nested_absmax", parts.nested_absmax);
    nested_quant_map_ = hold("nested_quant_map", parts.nested_quant_map);
    const auto holder = register_module("quant_state", std::make_shared<Holder>());
    bytes_ = holder->hold("bitsandbytes__" + state_.kind(), to_bytes(state_).to(parts.packed.device()));
    seen_ = {bytes_.data_ptr(), bytes_._version()};
  }

  /// Computes in `compute`; the result has the input's dtype.
  inline at::Tensor product(const at::Tensor& x, const at::Tensor& packed,
                            const std::optional<at::Tensor>& bias) override;
  /// Before anybody has said it, `product` computes in its input's dtype.
  std::optional<at::ScalarType> compute{};

  /// (out, in)
  [[nodiscard]] at::Tensor dequantise(const at::Tensor& packed, at::ScalarType type) {
    refresh();
    at::Tensor absmax = absmax_;
    if (state_.nested) {
      absmax = quantisation::dequantise_8bit(absmax_, nested_absmax_, nested_quant_map_, at::kFloat) + state_.offset;
    }
    return quantisation::dequantise_4bit(packed, absmax, quant_map_, state_.sizes, type);
  }
  /// Of the weight before it was quantised: what gradients go through.
  [[nodiscard]] at::ScalarType dtype() const { return state_.dtype; }
  [[nodiscard]] quantisation::Code4 code() const { return state_.code; }
  [[nodiscard]] bool nested() const { return state_.nested; }

 private:
  /// A checkpoint may have been loaded into the bytes. They lie on the device, so they are read only if they changed.
  void refresh() {
    const std::pair<const void*, int64_t> now{bytes_.data_ptr(), bytes_._version()};
    if (std::exchange(seen_, now) != now) state_ = quant_state_of(bytes_, "quant_state");
  }

  QuantState state_;
  at::Tensor absmax_, quant_map_, nested_absmax_, nested_quant_map_, bytes_;
  std::pair<const void*, int64_t> seen_;
};

/// Owns a layer in a graph.
template <class Layer>
struct LayerHolder : torch::CustomClassHolder {
  explicit LayerHolder(std::shared_ptr<Layer> pointer) : layer(std::move(pointer)) {}
  std::shared_ptr<Layer> layer;

  static c10::IValue wrap(const std::shared_ptr<Layer>& layer) {
    return c10::IValue::make_capsule(c10::make_intrusive<LayerHolder>(layer));
  }
  static std::shared_ptr<Layer> unwrap(const c10::IValue& value) {
    return static_cast<const LayerHolder&>(*value.toCapsule()).layer;
  }
};

/// The product with a packed weight: dequantised on use, in forward and in backward, so that only the packed weight
/// stays in memory.
class Product4bit : public torch::autograd::Function<Product4bit> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& packed,
                            const std::optional<at::Tensor>& bias, const std::shared_ptr<Linear4bit>& layer) {
    context->save_for_backward({packed});
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["layer"] = LayerHolder<Linear4bit>::wrap(layer);
    return at::linear(x, layer->dequantise(packed, x.scalar_type()), bias);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto layer = LayerHolder<Linear4bit>::unwrap(context->saved_data["layer"]);
    const at::Tensor packed = context->get_saved_variables()[0];
    const at::Tensor& g = gradients[0];
    torch::autograd::variable_list result(4);
    if (context->needs_input_grad(0)) {
      result[0] = g.matmul(layer->dequantise(packed, layer->dtype()).to(g.scalar_type()));
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = g.sum(0);
    return result;
  }
};

inline at::Tensor Linear4bit::product(const at::Tensor& x, const at::Tensor& packed,
                                      const std::optional<at::Tensor>& bias) {
  const auto self = std::static_pointer_cast<Linear4bit>(shared_from_this());
  const at::ScalarType type = compute.value_or(x.scalar_type());
  std::optional<at::Tensor> cast;
  if (bias) cast = bias->to(type);
  return as_shape_of(x, Product4bit::apply(as_rows(x.to(type)), packed, cast, self)).to(x.scalar_type());
}

/// A linear layer whose product is of 8-bit integers. For inference the weight itself is in 8 bits, "fc.weight" with
/// its rows' maxima "fc.SCB", as the package writes them; for training it stays in 16 bits and is quantised on use.
class Linear8bit : public LinearSubstitute {
 public:
  /// Inputs of at least this magnitude are outliers: their columns are multiplied in 16 bits.
  static constexpr double threshold = 6.0;

  /// For training; or for inference, with the maxima of the weight's rows.
  explicit Linear8bit(at::Tensor maxima = {}) : LinearSubstitute("Linear8bit"), maxima_(std::move(maxima)) {}
  /// Is the weight itself in 8 bits?
  [[nodiscard]] bool is_frozen() const { return maxima_.defined(); }

  inline at::Tensor product(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) override;
  [[nodiscard]] std::vector<at::Tensor> exact() const override {
    return maxima_.defined() ? std::vector{maxima_} : std::vector<at::Tensor>{};
  }

  /// The weight's rows in 8 bits.
  [[nodiscard]] quantisation::Int8Rows rows(const at::Tensor& weight) const {
    if (maxima_.defined()) return {weight, maxima_, {}};
    return quantisation::quantise_int8_rows(weight.to(at::kHalf));
  }

 private:
  at::Tensor maxima_;  // (out)
};

/// LLM.int8(): rows of the input and rows of the weight in 8 bits, and a second product in 16 bits for the outliers.
class Product8bit : public torch::autograd::Function<Product8bit> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const std::shared_ptr<Linear8bit>& layer,
                            bool train_weight) {
    const auto w = layer->rows(weight);
    const auto a = quantisation::quantise_int8_rows(x, Linear8bit::threshold);
    at::Tensor out = quantisation::scaled_int8_product(a.codes, a.absmax, w.codes, w.absmax, bias, x.scalar_type());
    at::Tensor outliers;
    if (a.outliers.numel() > 0) {
      outliers = x.index_select(1, a.outliers);
      out = out.addmm(
          outliers,
          quantisation::dequantise_int8_rows(w.codes.index_select(1, a.outliers), w.absmax).to(x.scalar_type()).t());
    }
    // An integer weight is the module's own, and is not copied by this.
    torch::autograd::variable_list saved{w.codes, w.absmax, {}, {}, a.outliers, outliers};
    if (train_weight) {
      const auto columns = quantisation::quantise_int8_columns(x, Linear8bit::threshold);
      saved[2] = columns.codes;
      saved[3] = columns.absmax;
    }
    context->saved_data["bias"] = bias.has_value();
    context->save_for_backward(saved);
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor g = gradients[0].to(at::kHalf);
    torch::autograd::variable_list result(5);
    if (context->needs_input_grad(0)) {
      const at::Tensor w = saved[0].to(at::kHalf).mul_(saved[1].unsqueeze(1).mul(1.0 / 127.0));
      result[0] = g.matmul(w);
    }
    if (context->needs_input_grad(1)) {
      const auto columns = quantisation::quantise_int8_columns(g);
      result[1] = quantisation::scaled_int8_product(columns.codes.t().contiguous(), columns.absmax, saved[2].t(),
                                                    saved[3], {}, at::kHalf);
      if (saved[4].numel() > 0) result[1].index_add_(1, saved[4], g.t().matmul(saved[5]));
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = gradients[0].sum(0);
    return result;
  }
};

inline at::Tensor Linear8bit::product(const at::Tensor& x, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias) {
  const auto self = std::static_pointer_cast<Linear8bit>(shared_from_this());
  const bool train_weight = at::GradMode::is_enabled() && weight.requires_grad();
  const at::Tensor out = Product8bit::apply(as_rows(x.to(at::kHalf)), weight, bias, self, train_weight);
  return as_shape_of(x, out.to(x.scalar_type()));
}

/// Puts a packed weight into a layer and the rest beside it. Returns what computes it from here on.
inline std::shared_ptr<Linear4bit> install(torch::nn::LinearImpl& layer, const Linear4bit::Parts& parts) {
  auto substitute = std::make_shared<Linear4bit>(parts);
  const auto before = std::dynamic_pointer_cast<Linear4bit>(LinearSubstitutes::instance().find(layer.weight));
  if (before) substitute->compute = before->compute;
  if (layer.named_children().contains("weight")) layer.unregister_module("weight");
  replace_weight(layer.weight, parts.packed);
  layer.register_module("weight", substitute);
  LinearSubstitutes::instance().add(layer.weight, substitute);
  return substitute;
}
/// Likewise one of 8 bits.
inline void install(torch::nn::LinearImpl& layer, const quantisation::Int8Rows& rows) {
  if (layer.named_children().contains("int8")) layer.unregister_module("int8");
  const at::NoGradGuard no_grad;
  at::Tensor maxima = layer.named_parameters(/*recurse=*/false).contains("SCB")
                          ? layer.named_parameters(/*recurse=*/false)["SCB"].copy_(rows.absmax)
                          : layer.register_parameter("SCB", rows.absmax, /*requires_grad=*/false);
  if (!layer.named_parameters(/*recurse=*/false).contains("weight_format")) {
    constexpr int row_major = 0;
    layer.register_parameter("weight_format", at::full({}, row_major, rows.codes.options().dtype(at::kByte)),
                             /*requires_grad=*/false);
  }
  const auto substitute = std::make_shared<Linear8bit>(maxima);
  replace_weight(layer.weight, rows.codes);
  layer.register_module("int8", substitute);
  LinearSubstitutes::instance().add(layer.weight, substitute);
}

}  // namespace fabric::detail
