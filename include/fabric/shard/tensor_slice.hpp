// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/module/parameters.hpp"

namespace fabric {

/// Which part of a parameter this rank of a tensor group holds: of `count` equal parts along `dim`, the one at `index`.
struct TensorSlice {
  std::string name;      ///< In the module that was asked.
  at::Tensor parameter;  ///< The module's own, whose sizes are the part's.
  std::int64_t dim = 0;
  std::int64_t index = 0;
  std::int64_t count = 1;
  std::vector<std::int64_t> full_sizes;  ///< Of the whole parameter.
  World tensor;                          ///< The ranks that hold the parts, in their order.
};

namespace detail {

/// How the operators of a layer are computed on a slice of its weight.
struct LinearOperator {
  bool rowwise = false;  ///< The weight's columns are divided: the product is a sum over the ranks.
  bool gather_output = false;
  bool split_input = false;
  friend bool operator==(const LinearOperator&, const LinearOperator&) = default;
};
struct EmbeddingOperator {
  bool rowwise = false;  ///< The vocabulary is divided.
  bool gather_output = false;
  std::int64_t padding_index = -1;  ///< In the whole vocabulary; -1 for none.
  friend bool operator==(const EmbeddingOperator&, const EmbeddingOperator&) = default;
};

/// What is known of a parameter that holds a slice. A weight may serve a linear layer and an embedding (tied weights).
struct SlicedParameter {
  TensorSlice slice;  ///< Named after the first layer that has it; without the tensor, which it must not keep alive.
  std::optional<LinearOperator> linear{};
  std::optional<EmbeddingOperator> embedding{};
};

/// The sliced parameters of this process. They are found by their TensorImpls, which stay the same when a strategy
/// moves their storages. What is known of one lives as long as its layers, so that nothing here keeps a process group
/// until the program's end. Thread-safe.
class SlicedParameters {
 public:
  [[nodiscard]] static SlicedParameters& instance() {
    static SlicedParameters parameters;
    return parameters;
  }

  void add(const at::Tensor& parameter, const std::shared_ptr<const SlicedParameter>& known) {
    const std::unique_lock lock(mutex_);
    std::erase_if(by_tensor_, [](const auto& entry) { return entry.second.known.expired(); });
    by_tensor_.insert_or_assign(parameter.unsafeGetTensorImpl(),
                                Entry{c10::weak_intrusive_ptr<c10::TensorImpl>(parameter.getIntrusivePtr()), known});
  }

  /// Null if the tensor is no sliced parameter.
  [[nodiscard]] std::shared_ptr<const SlicedParameter> find(const at::Tensor& parameter) const {
    const std::shared_lock lock(mutex_);
    const auto found = by_tensor_.find(parameter.unsafeGetTensorImpl());
    return found == by_tensor_.end() ? nullptr : found->second.known.lock();
  }

  /// The sliced parameter of which `right` is the transpose, now: autograd does not know of what a view is one if its
  /// base is itself a view, or in inference mode.
  [[nodiscard]] std::shared_ptr<const SlicedParameter> find_transposed(const at::Tensor& right) const {
    const std::shared_lock lock(mutex_);
    for (const auto& [tensor, entry] : by_tensor_) {
      const auto parameter = entry.alive.lock();
      if (parameter && parameter->has_storage() && parameter->dim() == 2 &&
          parameter->unsafe_storage().is_alias_of(right.storage()) &&
          parameter->storage_offset() == right.storage_offset() && parameter->size(0) == right.size(1) &&
          parameter->size(1) == right.size(0) && parameter->stride(0) == right.stride(1) &&
          parameter->stride(1) == right.stride(0)) {
        return entry.known.lock();
      }
    }
    return nullptr;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::TensorImpl> alive;  // keeps the address from being given to another tensor
    std::weak_ptr<const SlicedParameter> known;
  };

  SlicedParameters() = default;
  mutable std::shared_mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Entry> by_tensor_;
};

}  // namespace detail

/// Which part of a parameter this rank holds; nothing if it holds all of it.
[[nodiscard]] inline std::optional<TensorSlice> tensor_slice_of(const at::Tensor& parameter) {
  const auto known = detail::SlicedParameters::instance().find(parameter);
  if (!known) return {};
  TensorSlice slice = known->slice;
  slice.parameter = parameter;
  return slice;
}

/// The parameters of a module of which this rank holds a part, each once. What is not among them is whole, and has the
/// same values and gradients on all ranks of the tensor group.
[[nodiscard]] inline std::vector<TensorSlice> tensor_slices(const torch::nn::Module& module) {
  std::vector<TensorSlice> slices;
  for (const auto& [name, parameter] : parameters_of(module)) {
    if (auto slice = tensor_slice_of(parameter)) {
      slice->name = name;
      slices.push_back(*std::move(slice));
    }
  }
  return slices;
}

/// The whole of what the ranks hold parts of: the parameter's values, or `part`, a tensor of its sizes (a gradient, an
/// optimizer's state). All ranks of the tensor group call this, and all get it.
[[nodiscard]] inline at::Tensor full_tensor(const TensorSlice& slice, const at::Tensor& part) {
  return at::cat(all_gather(slice.tensor, part.detach()).unbind(0), slice.dim);
}
[[nodiscard]] inline at::Tensor full_tensor(const TensorSlice& slice) { return full_tensor(slice, slice.parameter); }

/// This rank's part of a tensor that has the whole parameter's sizes, as a view.
[[nodiscard]] inline at::Tensor own_part(const TensorSlice& slice, const at::Tensor& full) {
  return full.chunk(slice.count, slice.dim)[static_cast<std::size_t>(slice.index)];
}

}  // namespace fabric
