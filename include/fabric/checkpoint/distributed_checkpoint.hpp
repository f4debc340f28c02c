// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ATen.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/distributed_file.hpp"
#include "fabric/checkpoint/distributed_metadata.hpp"
#include "fabric/checkpoint/json.hpp"
#include "fabric/checkpoint/load_plan.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/replaced_folder.hpp"
#include "fabric/checkpoint/save_load.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/stored_tensors.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric {
namespace detail {

// ---- From the tree to entries and back, as Python's flatten_state_dict does it ----

/// Is it saved as one object? Dicts, and lists that have tensors or dicts, are saved by their entries.
[[nodiscard]] inline bool is_leaf(const Value& value) {
  if (const auto* dict = std::get_if<Dict>(&value.data())) return dict->size() == 0;
  const auto* list = std::get_if<List>(&value.data());
  return list == nullptr || std::all_of(list->items.begin(), list->items.end(), [](const Value& item) {
           return !item.is<at::Tensor>() && !item.is<Dict>() && is_leaf(item);
         });
}

/// Calls `visit(key, path, leaf)` for each of them.
template <class Visit>
void each_leaf(const Value& value, StoredEntry::Path& path, const std::string& key, const Visit& visit) {
  if (is_leaf(value)) return visit(key, path, value);
  if (const auto* dict = std::get_if<Dict>(&value.data())) {
    for (const auto& [own, inner] : *dict) {
      path.emplace_back(to_text(own));
      each_leaf(inner, path, inner_key(key, to_text(own)), visit);
      path.pop_back();
    }
    return;
  }
  const auto& items = std::get<List>(value.data()).items;
  for (std::size_t i = 0; i < items.size(); ++i) {
    path.emplace_back(static_cast<std::int64_t>(i));
    each_leaf(items[i], path, inner_key(key, std::to_string(i)), visit);
    path.pop_back();
  }
}

/// Puts a leaf into a tree. `most` bounds the places in lists. False if the path contradicts those before it.
[[nodiscard]] inline bool put_leaf(Value& root, const StoredEntry::Path& path, Value leaf, std::size_t most) {
  Value* place = &root;
  for (const Dict::Key& step : path) {
    if (const auto* number = std::get_if<std::int64_t>(&step)) {
      if (place->is_none()) *place = List();
      auto* list = std::get_if<List>(&place->data());
      const auto i = static_cast<std::size_t>(*number);
      if (list == nullptr || i >= most) return false;
      if (list->items.size() <= i) list->items.resize(i + 1);
      place = &list->items[i];
    } else {
      if (place->is_none()) *place = Dict();
      auto* dict = std::get_if<Dict>(&place->data());
      if (dict == nullptr) return false;
      place = &(*dict)[step];
    }
  }
  if (!place->is_none()) return false;
  *place = std::move(leaf);
  return true;
}

/// The tensors of a distributed checkpoint.
class StoredOnDisk : public StoredTensors {
 public:
  explicit StoredOnDisk(const std::string& folder) : reader_(folder) { stand_ins_.reserve(reader_.entries().size()); }

  [[nodiscard]] const DistributedReader& reader() const { return reader_; }

  /// What stands for a tensor.
  at::Tensor stand_in(const StoredEntry& entry) {
    at::Tensor made = at::empty(entry.sizes, at::TensorOptions(at::kMeta).dtype(*entry.dtype));
    entries_[made.unsafeGetTensorImpl()] = &entry;
    by_storage_[made.storage().unsafeGetStorageImpl()] = &entry;
    stand_ins_.push_back(made);
    return made;
  }
  void check(const at::Tensor& stand_in, const Box& box) const override { reader_.check(entry_of(stand_in), box); }
  void read(const at::Tensor& stand_in, const Box& box, const at::Tensor& target) const override {
    reader_.read(entry_of(stand_in), {box, target});
  }
  /// The storage of a whole tensor, read now if it is one that stands for another.
  [[nodiscard]] at::Storage memory_of(const at::Storage& storage) const {
    const auto found = by_storage_.find(storage.unsafeGetStorageImpl());
    if (found == by_storage_.end()) return on_cpu(storage);
    const StoredEntry& entry = *found->second;
    const Box all = Box::whole(entry.sizes);
    at::Tensor tensor = at::empty(entry.sizes, *entry.dtype);
    reader_.check(entry, all);
    reader_.read(entry, {all, tensor});
    return tensor.storage();
  }

 private:
  [[nodiscard]] const StoredEntry& entry_of(const at::Tensor& stand_in) const {
    return *entries_.at(stand_in.unsafeGetTensorImpl());
  }

  DistributedReader reader_;
  std::vector<at::Tensor> stand_ins_;
  std::unordered_map<const c10::TensorImpl*, const StoredEntry*> entries_;
  std::unordered_map<const c10::StorageImpl*, const StoredEntry*> by_storage_;
};

}  // namespace detail

/// The folders of Python's `torch.distributed.checkpoint`, in which each rank writes and reads its own parts: the
/// format for models that are sharded. `fabric.save<DistributedCheckpoint>("run/step-100", state)`. Python loads them
/// with `dcp.load` into `{"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model,
/// optimizer)}` under the same names, and turns them into one file with `dcp_to_torch_save`; what its `dcp.save` wrote
/// of such a dict is loaded here. The number of ranks and the strategy may be others than when it was saved.
struct DistributedCheckpoint {
  static constexpr std::string_view extension = "";
  /// An optimizer's parameters are called as in their modules.
  static constexpr bool names_parameters = true;

  /// Called on all ranks, each with its tree. Throws fabric::Error on all of them, and then leaves the folder that was
  /// there as it was.
  static void save(const std::string& path, const Value& state, const Spread& spread, Dict manifest, Ranks& ranks) {
    const detail::ReplacedFolder folder(path);
    const World& world = ranks.world();
    try {
      ranks.agree(detail::problem_of([&] {
        if (world.is_global_zero()) folder.begin(is_part);
      }));
      std::string written;
      const auto problem = detail::problem_of([&] { written = write_own(folder.temporary(), state, spread, world); });
      ranks.agree(problem, detail::reading_time);
      const auto all = detail::gather_long(ranks, written);
      ranks.agree(detail::problem_of([&] {
                    if (world.is_global_zero()) finish(folder, all, std::move(manifest));
                  }),
                  detail::reading_time);
    } catch (...) {
      if (world.is_global_zero()) folder.abandon();
      throw;
    }
  }

  /// The tree of a checkpoint, with the tensors still on the disk. Throws DamagedCheckpoint.
  [[nodiscard]] static CheckpointContents open(const std::string& path) {
    const auto stored =
        std::make_shared<detail::StoredOnDisk>(detail::ReplacedFolder(path).existing(detail::dcp::metadata_name));
    CheckpointContents contents;
    contents.state = Dict();
    const auto& entries = stored->reader().entries();
    for (const auto& entry : entries) {
      Value leaf = entry.is_tensor() ? Value(stored->stand_in(entry)) : stored->reader().value(entry);
      if (!detail::put_leaf(contents.state, entry.path, std::move(leaf), entries.size())) {
        detail::Refuse{path}("the path of '" + entry.key + "' contradicts another one's");
      }
    }
    contents.manifest = stored->reader().manifest();
    contents.stored = stored;
    return contents;
  }

 private:
  /// May a file of this name be replaced when a checkpoint is?
  static bool is_part(const std::string& name) {
    return name.ends_with(".distcp") || name.ends_with(".metadata") || name == detail::dcp::manifest_name ||
           name == ".metadata.tmp";
  }

  /// Writes this rank's file. Returns what rank 0 must know of it: its facts, and the metadata of what is in it.
  static std::string write_own(const std::string& folder, const Value& state, const Spread& spread,
                               const World& world) {
    if (!state.is<Dict>()) throw Error("fabric: save: a distributed checkpoint needs a state with names");
    detail::DistributedFile file(folder, "__" + std::to_string(world.global_rank) + "_0.distcp");
    detail::StoredEntry::Path path;
    detail::each_leaf(state, path, "", [&](const std::string& key, const auto& place, const Value& leaf) {
      const auto* tensor = std::get_if<at::Tensor>(&leaf.data());
      if (tensor == nullptr) {
        if (world.is_global_zero() && !key.empty()) file.add(key, place, leaf);
        return;
      }
      const Spread::Part* part = tensor->defined() ? spread.part(*tensor) : nullptr;
      if (part == nullptr) {
        detail::check_writable(*tensor, key);
        if (spread.writes(*tensor, world)) file.add(key, place, tensor->sizes(), Box::whole(tensor->sizes()), *tensor);
        return;
      }
      if (tensor->numel() == 0 && world.is_global_zero()) {  // no rank has an element of it
        const at::Tensor empty = at::empty(tensor->sizes(), part->own.options());
        return file.add(key, place, tensor->sizes(), Box::whole(tensor->sizes()), empty);
      }
      if (!part->writes) return;
      for_each_box(part->own.cpu(), part->boxes(),
                   [&](const at::Tensor& own, const Box& box) { file.add(key, place, tensor->sizes(), box, own); });
    });
    file.commit();
    return detail::JsonWriter::write(Dict{{"name", file.name()}, {"facts", file.facts()}}) + '\n' +
           detail::DistributedMetadataWriter(file.entries()).pickle();
  }

  /// Rank 0: puts together what the ranks have written, and gives it its name.
  static void finish(const detail::ReplacedFolder& folder, const std::vector<std::string>& written, Dict manifest) {
    std::vector<detail::StoredEntry> entries;
    std::unordered_map<std::string, std::size_t> places;
    Dict files;
    for (const std::string& text : written) {
      const std::size_t line = text.find('\n');
      const Value facts = detail::JsonReader::read(text.substr(0, line), "what a rank wrote");
      files[facts.as<Dict>("").at("name").as<std::string>("")] = facts.as<Dict>("").at("facts");
      const std::string pickle = text.substr(line + 1);
      for (auto& entry : detail::DistributedMetadataReader::read(pickle, "what a rank wrote", nullptr, /*some=*/true)) {
        const auto [place, added] = places.emplace(entry.key, entries.size());
        if (added) {
          entries.push_back(std::move(entry));
          continue;
        }
        detail::StoredEntry& known = entries[place->second];
        if (known.dtype != entry.dtype || known.sizes != entry.sizes) {
          throw Error("fabric: save: the ranks have '" + entry.key + "' in different shapes or dtypes");
        }
        known.items.insert(known.items.end(), entry.items.begin(), entry.items.end());
      }
    }
    for (const auto& entry : entries) {
      if (const auto wrong = detail::DistributedMetadataReader::problem_of(entry); !wrong.empty()) {
        throw Error("fabric: save: " + wrong);
      }
    }
    manifest["format"] = 1;
    manifest["files"] = std::move(files);
    detail::write_distributed_metadata(folder.temporary(), entries, manifest);
    folder.commit();
  }
};

/// Turns a distributed checkpoint, of this library or of Python, into one file of `torch.save`, as Python's
/// `dcp_to_torch_save` does. In memory there is one tensor at a time. Throws fabric::Error.
inline void consolidate(const std::string& folder, const std::string& path) {
  const CheckpointContents contents = DistributedCheckpoint::open(folder);
  const auto& stored = static_cast<const detail::StoredOnDisk&>(*contents.stored);
  detail::make_folder(detail::folder_of(path));
  detail::DurableFile file(path);
  Dict manifest;
  for (const auto& [key, value] : contents.manifest) {
    if (to_text(key) != "files") manifest[key] = value;  // of the folder
  }
  TorchFile::write(file, contents.state, manifest,
                   [&](const at::Storage& storage) { return stored.memory_of(storage); });
  file.commit();
}

}  // namespace fabric
