// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include "fabric/comm/agreement.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/module_patterns.hpp"
#include "fabric/shard/tensor_operators.hpp"
#include "fabric/shard/tensor_slice.hpp"

namespace fabric {

/// Divides what a layer gives out: rows of a Linear's weight, and its bias; columns of an Embedding's. Takes the whole
/// input, the same on all ranks.
struct Colwise {
  /// Give out the whole, on all ranks, instead of this rank's part of the last dimension. A bias then stays whole.
  bool gather_output = false;
};

/// Divides what a layer takes in: columns of a Linear's weight, whose bias stays whole; rows of an Embedding's, which
/// are the vocabulary. Gives out the whole, summed over the ranks.
struct Rowwise {
  /// Linear: take the whole input, the same on all ranks, instead of this rank's part of the last dimension.
  bool split_input = false;
};

/// How the layers of a module are divided, by their names: `{{"blocks.*.mlp.up", Colwise{}}, {"blocks.*.mlp.down",
/// Rowwise{}}}`. A * stands for any letters of one component of a name; the empty name is the module itself.
struct TensorParallelPlan {
  /// How a layer is divided.
  using Style = std::variant<Colwise, Rowwise>;
  /// The layers of one pattern.
  struct Entry {
    std::string pattern;  ///< Of names in the module; `*` stands for any letters of one component.
    Style style;
  };

  /// A plan that divides nothing.
  TensorParallelPlan() = default;
  TensorParallelPlan(std::initializer_list<Entry> list) : entries(list) {}

  std::vector<Entry> entries;  ///< In the order of the program; each layer is named once at most.
};

namespace detail {

/// Checks a plan against a module and, if nothing is wrong, divides it.
class TensorParallelizer {
 public:
  TensorParallelizer(torch::nn::Module& module, const World& tensor) : module_(module), tensor_(tensor) {
    names_.emplace_back();
    modules_.push_back(&module);
    for (const auto& item : module.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
      names_.push_back(item.key());
      modules_.push_back(item.value().get());
    }
  }

  void read(const TensorParallelPlan& plan) {
    std::vector<const TensorParallelPlan::Entry*> by_module(modules_.size(), nullptr);
    for (const auto& entry : plan.entries) {
      bool found = false;
      for (std::size_t i = 0; i < modules_.size(); ++i) {
        if (!matches_module(entry.pattern, names_[i])) continue;
        found = true;
        if (by_module[i] != nullptr) {
          problem("'" + names_[i] + "' is named twice, by '" + by_module[i]->pattern + "' and '" + entry.pattern + "'");
          continue;
        }
        by_module[i] = &entry;
        plan_layer(i, entry);
      }
      if (!found) problem("'" + entry.pattern + "' is the name of no module: " + why_no_match(entry.pattern, names_));
    }
    check_shared();
    if (problems_.empty()) return;
    std::string text = "fabric: parallelize_module: ";
    if (problems_.size() == 1) throw Error(text + problems_[0]);
    text += std::to_string(problems_.size()) + " problems:";
    for (const std::string& one : problems_) text += "\n  " + one;
    throw Error(text);
  }

  /// Makes parameters and buffers those of the group's rank 0, which the slices are then cut from.
  void share() {
    std::vector<std::string> description;
    std::vector<at::Tensor> tensors;
    std::vector<at::Tensor> elsewhere;  // than the group's device
    const auto add = [&](const std::string& name, const at::Tensor& tensor) {
      const Part* part = find(tensor);
      std::ostringstream text;
      text << name << ": " << at::toString(tensor.scalar_type()) << ' ' << tensor.sizes();
      if (part != nullptr) text << ", divided along dimension " << part->dim << part->options();
      description.push_back(text.str());
      if (tensor.is_meta()) return;
      (tensor.device().type() == tensor_.device.type() ? tensors : elsewhere).push_back(tensor.detach());
    };
    std::unordered_set<const c10::TensorImpl*> registered;
    for (const auto& [name, parameter] : parameters_of(module_)) {
      add(name, parameter);
      registered.insert(parameter.unsafeGetTensorImpl());
    }
    for (const Part& part : parts_) {  // a layer may have been given a weight without that being registered
      if (!registered.contains(part.parameter.unsafeGetTensorImpl())) add(part.layer, part.parameter);
    }
    for (const auto& buffer : module_.named_buffers()) add(buffer.key(), buffer.value());
    require_agreement(tensor_, "parallelize_module", description);
    broadcast_in_place(tensor_.group, tensors);
    for (at::Tensor& tensor : elsewhere) tensor.copy_(broadcast(tensor_, tensor, 0));
  }

  void divide() {
    for (Part& part : parts_) {
      const at::NoGradGuard no_grad;
      auto known = std::make_shared<SlicedParameter>();
      known->slice = {.name = part.layer,
                      .parameter = {},
                      .dim = part.dim,
                      .index = tensor_.global_rank,
                      .count = tensor_.size,
                      .full_sizes = part.parameter.sizes().vec(),
                      .tensor = tensor_};
      known->linear = part.linear;
      known->embedding = part.embedding;
      const at::Tensor own = own_part(known->slice, part.parameter.detach());
      part.parameter.mutable_grad().reset();
      part.parameter.set_data(own.clone(at::MemoryFormat::Contiguous));
      SlicedParameters::instance().add(part.parameter, known);
      TensorOperators::intercept(part.parameter);
      part.known = std::move(known);
    }
    for (torch::nn::Module* layer : layers_) {
      // LibTorch's check of it is for the whole vocabulary; the operator has it from the slice.
      if (auto* embedding = dynamic_cast<torch::nn::EmbeddingImpl*>(layer)) {
        embedding->options.padding_idx(std::nullopt);
      }
      const auto mark = std::make_shared<Mark>();
      for (const auto& named : own_parameters(*layer)) {
        if (const Part* part = find(named.second)) mark->known.push_back(part->known);
      }
      layer->register_module("tensor_slice", mark);
    }
  }

 private:
  /// A child of each divided layer. It keeps what is known of the layer's parameters, and makes LibTorch refuse to
  /// clone the layer: a clone would take a slice for the whole.
  struct Mark : torch::nn::Module {
    Mark() : Module("TensorSlice") {}
    std::vector<std::shared_ptr<const SlicedParameter>> known;
  };

  /// A parameter that is to be divided.
  struct Part {
    at::Tensor parameter;
    std::string layer;
    std::int64_t dim = 0;
    std::optional<LinearOperator> linear{};
    std::optional<EmbeddingOperator> embedding{};
    std::shared_ptr<const SlicedParameter> known{};

    [[nodiscard]] std::string options() const {
      return (linear && linear->split_input)                                                ? " with split_input"
             : (linear && linear->gather_output) || (embedding && embedding->gather_output) ? " with gather_output"
                                                                                            : "";
    }
  };

  void problem(std::string text) { problems_.push_back(std::move(text)); }

  void plan_layer(std::size_t i, const TensorParallelPlan::Entry& entry) {
    const std::string& name = names_[i];
    const bool rowwise = std::holds_alternative<Rowwise>(entry.style);
    const bool gathers = !rowwise && std::get<Colwise>(entry.style).gather_output;
    const bool splits = rowwise && std::get<Rowwise>(entry.style).split_input;
    const std::string style = rowwise ? "Rowwise" : "Colwise";
    const std::size_t before = problems_.size();
    if (auto* linear = dynamic_cast<torch::nn::LinearImpl*>(modules_[i])) {
      if (linear->weight.dim() != 2 || linear->weight.size(0) != linear->options.out_features() ||
          linear->weight.size(1) != linear->options.in_features()) {
        problem(refused_sizes(name, linear->weight));
        return;
      }
      check_size(name + "' (Linear, " + style, rowwise ? "in_features" : "out_features",
                 linear->weight.size(rowwise ? 1 : 0));
      if (problems_.size() > before) return;
      const LinearOperator how{rowwise, gathers, splits};
      if (Part* part = part_of(linear->weight, name, rowwise ? 1 : 0); part != nullptr) {
        if (part->linear && *part->linear != how) {
          problem("'" + name + "' shares its weight with '" + part->layer +
                  "', which has other options: give both the same");
        }
        part->linear = how;
      }
      if (!rowwise && !gathers && linear->bias.defined()) part_of(linear->bias, name, 0);
    } else if (auto* embedding = dynamic_cast<torch::nn::EmbeddingImpl*>(modules_[i])) {
      const auto& options = embedding->options;
      const std::string who = name + "' (Embedding, " + style;
      if (embedding->weight.dim() != 2 || embedding->weight.size(0) != options.num_embeddings() ||
          embedding->weight.size(1) != options.embedding_dim()) {
        problem(refused_sizes(name, embedding->weight));
        return;
      }
      check_size(who, rowwise ? "num_embeddings" : "embedding_dim", embedding->weight.size(rowwise ? 0 : 1));
      if (options.max_norm()) {
        problem("'" + who + ") has max_norm, which needs whole rows: leave it out of the plan, or build it without");
      }
      if (rowwise && options.scale_grad_by_freq()) {
        problem("'" + who + ") has scale_grad_by_freq, which counts words that are elsewhere: use Colwise");
      }
      if (splits) problem("'" + who + ") has split_input: its input is indices, which are whole; leave the option out");
      if (problems_.size() > before) return;
      const EmbeddingOperator how{rowwise, gathers, options.padding_idx().value_or(-1)};
      if (Part* part = part_of(embedding->weight, name, rowwise ? 0 : 1); part != nullptr) {
        if (part->embedding && *part->embedding != how) {
          problem("'" + name + "' shares its weight with '" + part->layer +
                  "', which has other options: give both the same");
        }
        part->embedding = how;
      }
    } else {
      std::string text = "'" + name + "' is a " + modules_[i]->name() + "; Linear and Embedding can be divided";
      std::string inside;
      for (std::size_t j = 0; j < names_.size(); ++j) {
        const bool within = name.empty() ? j > 0 : names_[j].compare(0, name.size() + 1, name + ".") == 0;
        if (within && is_layer(j)) inside += (inside.empty() ? "" : ", ") + names_[j];
      }
      problem(text + (inside.empty() ? "" : ". It has " + inside));
      return;
    }
    layers_.push_back(modules_[i]);
  }

  [[nodiscard]] bool is_layer(std::size_t i) const {
    return dynamic_cast<const torch::nn::LinearImpl*>(modules_[i]) != nullptr ||
           dynamic_cast<const torch::nn::EmbeddingImpl*>(modules_[i]) != nullptr;
  }

  /// Of a weight whose sizes are not those that its layer was built with.
  [[nodiscard]] static std::string refused_sizes(const std::string& name, const at::Tensor& weight) {
    if (SlicedParameters::instance().find(weight))
      return "'" + name + "' is divided already: a module is parallelized once";
    return "'" + name +
           "' has a weight that is not of the layer's sizes: parallelize a module before anything else changes it";
  }

  void check_size(const std::string& who, const char* what, std::int64_t size) {
    if (size % tensor_.size == 0) return;
    const auto next = (size / tensor_.size + 1) * tensor_.size;
    problem("'" + who + ") has " + what + " = " + std::to_string(size) + ", which " + std::to_string(tensor_.size) +
            " ranks cannot share evenly; the next that they can is " + std::to_string(next));
  }

  Part* part_of(const at::Tensor& parameter, const std::string& layer, std::int64_t dim) {
    Part* const found = find(parameter);
    if (found == nullptr) return &parts_.emplace_back(Part{parameter, layer, dim});
    if (found->dim != dim) {
      problem("'" + layer + "' shares a parameter with '" + found->layer +
              "' and divides it along the other dimension. A Colwise Linear goes with a Rowwise Embedding, and the "
              "other way round");
      return nullptr;
    }
    return found;
  }
  [[nodiscard]] Part* find(const at::Tensor& parameter) {
    const auto found =
        std::find_if(parts_.begin(), parts_.end(), [&](const Part& part) { return part.parameter.is_same(parameter); });
    return found == parts_.end() ? nullptr : &*found;
  }

  /// A parameter that is divided for one module is divided for all that have it.
  void check_shared() {
    for (std::size_t i = 0; i < modules_.size(); ++i) {
      if (std::find(layers_.begin(), layers_.end(), modules_[i]) != layers_.end()) continue;
      for (const auto& [name, parameter] : own_parameters(*modules_[i])) {
        const Part* const found = find(parameter);
        if (found == nullptr) continue;
        problem("'" + (names_[i].empty() ? "" : names_[i] + ".") + name + "' is also a parameter of '" + found->layer +
                "', which is to be divided: name both in the plan, or neither");
      }
    }
  }
  /// What the module itself has. A layer may have been given another's weight without that being registered.
  [[nodiscard]] static NamedParameters own_parameters(const torch::nn::Module& module) {
    if (const auto* linear = dynamic_cast<const torch::nn::LinearImpl*>(&module)) {
      if (!linear->bias.defined()) return {{"weight", linear->weight}};
      return {{"weight", linear->weight}, {"bias", linear->bias}};
    }
    if (const auto* embedding = dynamic_cast<const torch::nn::EmbeddingImpl*>(&module)) {
      return {{"weight", embedding->weight}};
    }
    NamedParameters named;
    for (const auto& item : module.named_parameters(/*recurse=*/false)) named.emplace_back(item.key(), item.value());
    return named;
  }

  torch::nn::Module& module_;
  World tensor_;
  std::vector<std::string> names_;
  std::vector<torch::nn::Module*> modules_;
  std::vector<torch::nn::Module*> layers_;  // that the plan names
  std::vector<Part> parts_;                 // in the same order on all ranks
  std::vector<std::string> problems_;
};

}  // namespace detail

/// Divides a module over the ranks of a tensor group (`DeviceMesh::tensor`), each of which calls this. The layers that
/// the plan names keep this rank's part of their parameters, which stay the same tensors with other sizes; what they
/// compute, and their gradients, are as before, forward and backward communicating where that takes all ranks. All
/// parameters and buffers become those of the group's rank 0. Comes before anything that depends on the parameters'
/// sizes: an optimizer's steps, a strategy. docs/tensor_parallel.md says what models must look like.
///
/// Throws fabric::Error with everything that is wrong with the plan, and then has changed nothing.
inline void parallelize_module(torch::nn::Module& module, const World& tensor, const TensorParallelPlan& plan) {
  detail::TensorParallelizer parallelizer(module, tensor);
  parallelizer.read(plan);
  if (tensor.size < 2) return;
  parallelizer.share();
  parallelizer.divide();
}

}  // namespace fabric
