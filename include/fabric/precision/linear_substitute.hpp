// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/library.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

namespace fabric {

/// What computes a `torch::nn::Linear` in place of LibTorch's operators, while a `SubstitutedLinears` lives.
///
/// A layer cannot be replaced by a module of another class: user modules hold `torch::nn::Linear` by its type and call
/// its forward, which is not virtual. So the layer stays, and the operators that its forward runs are intercepted where
/// their right-hand side is the transpose of a weight that has a substitute. That works for layers in typed modules,
/// `Sequential` and `AnyModule` alike, and for `MultiheadAttention`'s output projection.
///
/// The substitute is a child of its layers, so that it lives as long as they do, and its parameters and buffers are
/// part of the module's state. A module with substitutes cannot be cloned: `clone()` throws.
class LinearSubstitute : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;
  LinearSubstitute(const LinearSubstitute&) = delete;
  LinearSubstitute& operator=(const LinearSubstitute&) = delete;
  inline ~LinearSubstitute() override;

  /// `input` (*, in) times the transpose of what `weight` means (out, in), plus `bias` (out) if there is one.
  virtual at::Tensor product(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias) = 0;

  /// The tensors whose dtype must not change: by default, all of this module's.
  [[nodiscard]] virtual std::vector<at::Tensor> exact() const {
    std::vector<at::Tensor> tensors = parameters();
    for (const at::Tensor& buffer : buffers()) tensors.push_back(buffer);
    return tensors;
  }

 private:
  friend class LinearSubstitutes;
  const c10::TensorImpl* weight_ = nullptr;
};

/// The substitutes of this process by their weights. Thread-safe.
class LinearSubstitutes {
 public:
  [[nodiscard]] static LinearSubstitutes& instance() {
    static LinearSubstitutes substitutes;
    return substitutes;
  }

  /// Null if `weight` has none.
  [[nodiscard]] std::shared_ptr<LinearSubstitute> find(const at::Tensor& weight) const {
    const std::shared_lock lock(mutex_);
    const auto found = by_weight_.find(weight.unsafeGetTensorImpl());
    return found == by_weight_.end() ? nullptr : found->second.lock();
  }
  void add(const at::Tensor& weight, const std::shared_ptr<LinearSubstitute>& substitute) {
    intercept();
    const std::unique_lock lock(mutex_);
    substitute->weight_ = weight.unsafeGetTensorImpl();
    by_weight_[substitute->weight_] = substitute;
  }
  /// The substitute of that weight is gone; another one may have come in its place meanwhile, and stays.
  void remove(const c10::TensorImpl* weight) {
    const std::unique_lock lock(mutex_);
    const auto found = by_weight_.find(weight);
    if (found != by_weight_.end() && found->second.expired()) by_weight_.erase(found);
  }

  /// The key under which the operators are intercepted: one that LibTorch leaves to other libraries (torchdistx had
  /// it), above autograd and autocast. It costs nothing outside a `SubstitutedLinears`, and nothing inside for
  /// operators other than the three below.
  static constexpr c10::DispatchKey key = c10::DispatchKey::DeferredInit;

 private:
  LinearSubstitutes() = default;

  /// The substitute for a right-hand side that is some weight's transpose.
  [[nodiscard]] static std::shared_ptr<LinearSubstitute> behind_transpose(const at::Tensor& right, at::Tensor& weight) {
    if (right.dim() != 2 || !right.is_view()) return nullptr;
    weight = right._base();
    const bool transposed = weight.dim() == 2 && right.size(0) == weight.size(1) && right.size(1) == weight.size(0) &&
                            right.stride(0) == weight.stride(1) && right.stride(1) == weight.stride(0);
    return transposed ? instance().find(weight) : nullptr;
  }
  static at::Tensor matmul(const at::Tensor& left, const at::Tensor& right) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    at::Tensor weight;
    const auto substitute = behind_transpose(right, weight);
    return substitute ? substitute->product(left, weight, {}) : at::matmul(left, right);
  }
  static at::Tensor addmm(const at::Tensor& bias, const at::Tensor& left, const at::Tensor& right,
                          const at::Scalar& beta, const at::Scalar& alpha) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    at::Tensor weight;
    const bool is_linear = bias.dim() == 1 && beta.equal(1) && alpha.equal(1);
    const auto substitute = is_linear ? behind_transpose(right, weight) : nullptr;
    return substitute ? substitute->product(left, weight, bias) : at::addmm(bias, left, right, beta, alpha);
  }
  static at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    const c10::impl::ExcludeDispatchKeyGuard once(key);
    const auto substitute = instance().find(weight);
    return substitute ? substitute->product(input, weight, bias) : at::linear(input, weight, bias);
  }

  static void intercept() {
    static const bool once = [] {
      static torch::Library others(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
      others.fallback(torch::CppFunction::makeFallthrough());
      static torch::Library operators(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
      operators.impl("matmul", &LinearSubstitutes::matmul);
      operators.impl("addmm", &LinearSubstitutes::addmm);
      operators.impl("linear", &LinearSubstitutes::linear);
      return true;
    }();
    static_cast<void>(once);
  }

  friend class SubstitutedLinears;
  mutable std::shared_mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, std::weak_ptr<LinearSubstitute>> by_weight_;
};

inline LinearSubstitute::~LinearSubstitute() {
  if (weight_ != nullptr) LinearSubstitutes::instance().remove(weight_);
}

/// While alive, layers with a substitute are computed by it, on this thread. May be nested.
class SubstitutedLinears {
 public:
  SubstitutedLinears() : included_(intercepted()) {}

 private:
  static c10::DispatchKey intercepted() {
    LinearSubstitutes::intercept();  // without kernels, the key would stop every operator
    return LinearSubstitutes::key;
  }
  c10::impl::IncludeDispatchKeyGuard included_;
};

namespace detail {

/// A linear layer with its name in the module; empty for the module itself.
struct NamedLinear {
  std::string name;
  torch::nn::LinearImpl* layer = nullptr;
};

/// All linear layers of a module, itself included.
[[nodiscard]] inline std::vector<NamedLinear> linears_of(torch::nn::Module& module) {
  std::vector<NamedLinear> linears;
  if (auto* itself = dynamic_cast<torch::nn::LinearImpl*>(&module)) linears.push_back({"", itself});
  // Without itself: LibTorch gives that only of modules that a shared_ptr holds.
  for (const auto& item : module.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    if (auto* layer = dynamic_cast<torch::nn::LinearImpl*>(item.value().get())) linears.push_back({item.key(), layer});
  }
  return linears;
}

/// Does the name begin with one of the ignored ones, as Lightning compares them?
[[nodiscard]] inline bool is_ignored(const std::string& name, const std::vector<std::string>& ignored) {
  return std::any_of(ignored.begin(), ignored.end(),
                     [&](const std::string& prefix) { return name.compare(0, prefix.size(), prefix) == 0; });
}

/// The ignored names with which no layer's name begins: misspelt, or of another module.
[[nodiscard]] inline std::vector<std::string> ignored_in_vain(const std::vector<NamedLinear>& linears,
                                                              const std::vector<std::string>& ignored) {
  std::vector<std::string> vain;
  for (const std::string& prefix : ignored) {
    if (std::none_of(linears.begin(), linears.end(),
                     [&](const NamedLinear& linear) { return is_ignored(linear.name, {prefix}); })) {
      vain.push_back(prefix);
    }
  }
  return vain;
}

/// Brings parameters and floating-point buffers to `dtype`, but for what substitutes need exact.
inline void convert_floats(torch::nn::Module& module, at::ScalarType dtype) {
  std::unordered_set<const c10::TensorImpl*> exact;
  for (const auto& child : module.modules(/*include_self=*/false)) {
    if (const auto* substitute = dynamic_cast<const LinearSubstitute*>(child.get())) {
      for (const at::Tensor& tensor : substitute->exact()) exact.insert(tensor.unsafeGetTensorImpl());
    }
  }
  const auto convert = [&](std::vector<at::Tensor> tensors) {
    for (at::Tensor& tensor : tensors) {
      if (tensor.is_floating_point() && !exact.contains(tensor.unsafeGetTensorImpl())) {
        tensor.set_data(tensor.to(dtype));
      }
    }
  };
  const at::NoGradGuard no_grad;
  convert(module.parameters());
  convert(module.buffers());
}

/// Names and what else there is to say of them, for one line on standard error.
[[nodiscard]] inline std::string joined(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ", ") + item;
  return text;
}

inline void note(const std::string& text) { std::fprintf(stderr, "fabric: %s\n", text.c_str()); }

}  // namespace detail
}  // namespace fabric
