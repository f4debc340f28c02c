// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/precision/linear_substitute.hpp"
#include "fabric/precision/precision_plugin.hpp"
#include "fabric/precision/quantisation.hpp"
#include "fabric/precision/quantised_linear.hpp"
#include "fabric/precision/true_precision.hpp"

namespace fabric {

/// What may be chosen of `Bitsandbytes` at run time.
struct BitsandbytesOptions {
  std::vector<std::string> ignore_modules{};  ///< Layers whose names begin so are not quantised ("lm_head").
};

namespace detail {

/// One layer's part of a state.
struct LoadedLinear {
  torch::nn::LinearImpl* layer = nullptr;
  std::optional<Linear4bit::Parts> four;
  std::optional<quantisation::Int8Rows> eight;
  at::Tensor floats;
};

/// Throws fabric::Error for what is missing or does not fit the layer.
[[nodiscard]] inline LoadedLinear loaded_linear(const NamedLinear& linear, const Dict& state) {
  const std::string prefix = linear.name.empty() ? "" : linear.name + ".";
  const auto find = [&](const std::string& name) {
    const Value* value = state.find(prefix + name);
    return value == nullptr ? at::Tensor() : value->as<at::Tensor>(prefix + name);
  };
  const auto fail = [&](const std::string& what) -> void { throw Error("fabric: " + prefix + "weight " + what); };
  auto& layer = *linear.layer;
  const auto device = layer.weight.device();
  const int64_t in = layer.options.in_features();
  const int64_t out = layer.options.out_features();
  const std::string sizes = "(" + std::to_string(out) + ", " + std::to_string(in) + ")";

  LoadedLinear loaded{&layer, {}, {}, {}};
  const at::Tensor weight = find("weight");
  if (!weight.defined()) fail("is missing");
  if (weight.scalar_type() == at::kByte) {
    at::Tensor bytes = find("weight.quant_state.bitsandbytes__nf4");
    if (!bytes.defined()) bytes = find("weight.quant_state.bitsandbytes__fp4");
    if (!bytes.defined()) fail("is in bytes, but weight.quant_state.bitsandbytes__nf4 or __fp4 is missing");
    const QuantState quant_state = quant_state_of(bytes, prefix + "weight");
    if (quant_state.sizes != std::array<int64_t, 2>{out, in} || weight.numel() != (out * in + 1) / 2) {
      fail("is not of the layer's sizes " + sizes);
    }
    Linear4bit::Parts parts{weight.reshape({-1, 1}),      find("weight.absmax"),           find("weight.quant_map"),
                            find("weight.nested_absmax"), find("weight.nested_quant_map"), quant_state};
    const int64_t blocks = (out * in + quantisation::block_size - 1) / quantisation::block_size;
    const int64_t nested = (blocks + quantisation::nested_block_size - 1) / quantisation::nested_block_size;
    const auto check = [&](const char* name, at::Tensor& part, int64_t size, at::ScalarType type) {
      if (!part.defined() || part.numel() != size || part.scalar_type() != type) {
        fail(std::string("needs weight.") + name + " with " + std::to_string(size) + " numbers of " +
             at::toString(type));
      }
      part = part.reshape({-1}).to(device).clone();
    };
    check("absmax", parts.absmax, blocks, quant_state.nested ? at::kByte : at::kFloat);
    check("quant_map", parts.quant_map, 16, at::kFloat);
    if (quant_state.nested) {
      check("nested_absmax", parts.nested_absmax, nested, at::kFloat);
      check("nested_quant_map", parts.nested_quant_map, 256, at::kFloat);
    }
    parts.packed = parts.packed.to(device).clone();
    loaded.four = parts;
  } else if (weight.scalar_type() == at::kChar) {
    const at::Tensor maxima = find("SCB");
    if (!maxima.defined() || maxima.numel() != out) fail("is in 8 bits, but SCB with a number for each row is missing");
    if (!weight.sizes().equals({out, in})) fail("is not of the layer's sizes " + sizes);
    if (const at::Tensor format = find("weight_format"); format.defined() && format.item<int64_t>() != 0) {
      fail("is not stored row by row (weight_format 0)");
    }
    loaded.eight =
        quantisation::Int8Rows{weight.to(device).clone(), maxima.reshape({-1}).to(device, at::kFloat).clone(), {}};
  } else {
    if (!weight.is_floating_point() || !weight.sizes().equals({out, in})) fail("is not of the layer's sizes " + sizes);
    loaded.floats = weight.to(device);
  }
  return loaded;
}

}  // namespace detail

/// Loads the linear layers' weights of a state as Python's `state_dict` has it: names to tensors. A weight that is
/// quantised already is taken as it is, whatever the mode, in the package's layout ("fc.weight" with
/// "fc.weight.absmax", "fc.weight.quant_map", "fc.weight.quant_state.bitsandbytes__nf4", ..., or with "fc.SCB"); one of
/// floats is quantised if its layer is. Works before and after `setup`. Biases and whatever belongs to no linear layer
/// are not looked at. Throws fabric::Error that names every weight that is missing or does not fit, and then nothing
/// has changed.
inline void load_quantised(torch::nn::Module& module, const Value& state_dict) {
  const Dict& state = state_dict.as<Dict>("the state to load");
  std::vector<detail::LoadedLinear> all;
  std::string problems;
  for (const auto& linear : detail::linears_of(module)) {
    try {
      all.push_back(detail::loaded_linear(linear, state));
    } catch (const Error& error) {
      problems += (problems.empty() ? "" : "\n") + std::string(error.what());
    }
  }
  if (!problems.empty()) throw Error(problems);

  const at::NoGradGuard no_grad;
  for (auto& [layer, four, eight, floats] : all) {
    if (four) {
      detail::install(*layer, *four);
    } else if (eight) {
      detail::install(*layer, *eight);
    } else if (const auto before =
                   std::dynamic_pointer_cast<detail::Linear4bit>(LinearSubstitutes::instance().find(layer->weight))) {
      detail::install(*layer, detail::Linear4bit::quantise(floats, before->code(), before->nested()));
    } else if (layer->weight.scalar_type() == at::kChar) {
      detail::install(*layer, quantisation::quantise_int8_rows(floats.to(at::kHalf)));
    } else {
      layer->weight.copy_(floats);
    }
  }
}

/// `Bitsandbytes`: the weights of linear layers are quantised when the module is set up, and the memory that they had
/// is free then; everything else is stored and computed in `Compute`. In the 4-bit modes and `int8` the weights are
/// frozen, gradients flow through them to what comes before; in `int8_training` they stay in 16 bits and train, by
/// products of 8-bit integers.
template <BitsandbytesMode mode, class Compute>
class PrecisionPlugin<Bitsandbytes<mode, Compute>> : public detail::TruePrecision<Bitsandbytes<mode, Compute>> {
  using Base = detail::TruePrecision<Bitsandbytes<mode, Compute>>;

 public:
  using Options = BitsandbytesOptions;

  class ForwardContext {
   public:
    explicit ForwardContext(at::DeviceType /*device*/) : dtype_(Base::dtype) {}

   private:
    DefaultDtypeGuard dtype_;
    SubstitutedLinears linears_;
  };

  /// Quantises the linear layers, but for those that are ignored, are quantised already, or share their weight with a
  /// module that is no linear layer (tied embeddings), which standard error says on rank 0. Throws fabric::Error for a
  /// module without linear layers, and for one that was set up for training in 8 bits, or in FP8.
  static void convert_module(torch::nn::Module& module, const Options& options = {}, const World& world = {}) {
    const auto linears = detail::linears_of(module);
    if (linears.empty()) {
      throw Error("fabric: setup: Bitsandbytes quantises linear layers, but " + module.name() +
                  " has none: use another precision for it");
    }
    const auto others = weights_of_other_modules(module);
    std::vector<std::string> shared;
    for (const auto& [name, layer] : linears) {
      if (detail::is_ignored(name, options.ignore_modules)) continue;
      if (others.contains(layer->weight.unsafeGetTensorImpl())) {
        shared.push_back(name);
      } else if (const auto known = LinearSubstitutes::instance().find(layer->weight)) {
        share(*layer, known);
      } else {
        quantise(*layer);
      }
    }
    detail::convert_floats(module, Base::dtype);
    if (!world.is_global_zero()) return;
    if (!shared.empty()) {
      detail::note("these layers share their weights with other modules and are not quantised: " +
                   detail::joined(shared));
    }
    if (const auto vain = detail::ignored_in_vain(linears, options.ignore_modules); !vain.empty()) {
      detail::note("ignore_modules: no linear layer's name begins with " + detail::joined(vain));
    }
  }

 private:
  static void quantise(torch::nn::LinearImpl& layer) {
    const at::NoGradGuard no_grad;
    if constexpr (mode == BitsandbytesMode::int8_training) {
      const auto substitute = std::make_shared<detail::Linear8bit>();
      layer.register_module("int8", substitute);
      LinearSubstitutes::instance().add(layer.weight, substitute);
    } else if constexpr (mode == BitsandbytesMode::int8) {
      detail::install(layer, quantisation::quantise_int8_rows(layer.weight.to(at::kHalf)));
    } else {
      constexpr bool nf4 = mode == BitsandbytesMode::nf4 || mode == BitsandbytesMode::nf4_dq;
      constexpr bool nested = mode == BitsandbytesMode::nf4_dq || mode == BitsandbytesMode::fp4_dq;
      constexpr auto code = nf4 ? quantisation::Code4::nf4 : quantisation::Code4::fp4;
      const auto substitute = detail::install(layer, detail::Linear4bit::quantise(layer.weight, code, nested));
      substitute->compute = Base::dtype;
    }
  }
  /// Another layer with the same weight was quantised: its substitute, and what goes with it, belong to this one too.
  static void share(torch::nn::LinearImpl& layer, const std::shared_ptr<LinearSubstitute>& known) {
    const auto four = std::dynamic_pointer_cast<detail::Linear4bit>(known);
    const auto eight = std::dynamic_pointer_cast<detail::Linear8bit>(known);
    if (!four && (!eight || (!eight->is_frozen() && mode != BitsandbytesMode::int8_training))) {
      throw Error(std::string("fabric: setup: this module was set up ") +
                  (eight ? "with int8-training" : "in FP8 (transformer-engine)") +
                  " before, so that its linear layers cannot be quantised: make it anew");
    }
    if (four) four->compute = Base::dtype;
    const std::string name = four ? "weight" : "int8";
    if (!layer.named_children().contains(name)) layer.register_module(name, known);
  }

  static std::unordered_set<const c10::TensorImpl*> weights_of_other_modules(torch::nn::Module& module) {
    std::unordered_set<const c10::TensorImpl*> weights;
    const auto add = [&](const torch::nn::Module& owner) {
      if (dynamic_cast<const torch::nn::LinearImpl*>(&owner) != nullptr) return;
      for (const at::Tensor& tensor : owner.parameters(/*recurse=*/false)) weights.insert(tensor.unsafeGetTensorImpl());
    };
    add(module);
    for (const auto& child : module.modules(/*include_self=*/false)) add(*child);
    return weights;
  }
};

}  // namespace fabric
