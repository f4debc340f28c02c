// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/shard.hpp"
#include "fabric/shard/tensor_slice.hpp"

namespace fabric {

/// A module that `setup` has divided among the ranks: its state tells this rank's parts of the parameters, and wants to
/// know when they have changed.
template <class T>
concept WrapsShards = requires(const T& wrapper) {
  { *wrapper.state()->shards().begin() } -> std::convertible_to<Shard>;
  wrapper.state()->changed();
};

/// What is known about tensors while a checkpoint is saved or loaded: the names of parameters, and which part of a
/// parameter is here. In a tree that is saved, a tensor without memory (on the meta device) stands for one that is
/// spread over the ranks.
class Spread {
 public:
  /// What a parameter of an optimizer is.
  struct Parameter {
    std::string module;                 ///< The key of its module in the state.
    std::string name;                   ///< In its module.
    const Shard* shard = nullptr;       ///< Null for one that is whole on all ranks.
    bool writes = true;                 ///< False if another rank, which has the same part, saves it.
    std::vector<std::int64_t> sizes{};  ///< Of the whole parameter.
    Box slice{};                        ///< What of it the ranks have that share it: less under tensor parallelism.

    /// Does this rank have the very first element?
    [[nodiscard]] bool has_first() const {
      const bool first_slice =
          std::all_of(slice.offsets.begin(), slice.offsets.end(), [](std::int64_t offset) { return offset == 0; });
      return shard->begin == 0 && shard->end > 0 && first_slice;
    }
    /// Where this rank's elements are in the whole, in their order.
    [[nodiscard]] std::vector<Box> boxes() const { return boxes_of_slice(slice, shard->begin, shard->end); }
  };
  /// This rank's part of a tensor that is spread: the elements [begin, end) of a slice, in row-major order.
  struct Part {
    at::Tensor own;  ///< (end - begin)
    std::int64_t begin = 0;
    std::int64_t end = 0;
    bool writes = true;
    Box slice{};

    [[nodiscard]] std::vector<Box> boxes() const { return boxes_of_slice(slice, begin, end); }
  };

  /// Takes note of a module, which must outlive this.
  void add(const torch::nn::Module& module, const std::string& key) {
    for (const auto& [name, tensor] : parameters_of(module)) {
      parameters_.emplace(tensor.unsafeGetTensorImpl(), Parameter{key, name, nullptr, true, {}, {}});
    }
  }
  /// Takes note of the parts of a sharded module's parameters, which must outlive this.
  template <class Shards>
  void add_shards(const Shards& shards, const std::string& key, bool writes, bool is_first_of_tensor_group = true) {
    has_shards_ = true;
    for (const Shard& shard : shards) {
      Parameter parameter{key, shard.name, &shard, writes};
      if (const auto slice = tensor_slice_of(shard.parameter)) {
        const auto dim = static_cast<std::size_t>(slice->dim);
        parameter.sizes = slice->full_sizes;
        parameter.slice = Box::whole(shard.parameter.sizes());
        parameter.slice.offsets[dim] = slice->index * parameter.slice.sizes[dim];
      } else {
        parameter.sizes = shard.parameter.sizes().vec();
        parameter.slice = Box::whole(parameter.sizes);
        parameter.writes = writes && is_first_of_tensor_group;
      }
      for (const at::Tensor& tensor : {shard.parameter, shard.master}) {
        Parameter& known = parameters_[tensor.unsafeGetTensorImpl()];
        if (known.shard == nullptr || !key.empty()) known = parameter;
      }
    }
  }
  /// The same for what `setup` returned.
  template <class Wrapper>
  void add_state(const Wrapper& state, const std::string& key) {
    if constexpr (requires { state.groups().replicate.global_rank; }) {
      add_shards(state.shards(), key, state.groups().replicate.global_rank == 0,
                 state.groups().tensor.global_rank == 0);
    } else {
      add_shards(state.shards(), key, /*writes=*/true);
    }
    if constexpr (requires { state.converted_buffers(); }) {
      for (const auto& [buffer, dtype] : state.converted_buffers()) dtypes_[buffer.unsafeGetTensorImpl()] = dtype;
    }
  }

  /// Null for a tensor that is no parameter of a known module.
  [[nodiscard]] const Parameter* parameter(const at::Tensor& parameter_or_master) const {
    const auto found = parameters_.find(parameter_or_master.unsafeGetTensorImpl());
    return found == parameters_.end() ? nullptr : &found->second;
  }
  /// Null for a tensor that is whole.
  [[nodiscard]] const Parameter* spread_parameter(const at::Tensor& parameter_or_master) const {
    const Parameter* known = parameter(parameter_or_master);
    return known == nullptr || known->shard == nullptr ? nullptr : known;
  }

  /// A tensor that stands for one of the sizes of a parameter, of which `own` is this rank's part.
  [[nodiscard]] at::Tensor stand_in(const Parameter& parameter, const at::Tensor& own) {
    const Shard& shard = *parameter.shard;
    at::Tensor made = at::empty(parameter.sizes, at::TensorOptions(at::kMeta).dtype(own.scalar_type()));
    parts_[made.unsafeGetTensorImpl()] = {own.detach(), shard.begin, shard.end, parameter.writes, parameter.slice};
    made_.push_back(made);  // so that no other tensor gets its address
    return made;
  }
  /// This rank's part of the tensor that another one stands for; null for a tensor that is whole.
  [[nodiscard]] const Part* part(const at::Tensor& stand_in) const {
    const auto found = parts_.find(stand_in.unsafeGetTensorImpl());
    return found == parts_.end() ? nullptr : &found->second;
  }

  /// A tensor that is whole is saved by this rank, or by another one, instead of by rank 0.
  void set_writes(const at::Tensor& tensor, bool writes) {
    writes_[tensor.unsafeGetTensorImpl()] = writes;
    made_.push_back(tensor);
  }
  [[nodiscard]] bool writes(const at::Tensor& tensor, const World& world) const {
    const auto found = writes_.find(tensor.unsafeGetTensorImpl());
    return found == writes_.end() ? world.is_global_zero() : found->second;
  }
  /// The dtype in which checkpoints have a tensor that is whole, whatever strategy has it in another now.
  [[nodiscard]] at::ScalarType dtype(const at::Tensor& tensor) const {
    const auto found = dtypes_.find(tensor.unsafeGetTensorImpl());
    return found == dtypes_.end() ? tensor.scalar_type() : found->second;
  }
  /// Is there anything that is spread? The same on all ranks.
  [[nodiscard]] bool is_used() const { return has_shards_; }

 private:
  static std::vector<Box> boxes_of_slice(const Box& slice, std::int64_t begin, std::int64_t end) {
    std::vector<Box> boxes = boxes_of_range(slice.sizes, begin, end);
    for (Box& box : boxes) {
      for (std::size_t i = 0; i < box.offsets.size(); ++i) box.offsets[i] += slice.offsets[i];
    }
    return boxes;
  }

  std::unordered_map<const c10::TensorImpl*, Parameter> parameters_;
  std::unordered_map<const c10::TensorImpl*, Part> parts_;
  std::unordered_map<const c10::TensorImpl*, bool> writes_;
  std::unordered_map<const c10::TensorImpl*, at::ScalarType> dtypes_;
  std::vector<at::Tensor> made_;
  bool has_shards_ = false;
};

/// What saving needs to know besides the object.
struct Saving {
  Ranks& ranks;
  Spread& spread;
  bool by_name = false;  ///< An optimizer's parameters have the names that they have in their modules, not numbers.
  bool only_modules = false;  ///< Nothing is saved yet: modules tell `spread` about themselves.
};

}  // namespace fabric
