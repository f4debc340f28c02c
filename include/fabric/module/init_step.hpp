// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>
#include <torch/types.h>

#include "fabric/error.hpp"

namespace fabric::detail {

/// A tensor's place in one of the memories on a tape, which are numbered.
struct TapePlace {
  std::size_t memory = 0;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t offset = 0;
  at::ScalarType dtype = at::kFloat;
};

/// An argument of an operator on a tape: tensors by their places, or as they are if they were made outside.
struct TapeArgument {
  enum class Kind : std::uint8_t { value, tensor, tensors, optional_tensors };
  Kind kind = Kind::value;
  c10::IValue value;                             // of Kind::value
  std::vector<at::Tensor> outside;               // one for each tensor; undefined for those on the tape
  std::vector<int64_t> versions;                 // of those
  std::vector<std::optional<TapePlace>> places;  // one for each tensor
};

/// An operator on a tape, or one of the two other things that change values while a module is made.
struct TapeStep {
  std::optional<c10::OperatorHandle> op{};
  std::vector<TapeArgument> arguments{};
  std::vector<std::vector<std::optional<TapePlace>>> results{};  // tensors of each result
  std::vector<std::size_t> memories{};                           // that it reads, writes or makes, each once
  std::vector<std::size_t> written{};                            // those of them that it writes or makes
  std::optional<std::size_t> overwrites{};                       // the one of them whose former values it does not need
  bool in_order = false;  // must neither precede nor follow another such one: it draws random numbers
  caffe2::TypeMeta default_dtype{};
  at::Tensor generator_state{};  // without an operator: the default generator was put into this state
  at::Tensor bytes{};            // without an operator: the program wrote these into the memory itself
};

/// What can be told of an operator by its name and schema.
namespace tape_operator {

[[nodiscard]] inline std::string_view base_name(const c10::OperatorHandle& op) {
  std::string_view name = op.operator_name().name;
  const auto at = name.rfind("::");
  return at == std::string_view::npos ? name : name.substr(at + 2);
}
[[nodiscard]] inline bool is_atens(const c10::OperatorHandle& op) {
  return op.operator_name().name.compare(0, 6, "aten::") == 0;
}
[[nodiscard]] inline bool draws_random_numbers(const c10::OperatorHandle& op) {
  if (!is_atens(op) || op.hasTag(at::Tag::nondeterministic_seeded)) return true;
  const auto& arguments = op.schema().arguments();
  return std::any_of(arguments.begin(), arguments.end(),
                     [](const c10::Argument& a) { return a.name() == "generator"; });
}
[[nodiscard]] inline bool writes(const c10::OperatorHandle& op, std::size_t argument) {
  const auto* alias = op.schema().arguments()[argument].alias_info();
  return alias != nullptr && alias->isWrite();
}
/// Makes tensors without values.
[[nodiscard]] inline bool makes_empty(const c10::OperatorHandle& op) {
  constexpr std::array<std::string_view, 6> names{"empty",     "empty_strided",     "empty_like",
                                                  "new_empty", "new_empty_strided", "empty_permuted"};
  return is_atens(op) && std::find(names.begin(), names.end(), base_name(op)) != names.end();
}
/// Makes a tensor like another one that becomes the module's own.
[[nodiscard]] inline bool makes_from(const c10::OperatorHandle& op) {
  const std::string_view name = base_name(op);
  return name == "clone" || name.substr(0, 4) == "new_" || (name.size() > 5 && name.substr(name.size() - 5) == "_like");
}
/// Needs nothing of the former values of what it writes, if it writes all of them.
[[nodiscard]] inline bool overwrites_all(const c10::OperatorHandle& op) {
  constexpr std::array<std::string_view, 11> names{"uniform_",    "normal_",    "fill_",        "zero_",
                                                   "copy_",       "random_",    "exponential_", "cauchy_",
                                                   "log_normal_", "geometric_", "bernoulli_"};
  return is_atens(op) && std::find(names.begin(), names.end(), base_name(op)) != names.end();
}

[[noreturn]] inline void refuse(const c10::OperatorHandle& op, const std::string& why) {
  throw Error("fabric: deferred_init: " + c10::toString(op.operator_name()) + " " + why);
}

[[nodiscard]] inline bool writes_any(const c10::OperatorHandle& op) {
  for (std::size_t i = 0; i < op.schema().arguments().size(); ++i) {
    if (writes(op, i)) return true;
  }
  return false;
}

}  // namespace tape_operator

template <class Visit>
void for_each_tensor(const c10::IValue& value, Visit&& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      if (tensor && tensor->defined()) visit(*tensor);
    }
  }
}

/// How often a tensor was changed in place, if that is counted.
[[nodiscard]] inline int64_t version_of(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_inference() ? static_cast<int64_t>(tensor._version()) : 0;
}

/// The argument with meta tensors in place of those from outside.
[[nodiscard]] inline c10::IValue shadow(const c10::IValue& value) {
  const auto of = [](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_meta()) return tensor;
    at::Tensor meta = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) meta.unsafeGetTensorImpl()->set_wrapped_number(true);
    return meta;
  };
  if (value.isTensor()) return of(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(of(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      tensors.push_back(tensor ? std::optional<at::Tensor>(of(*tensor)) : std::nullopt);
    }
    return tensors;
  }
  return value;
}

/// Of the CPU's default generator.
[[nodiscard]] inline at::Tensor generator_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::scoped_lock lock(generator.mutex());
  return generator.get_state();
}

}  // namespace fabric::detail
