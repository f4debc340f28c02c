// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>
#include <torch/version.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/state.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/core.hpp"
#include "fabric/error.hpp"
#include "fabric/version.hpp"

namespace fabric {

/// A format of checkpoint files: `write(sink, state, manifest)` brings a tree to a sink of bytes, `read(bytes, path)`
/// checks a whole file and takes it apart. `TorchFile` is one, `SafetensorsFile` another.
template <class Io>
concept CheckpointIo = requires(detail::MemoryFile& sink, const Value& state, const detail::Bytes& bytes) {
  Io::write(sink, state, Dict());
  { Io::read(bytes, std::string()) } -> std::same_as<CheckpointContents>;
};

/// What a load found that it did not load.
struct Loaded {
  Value rest;                           ///< What the checkpoint has beside the names in the state.
  std::vector<std::string> missing;     ///< Keys that only the program has; empty if strict.
  std::vector<std::string> unexpected;  ///< Keys that only the checkpoint has; empty if strict.
  Dict manifest;                        ///< By what it was saved; empty if it was not this library.
  std::string file;                     ///< The file that was loaded.
  std::vector<std::string> damaged;     ///< Why newer files were not: see `Checkpoints::load_latest`.
};

namespace detail {

/// How long the other ranks wait for rank 0 to write or for each other to read.
inline constexpr std::chrono::milliseconds reading_time = std::chrono::minutes(60);

/// The current exception, if `function` throws one.
template <class Function>
std::exception_ptr problem_of(const Function& function) {
  try {
    function();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

/// What the filters leave of a state. Throws for names that the state does not have.
inline void apply(const Filter& filter, Value& state) {
  if (filter.empty()) return;
  auto* dict = std::get_if<Dict>(&state.data());
  if (dict == nullptr) throw Error("fabric: save: a filter needs a state with names");
  for (const auto& [name, keeps] : filter) {
    Value* entry = dict->find(name);
    const auto* inner = entry == nullptr ? nullptr : std::get_if<Dict>(&entry->data());
    if (inner == nullptr) {
      throw Error("fabric: save: the filter '" + name + "' is for nothing in the state that has keys");
    }
    Dict kept;
    for (const auto& [key, value] : *inner) {
      if (keeps(to_text(key), value)) kept[key] = value;
    }
    *entry = std::move(kept);
  }
}

/// What only the checkpoint has at its top.
template <class S>
Value rest_of(const Value& saved, const S& state) {
  const auto* dict = std::get_if<Dict>(&saved.data());
  if (dict == nullptr) return {};
  std::vector<std::string> names;
  if constexpr (std::same_as<std::remove_const_t<S>, fabric::State>) {
    for (const auto& entry : state.entries()) names.push_back(entry.name());
  } else if constexpr (boost::hana::Struct<S>::value) {
    boost::hana::for_each(boost::hana::accessors<S>(), [&](auto member) {
      names.emplace_back(boost::hana::to<const char*>(boost::hana::first(member)));
    });
  } else if constexpr (MapLike<S> && !is_data<S>()) {
    for (const auto& [key, value] : state) names.push_back(to_text(Dict::Key(key)));
  } else {
    return {};
  }
  Dict rest;
  for (const auto& [key, value] : *dict) {
    if (std::find(names.begin(), names.end(), to_text(key)) == names.end()) rest[key] = value;
  }
  return DeepCopy().copy(rest);
}

template <CheckpointIo Io>
void write_file(const std::string& path, const Value& state, const Dict& manifest) {
  DurableFile file(path);
  Io::write(file, state, manifest);
  file.commit();
}

/// `Fabric::save` and `load`, which are written here so that only who uses them compiles them.
template <class Io>
struct Checkpointing {
  static_assert(CheckpointIo<Io>, "fabric: save and load take a format such as TorchFile or SafetensorsFile");

  template <class F>
  [[nodiscard]] static Dict manifest(const F& fabric) {
    const Selection& selection = fabric.selection();
    return {{"library", std::to_string(FABRIC_VERSION_MAJOR) + "." + std::to_string(FABRIC_VERSION_MINOR) + "." +
                            std::to_string(FABRIC_VERSION_PATCH)},
            {"torch", TORCH_VERSION},
            {"accelerator", std::string(selection.accelerator.name.view())},
            {"strategy", std::string(selection.strategy.name.view())},
            {"precision", std::string(selection.precision.name.view())},
            {"world_size", fabric.world_size()}};
  }

  /// The state as a tree, on all ranks; what differs by rank is complete on rank 0.
  template <class S>
  static Value collect(const S& state, const Filter& filter, Ranks& ranks) {
    Value value;
    const auto problem = problem_of([&] {
      value = to_value(state, "", ranks);
      apply(filter, value);
    });
    ranks.agree(problem);
    return value;
  }

  template <class F, class S>
  static void save(const F& fabric, const std::string& path, const S& state, const Filter& filter,
                   std::chrono::milliseconds patience) {
    Ranks ranks(fabric.world(), "save of " + path, patience);
    ranks.agree();
    const Value value = collect(state, filter, ranks);
    const auto problem = problem_of([&] {
      if (!fabric.is_global_zero()) return;
      make_folder(folder_of(path));
      write_file<Io>(path, value, manifest(fabric));
    });
    ranks.agree(problem, reading_time);
  }

  template <class F, class S>
  static Loaded load(const F& fabric, const std::string& path, S& state, bool strict,
                     std::chrono::milliseconds patience) {
    Ranks ranks(fabric.world(), "load of " + path, patience);
    ranks.agree();
    return load(ranks, path, std::nullopt, state, strict);
  }

  /// `read` is what the file holds, where this rank has read it already.
  template <class S>
  static Loaded load(Ranks& ranks, const std::string& path, std::optional<CheckpointContents> read, S& state,
                     bool strict) {
    Loaded loaded;
    LoadPlan plan(ranks.world(), strict);
    CheckpointContents contents;
    const auto problem = problem_of([&] {
      contents = read ? std::move(*read) : Io::read(map_file(path), path);
      plan_load(state, contents.state, "", plan);
      if (const std::string problems = plan.problems(); !problems.empty()) {
        throw Error("fabric: load: " + path + " does not fit, and nothing was changed" + written_by(contents.manifest) +
                    ": " + problems);
      }
    });
    ranks.agree(problem, reading_time);
    plan.run([&](const std::exception_ptr& error) { ranks.agree(error, reading_time); });
    loaded.rest = rest_of(contents.state, state);
    loaded.file = path;
    loaded.missing = plan.missing();
    loaded.unexpected = plan.unexpected();
    loaded.manifest = std::move(contents.manifest);
    return loaded;
  }

 private:
  static std::string written_by(const Dict& manifest) {
    const Value* precision = manifest.find("precision");
    const Value* ranks = manifest.find("world_size");
    if (precision == nullptr || ranks == nullptr || !precision->is<std::string>() || !ranks->is<std::int64_t>())
      return "";
    return " (it was saved in " + precision->as<std::string>("") + " by " +
           std::to_string(ranks->as<std::int64_t>("")) + " ranks)";
  }
};

}  // namespace detail
}  // namespace fabric
