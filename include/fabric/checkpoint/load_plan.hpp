// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <torch/types.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/stored_tensors.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// What loading a checkpoint is going to do. While the plan is made, everything is checked and nothing is changed; all
/// problems are collected.
class LoadPlan {
 public:
  LoadPlan(const World& world, bool strict) : world_(world), strict_(strict) {}

  [[nodiscard]] const World& world() const { return world_; }
  [[nodiscard]] bool strict() const { return strict_; }

  /// What is known about the program's tensors.
  [[nodiscard]] Spread& spread() { return spread_; }
  /// Where the checkpoint's tensors are that are not in memory.
  void set_stored(std::shared_ptr<const StoredTensors> stored) { stored_ = std::move(stored); }

  /// `target` will be `source`, which has its sizes. Throws DamagedCheckpoint if that cannot be read.
  void fill(const at::Tensor& target, const at::Tensor& source) {
    if (!is_stored(source)) {
      return change([target, source]() mutable { target.copy_(source); });
    }
    const Box all = Box::whole(source.sizes());
    stored_->check(source, all);
    change([stored = stored_, target, source, all] { stored->read(source, all, target); });
  }
  /// `target` (n) will be the elements of `source` that are in the boxes, one box after the other.
  void fill_boxes(const at::Tensor& target, const at::Tensor& source, const std::vector<Box>& boxes) {
    for_each_box(target, boxes, [&](const at::Tensor& part, const Box& box) {
      if (is_stored(source)) {
        stored_->check(source, box);
        change([stored = stored_, part, source, box] { stored->read(source, box, part); });
      } else {
        change([part, source, box] { part.copy_(part_of(source, Box::whole(source.sizes()), box)); });
      }
    });
  }
  /// The same as a tensor of its own, now.
  [[nodiscard]] at::Tensor read_boxes(const at::Tensor& source, const std::vector<Box>& boxes) const {
    std::int64_t all = 0;
    for (const Box& box : boxes) all += box.numel();
    at::Tensor range = at::empty({all}, source.options().device(at::kCPU));
    for_each_box(range, boxes, [&](const at::Tensor& part, const Box& box) {
      if (is_stored(source)) {
        stored_->check(source, box);
        stored_->read(source, box, part);
      } else {
        part.copy_(part_of(source, Box::whole(source.sizes()), box));
      }
    });
    return range;
  }
  /// A value with all its tensors in memory.
  [[nodiscard]] Value whole(const Value& value) const {
    if (!stored_) return value;
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && is_stored(*tensor)) {
      const Box all = Box::whole(tensor->sizes());
      at::Tensor read = at::empty(tensor->sizes(), tensor->options().device(at::kCPU));
      stored_->check(*tensor, all);
      stored_->read(*tensor, all, read);
      return read;
    }
    if (const auto* list = std::get_if<List>(&value.data())) {
      List read{{}, list->is_tuple};
      for (const Value& item : list->items) read.items.push_back(whole(item));
      return read;
    }
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      Dict read;
      for (const auto& [key, inner] : *dict) read[key] = whole(inner);
      return read;
    }
    return value;
  }

  /// The checkpoint cannot be loaded; `text` begins with the key.
  void problem(std::string text) { problems_.push_back(std::move(text)); }
  /// The program has this and the checkpoint has not: a problem if the plan is strict.
  void missing(std::string key) { missing_.push_back(std::move(key)); }
  /// The other way round.
  void unexpected(std::string key) { unexpected_.push_back(std::move(key)); }

  /// A change that cannot fail.
  void change(std::function<void()> change) { changes_.push_back(std::move(change)); }
  /// A change by an object's own `load`, which may throw. It then has changed nothing, and what others loaded before is
  /// taken back by what their `remember` returned.
  void load(std::function<void()> load, std::function<std::function<void()>()> remember) {
    loads_.push_back({std::move(load), std::move(remember)});
  }

  [[nodiscard]] const std::vector<std::string>& missing() const { return missing_; }
  [[nodiscard]] const std::vector<std::string>& unexpected() const { return unexpected_; }

  /// Every problem, the first keys of each kind by name; empty if there is none.
  [[nodiscard]] std::string problems() const {
    std::string text;
    const auto add = [&text](const std::string& part) { text += (text.empty() ? "" : "; ") + part; };
    if (strict_ && !missing_.empty()) add("it does not have " + first_of(missing_));
    if (strict_ && !unexpected_.empty()) add("it has, and the program has not, " + first_of(unexpected_));
    for (std::size_t i = 0; i < problems_.size() && i < shown; ++i) add(problems_[i]);
    if (problems_.size() > shown) add("and " + std::to_string(problems_.size() - shown) + " more of this kind");
    return text;
  }

  /// Does it. `between` is called when the loads that may throw are done and before the changes that cannot: if it
  /// throws, because another rank's load did, or if a load throws, everything is as before.
  template <class Between>
  void run(const Between& between) {
    std::vector<std::function<void()>> undo;
    std::exception_ptr error;
    try {
      for (std::size_t i = 0; i < loads_.size(); ++i) {
        if (world_.size > 1 || i + 1 < loads_.size()) undo.push_back(loads_[i].remember());
        loads_[i].load();
      }
    } catch (...) {
      error = std::current_exception();
    }
    try {
      between(error);
    } catch (...) {
      for (std::size_t i = undo.size(); i-- > 0;) undo[i]();
      throw;
    }
    const at::NoGradGuard no_grad;
    for (const auto& change : changes_) change();
  }

 private:
  static constexpr std::size_t shown = 5;
  struct Load {
    std::function<void()> load;
    std::function<std::function<void()>()> remember;
  };

  [[nodiscard]] bool is_stored(const at::Tensor& tensor) const { return stored_ != nullptr && tensor.is_meta(); }
  static std::string first_of(const std::vector<std::string>& keys) {
    std::string text;
    for (std::size_t i = 0; i < keys.size() && i < shown; ++i) text += (i == 0 ? "'" : ", '") + keys[i] + "'";
    if (keys.size() > shown) text += " and " + std::to_string(keys.size() - shown) + " more";
    return text;
  }

  const World& world_;
  bool strict_;
  Spread spread_;
  std::shared_ptr<const StoredTensors> stored_;
  std::vector<std::string> problems_;
  std::vector<std::string> missing_;
  std::vector<std::string> unexpected_;
  std::vector<std::function<void()>> changes_;
  std::vector<Load> loads_;
};

namespace detail {

[[nodiscard]] inline std::string shape_text(const at::Tensor& tensor) {
  std::ostringstream text;
  text << at::toString(tensor.scalar_type()) << ' ' << tensor.sizes();
  return text.str();
}

/// Does `value` hold a tensor of the shape and dtype of `own`? If not, that is a problem of the plan. Unless the plan
/// is strict, floating-point numbers may be of another dtype: they are converted.
inline bool check_tensor(const at::Tensor& own, const Value& value, const std::string& key, LoadPlan& plan) {
  const auto* tensor = std::get_if<at::Tensor>(&value.data());
  if (tensor == nullptr) {
    plan.problem("'" + key + "' is " + std::string(value.kind()) + " in it, and a tensor here");
    return false;
  }
  const bool converts = !plan.strict() && tensor->is_floating_point() && own.is_floating_point();
  if (tensor->sizes() == own.sizes() && (converts || tensor->scalar_type() == own.scalar_type())) return true;
  plan.problem("'" + key + "' is " + shape_text(*tensor) + " in it, and " + shape_text(own) + " here");
  return false;
}

/// Copies of all tensors of a tree, in memory of the processor. Tensors that share a storage still do.
class DeepCopy {
 public:
  [[nodiscard]] Value copy(const Value& value) {
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data())) return copy(*tensor);
    if (const auto* list = std::get_if<List>(&value.data())) {
      List copied{{}, list->is_tuple};
      for (const Value& item : list->items) copied.items.push_back(copy(item));
      return copied;
    }
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      Dict copied;
      for (const auto& [key, inner] : *dict) copied[key] = copy(inner);
      return copied;
    }
    return value;
  }

 private:
  at::Tensor copy(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return tensor;
    const at::NoGradGuard no_grad;
    auto& bytes = copies_[tensor.storage().unsafeGetStorageImpl()];
    if (!bytes.defined()) {
      const auto options = at::TensorOptions(at::kByte).device(tensor.device());
      const at::Tensor all = at::empty({0}, options).set_(tensor.storage());
      bytes = all.is_cpu() ? all.clone() : all.cpu();
    }
    return at::empty({0}, at::TensorOptions(tensor.scalar_type()))
        .set_(bytes.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  }

  std::unordered_map<const c10::StorageImpl*, at::Tensor> copies_;
};

}  // namespace detail
}  // namespace fabric
