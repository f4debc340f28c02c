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

#include <torch/types.h>
#include <torch/version.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/gathering.hpp"
#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/save_state.hpp"
#include "fabric/checkpoint/spread.hpp"
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

/// A format of folders that all ranks write and read together: `save(path, state, spread, manifest, ranks)` on all of
/// them, `open(path)` gives a tree whose tensors are still on the disk. `DistributedCheckpoint` is one.
template <class Io>
concept CheckpointFolderIo = requires(const std::string& path, const Value& state, const Spread& spread,
                                      const Dict& manifest, Ranks& ranks) {
  Io::save(path, state, spread, manifest, ranks);
  { Io::open(path) } -> std::same_as<CheckpointContents>;
};

/// What a load found that it did not load.
struct Loaded {
  Value rest;                           ///< What the checkpoint has beside the names in the state, but for tensors of
                                        ///< a DistributedCheckpoint.
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

/// A tree without the tensors that are not in memory.
[[nodiscard]] inline Value without_stored(const Value& value) {
  const auto is_stored = [](const Value& inner) {
    return inner.is<at::Tensor>() && std::get<at::Tensor>(inner.data()).is_meta();
  };
  if (const auto* list = std::get_if<List>(&value.data())) {
    List rest{{}, list->is_tuple};
    for (const Value& item : list->items) rest.items.push_back(is_stored(item) ? Value() : without_stored(item));
    return rest;
  }
  if (const auto* dict = std::get_if<Dict>(&value.data())) {
    Dict rest;
    for (const auto& [key, inner] : *dict) {
      if (!is_stored(inner)) rest[key] = without_stored(inner);
    }
    return rest;
  }
  return value;
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

template <CheckpointIo Io, class... MemoryOf>
void write_file(const std::string& path, const Value& state, const Dict& manifest, const MemoryOf&... memory_of) {
  DurableFile file(path);
  Io::write(file, state, manifest, memory_of...);
  file.commit();
}

/// `Fabric::save` and `load`, which are written here so that only who uses them compiles them.
template <class Io>
struct Checkpointing {
  static_assert(CheckpointIo<Io> || CheckpointFolderIo<Io>,
                "fabric: save and load take a format such as TorchFile, SafetensorsFile or DistributedCheckpoint");
  static constexpr bool is_folder = CheckpointFolderIo<Io>;

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

  /// The state as a tree, on all ranks; what differs by rank is complete on rank 0. `spread` learns what stands for
  /// tensors that are spread over the ranks.
  template <class S>
  static Value collect(const S& state, const Filter& filter, Ranks& ranks, Spread& spread) {
    Value value;
    const auto problem = problem_of([&] {
      Saving saving{ranks, spread, is_folder};
      look_at_modules(state, saving);
      value = to_value(state, "", saving);
      apply(filter, value);
    });
    ranks.agree(problem);
    return value;
  }

  /// Brings the tree of rank 0 to a file, and the parts that other ranks have with it. `write(value, memory_of...)`
  /// does it, on rank 0.
  template <class Write>
  static void write_whole(Value& value, Spread& spread, Ranks& ranks, const Write& write) {
    const World& world = ranks.world();
    // Whether anything is spread is the same on all ranks: it is by the strategy's type.
    if (!spread.is_used()) {
      ranks.agree(problem_of([&] {
                    if (world.is_global_zero()) write(value);
                  }),
                  reading_time);
      return;
    }
    Gathering gathering(value, spread, ranks);
    auto problem = problem_of([&] {
      if (!world.is_global_zero()) return gathering.send();
      constexpr bool one_by_one = requires(MemoryFile & sink) {
        Io::write(sink, value, Dict(), [](const at::Storage& storage) { return storage; });
      };
      if constexpr (one_by_one) {
        if constexpr (std::invocable<Write, Value&, at::Storage (*)(const at::Storage&)>) {
          return write(value, [&](const at::Storage& storage) { return gathering.memory_of(storage); });
        }
      }
      value = gathering.everything(value);
      write(value);
    });
    if (world.is_global_zero() && problem) {
      const auto lost = problem_of([&] { gathering.finish(); });
    }
    ranks.agree(problem, reading_time);
  }

  template <class F, class S>
  static void save(const F& fabric, const std::string& path, const S& state, const Filter& filter,
                   std::chrono::milliseconds patience) {
    Ranks ranks(fabric.world(), "save of " + path, patience);
    ranks.agree();
    Spread spread;
    Value value = collect(state, filter, ranks, spread);
    if constexpr (is_folder) {
      Io::save(path, value, spread, manifest(fabric), ranks);
    } else {
      write_whole(value, spread, ranks, [&](const Value& whole, const auto&... memory_of) {
        make_folder(folder_of(path));
        write_file<Io>(path, whole, manifest(fabric), memory_of...);
      });
    }
  }

  template <class F, class S>
  static Loaded load(const F& fabric, const std::string& path, S& state, bool strict,
                     std::chrono::milliseconds patience) {
    Ranks ranks(fabric.world(), "load of " + path, patience);
    ranks.agree();
    return load(ranks, path, std::nullopt, state, strict);
  }

  /// What a checkpoint holds. Throws DamagedCheckpoint.
  static CheckpointContents read_from(const std::string& path) {
    if constexpr (is_folder) {
      return Io::open(path);
    } else {
      return Io::read(map_file(path), path);
    }
  }

  /// `read` is what the file holds, where this rank has read it already.
  template <class S>
  static Loaded load(Ranks& ranks, const std::string& path, std::optional<CheckpointContents> read, S& state,
                     bool strict) {
    Loaded loaded;
    LoadPlan plan(ranks.world(), strict);
    CheckpointContents contents;
    const auto problem = problem_of([&] {
      contents = read ? std::move(*read) : read_from(path);
      plan.set_stored(contents.stored);
      Saving saving{ranks, plan.spread()};
      look_at_modules(state, saving);
      plan_load(state, contents.state, "", plan);
      if (const std::string problems = plan.problems(); !problems.empty()) {
        throw Error("fabric: load: " + path + " does not fit, and nothing was changed" + written_by(contents.manifest) +
                    ": " + problems);
      }
    });
    ranks.agree(problem, reading_time);
    plan.run([&](const std::exception_ptr& error) { ranks.agree(error, reading_time); });
    loaded.rest = rest_of(contents.stored ? without_stored(contents.state) : contents.state, state);
    loaded.file = path;
    loaded.missing = plan.missing();
    loaded.unexpected = plan.unexpected();
    loaded.manifest = std::move(contents.manifest);
    return loaded;
  }

 private:
  template <class S>
  static void look_at_modules(const S& state, Saving& saving) {
    saving.only_modules = true;
    (void)to_value<std::remove_cvref_t<S>>(state, "", saving);
    saving.only_modules = false;
  }
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
