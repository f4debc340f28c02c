// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/autograd.h>
#include <torch/custom_class.h>
#include <torch/library.h>
#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/interception.hpp"
#include "fabric/libtorch.hpp"
#include "fabric/shard/tensor_slice.hpp"

namespace fabric::detail {

/// A tensor group as autograd functions keep it.
struct TensorGroup : torch::CustomClassHolder {
  explicit TensorGroup(World world) : tensor(std::move(world)) {}
  World tensor;
};

/// Sums are differentiated once: what a collective does to a gradient is not recorded.
inline void refuse_double_backward() {
  if (!at::GradMode::is_enabled()) return;
  throw Error(
      "fabric: tensor parallelism: a backward with create_graph through sliced layers is not supported: its gradients "
      "would lack the other ranks' part. Use create_graph = false, or leave these layers out of the plan");
}

/// Sums the tensor over the ranks, in its own memory where that is contiguous, past autograd.
inline void sum_data(const World& tensor, const at::Tensor& summand) {
  const at::NoGradGuard no_grad;
  const at::Tensor data = summand.detach();
  std::vector<at::Tensor> sum{data.contiguous()};
  finish(tensor, tensor.group->allreduce(sum), "all_reduce", sum[0]);
  if (!sum[0].is_alias_of(data)) data.copy_(sum[0]);
}

/// The ranks' tensors side by side along the last dimension.
[[nodiscard]] inline at::Tensor gathered(const World& tensor, const at::Tensor& part) {
  std::vector<at::Tensor> input{part.detach().contiguous()};
  std::vector<std::vector<at::Tensor>> outputs(1);
  for (int rank = 0; rank < tensor.size; ++rank) outputs[0].push_back(at::empty_like(input[0]));
  finish(tensor, tensor.group->allgather(outputs, input), "all_gather", input[0]);
  return at::cat(outputs[0], -1);
}

[[nodiscard]] inline at::Tensor own_columns(const World& tensor, const at::Tensor& whole) {
  const auto size = whole.size(-1) / tensor.size;
  return whole.narrow(-1, tensor.global_rank * size, size).contiguous();
}

/// Gathers the last dimension; the gradient, which is the same on all ranks, is divided.
struct Gather : torch::autograd::Function<Gather> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& part,
                            const c10::intrusive_ptr<TensorGroup>& group) {
    context->saved_data["group"] = c10::IValue::make_capsule(group);
    return gathered(group->tensor, part);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    refuse_double_backward();
    const auto group = c10::static_intrusive_pointer_cast<TensorGroup>(context->saved_data["group"].toCapsule());
    return {own_columns(group->tensor, gradients[0]), {}};
  }
};

/// The other way round.
struct Divide : torch::autograd::Function<Divide> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& whole,
                            const c10::intrusive_ptr<TensorGroup>& group) {
    context->saved_data["group"] = c10::IValue::make_capsule(group);
    return own_columns(group->tensor, whole.detach());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    refuse_double_backward();
    const auto group = c10::static_intrusive_pointer_cast<TensorGroup>(context->saved_data["group"].toCapsule());
    return {gathered(group->tensor, gradients[0]), {}};
  }
};

/// The tensor itself, whose gradient is summed over the ranks: Megatron's f. Layers that one after another take the
/// same tensor (query, key, value) share the sum, as their gradients are added first.
[[nodiscard]] inline at::Tensor summing_gradient(const World& tensor, const at::Tensor& input) {
  if (!at::GradMode::is_enabled() || !input.requires_grad()) return input;
  struct Last {
    const c10d::ProcessGroup* group = nullptr;
    libtorch::WeakNode node;
  };
  thread_local Last last;
  if (last.group == tensor.group.get()) {
    const libtorch::NodePointer node = last.node.lock();
    // By where gradients go, which changes with a tensor that is changed in place.
    if (node && node->next_edge(0) == torch::autograd::impl::gradient_edge(input)) {
      at::Tensor again = input.detach();
      torch::autograd::impl::set_gradient_edge(again, {node, 0});
      return again;
    }
  }
  at::Tensor output = input.view_as(input);
  output.register_hook([tensor](const at::Tensor& gradient) {
    refuse_double_backward();
    at::Tensor sum = gradient.clone(at::MemoryFormat::Contiguous);  // others may hold the gradient too
    sum_data(tensor, sum);
    return sum;
  });
  last = {tensor.group.get(), libtorch::WeakNode(output.grad_fn())};
  return output;
}

/// The operators of sliced layers. They are intercepted by a dispatch key above autograd and autocast, and above the
/// one of `LinearSubstitutes`, so that a layer may be both. The key is on the parameters, and on the thread that sliced
/// them: `set_data`, and so `Module::to`, takes a parameter's keys off, and a use puts them back.
class TensorOperators {
 public:
  /// LibTorch leaves it to out-of-tree code; nothing of LibTorch itself has it.
  static constexpr c10::DispatchKey key = c10::DispatchKey::TESTING_ONLY_GenericMode;

  /// Begins to intercept what uses the parameter, on this thread and wherever the parameter keeps the key.
  static void intercept(const at::Tensor& parameter) {
    static const bool once = [] {
      static torch::Library others(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
      others.fallback(torch::CppFunction::makeFallthrough());
      static torch::Library operators(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
      operators.impl("matmul", &TensorOperators::matmul);
      operators.impl("addmm", &TensorOperators::addmm);
      operators.impl("linear", &TensorOperators::linear);
      operators.impl("embedding", &TensorOperators::embedding);
      return true;
    }();
    static_cast<void>(once);
    c10::impl::tls_set_dispatch_key_included(key, true);
    mark(parameter);
  }

 private:
  using Known = std::shared_ptr<const SlicedParameter>;

  static void mark(const at::Tensor& parameter) {
    c10::DispatchKeySet& keys = keys_of(parameter);
    if (!keys.has(key)) keys = keys.add(key);
  }

  [[nodiscard]] static Known behind(const at::Tensor& weight) {
    auto known = SlicedParameters::instance().find(weight);
    if (known) mark(weight);
    return known;
  }
  /// The sliced weight of which a right-hand side is the transpose.
  [[nodiscard]] static Known behind_transpose(const at::Tensor& right) {
    if (right.dim() != 2) return nullptr;
    if (right.is_view()) {
      const at::Tensor weight(right._base());
      const bool transposed = weight.dim() == 2 && right.size(0) == weight.size(1) && right.size(1) == weight.size(0) &&
                              right.stride(0) == weight.stride(1) && right.stride(1) == weight.stride(0);
      if (Known known = transposed ? behind(weight) : nullptr) return known;
    }
    return right.key_set().has(key) ? SlicedParameters::instance().find_transposed(right) : nullptr;
  }

  [[noreturn]] static void refuse_input(const SlicedParameter& known, std::int64_t given, std::int64_t legal) {
    const bool whole = given == legal * known.slice.count;
    const bool part = given * known.slice.count == legal;
    std::string text = "fabric: tensor parallelism: the input of '" + known.slice.name + "' (" +
                       (known.linear->rowwise ? "Rowwise" : "Colwise") + ") has a last dimension of " +
                       std::to_string(given) + "; legal is " + std::to_string(legal);
    if (whole) text += ". It is whole, and the layer takes this rank's part: use Rowwise{.split_input = true}";
    if (part)
      text += ". It is this rank's part, and the layer takes all: make its producer Colwise{.gather_output = true}";
    throw Error(text);
  }

  /// `product` of what goes into the layer, made what comes out of it.
  template <class Product>
  static at::Tensor apply(const SlicedParameter& known, const at::Tensor& input, const std::optional<at::Tensor>& bias,
                          Product&& product) {
    if (!known.linear) {
      throw Error("fabric: tensor parallelism: the weight of '" + known.slice.name +
                  "' is sliced for an embedding, and used by a linear layer that the plan does not name: name it too");
    }
    const LinearOperator& layer = *known.linear;
    const World& tensor = known.slice.tensor;
    const bool splits = layer.rowwise && layer.split_input;
    const auto columns = known.slice.full_sizes[1] / (layer.rowwise && !splits ? tensor.size : 1);
    if (input.dim() == 0 || input.size(-1) != columns)
      refuse_input(known, input.dim() == 0 ? 0 : input.size(-1), columns);
    at::Tensor output;
    if (layer.rowwise) {
      output = product(splits ? Divide::apply(input, c10::make_intrusive<TensorGroup>(tensor)) : input, std::nullopt);
      // Megatron's g. The gradient of the sum is each summand's, so that autograd need not know of it.
      sum_data(tensor, output);
    } else {
      if (!layer.gather_output) return product(summing_gradient(tensor, input), bias);
      output = Gather::apply(product(summing_gradient(tensor, input), std::nullopt),
                             c10::make_intrusive<TensorGroup>(tensor));
    }
    return bias && bias->defined() ? output.add_(*bias) : output;  // whole, and once
  }

  static at::Tensor matmul(const at::Tensor& left, const at::Tensor& right) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    const Known known = behind_transpose(right);
    if (!known) return at::matmul(left, right);
    return apply(*known, left, {}, [&](const at::Tensor& input, const auto&) { return at::matmul(input, right); });
  }
  static at::Tensor addmm(const at::Tensor& bias, const at::Tensor& left, const at::Tensor& right,
                          const at::Scalar& beta, const at::Scalar& alpha) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    const bool is_linear = bias.dim() == 1 && beta.equal(1) && alpha.equal(1);
    const Known known = is_linear ? behind_transpose(right) : nullptr;
    if (!known) return at::addmm(bias, left, right, beta, alpha);
    return apply(*known, left, bias, [&](const at::Tensor& input, const std::optional<at::Tensor>& own) {
      return own ? at::addmm(*own, input, right) : at::matmul(input, right);
    });
  }
  static at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    const Known known = behind(weight);
    if (!known) return at::linear(input, weight, bias);
    return apply(*known, input, bias, [&](const at::Tensor& own, const std::optional<at::Tensor>& own_bias) {
      return at::linear(own, weight, own_bias);
    });
  }

  static at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, c10::SymInt padding_index,
                              bool scale_grad_by_freq, bool sparse) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    const Known known = behind(weight);
    if (!known) return at::embedding_symint(weight, indices, std::move(padding_index), scale_grad_by_freq, sparse);
    if (!known->embedding) {
      throw Error("fabric: tensor parallelism: the weight of '" + known->slice.name +
                  "' is sliced for a linear layer, and used by an embedding that the plan does not name: name it too");
    }
    const EmbeddingOperator& layer = *known->embedding;
    const World& tensor = known->slice.tensor;
    if (!layer.rowwise) {
      const at::Tensor part = at::embedding(weight, indices, layer.padding_index, scale_grad_by_freq, sparse);
      return layer.gather_output ? Gather::apply(part, c10::make_intrusive<TensorGroup>(tensor)) : part;
    }
    const auto words = weight.size(0);
    const auto first = words * tensor.global_rank;
    const auto total = known->slice.full_sizes[0];
    at::_assert_async(at::logical_and(indices.ge(0), indices.lt(total)).all(),
                      "fabric: tensor parallelism: an index into '" + known->slice.name + "' is outside of 0 to " +
                          std::to_string(total - 1));
    const at::Tensor own = indices - first;
    const at::Tensor elsewhere = at::logical_or(own.lt(0), own.ge(words));
    const bool pads_here = layer.padding_index >= first && layer.padding_index < first + words;
    at::Tensor output = at::embedding(weight, own.masked_fill(elsewhere, 0),
                                      pads_here ? layer.padding_index - first : -1, scale_grad_by_freq, sparse);
    output.masked_fill_(elsewhere.unsqueeze(-1), 0);
    sum_data(tensor, output);
    return output;
  }
};

}  // namespace fabric::detail
