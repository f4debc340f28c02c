// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ATen.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/dtypes.hpp"
#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/pickle_reader.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/value.hpp"

/// The file `.metadata` of `torch.distributed.checkpoint`: a pickled object that says which parts of which tensors
/// stand where in the files of the ranks.
namespace fabric::detail {

/// What stands in a file: a part of a tensor, or a value that is no tensor.
struct StoredItem {
  Box box;           ///< Of a tensor.
  std::string file;  ///< Its name in the folder.
  std::uint64_t offset = 0;
  std::uint64_t length = 0;  ///< In bytes.
};

/// A tensor, or another value, of a distributed checkpoint.
struct StoredEntry {
  /// Where it is in the tree of the state: names, and the places in lists.
  using Path = std::vector<Dict::Key>;

  std::string key;  ///< The path, with dots.
  Path path;
  std::optional<at::ScalarType> dtype;  ///< None for what is no tensor.
  std::vector<std::int64_t> sizes;      ///< Of the whole tensor.
  std::vector<StoredItem> items;        ///< The parts of a tensor, or the one item of another value.

  [[nodiscard]] bool is_tensor() const { return dtype.has_value(); }
  [[nodiscard]] std::int64_t numel() const { return Box::whole(sizes).numel(); }
};

namespace dcp {
inline constexpr std::string_view metadata_module = "torch.distributed.checkpoint.metadata";
inline constexpr std::string_view file_module = "torch.distributed.checkpoint.filesystem";
/// The classes of which `.metadata` is made. An object of any other is refused.
inline constexpr std::string_view classes[] = {"torch.distributed.checkpoint.metadata.Metadata",
                                               "torch.distributed.checkpoint.metadata.MetadataIndex",
                                               "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
                                               "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
                                               "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
                                               "torch.distributed.checkpoint.metadata.TensorProperties",
                                               "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
                                               "torch.distributed.checkpoint.metadata.StorageMeta",
                                               "torch.distributed.checkpoint.filesystem._StorageInfo",
                                               "pathlib.PosixPath",
                                               "pathlib._local.PosixPath",
                                               "pathlib.PurePosixPath",
                                               "pathlib._local.PurePosixPath"};
}  // namespace dcp

/// Pickles `.metadata` as Python reads it.
class DistributedMetadataWriter : public PickleText {
 public:
  explicit DistributedMetadataWriter(const std::vector<StoredEntry>& entries) {
    text_ += "\x80\x02";
    begin_object(dcp::metadata_module, "Metadata");
    put_name("state_dict_metadata");
    text_ += "}(";
    for (const StoredEntry& entry : entries) {
      put_name(entry.key);
      entry.is_tensor() ? put_tensor(entry) : put_bytes();
    }
    text_ += 'u';
    put_name("planner_data");
    text_ += "}(";
    for (const StoredEntry& entry : entries) {
      put_name(entry.key);
      text_ += '(';
      for (const Dict::Key& step : entry.path) {
        if (const auto* place = std::get_if<std::int64_t>(&step)) {
          put_integer(*place);
        } else {
          put_name(std::get<std::string>(step));
        }
      }
      text_ += 't';
    }
    text_ += 'u';
    put_name("storage_data");
    text_ += "}(";
    for (const StoredEntry& entry : entries) {
      for (std::size_t i = 0; i < entry.items.size(); ++i) put_item(entry, i);
    }
    text_ += 'u';
    put_name("storage_meta");
    text_ += 'N';
    put_name("version");
    put_name("1.0.0");
    end_object();
    text_ += '.';
  }

 private:
  /// A text, or where it stood before.
  void put_name(std::string_view name) {
    if (recall(std::string(name))) return;
    put_text(name, std::string(name));
    remember(std::string(name));
  }
  void put_class(std::string_view module, std::string_view name) {
    const std::string full = "class " + std::string(module) + "." + std::string(name);
    if (recall(full)) return;
    put_global(module, name);
    remember(full);
  }
  bool recall(const std::string& what) {
    const auto known = places_.find(what);
    if (known == places_.end()) return false;
    text_ += 'j';
    put(known->second);
    return true;
  }
  void remember(const std::string& what) {
    text_ += 'r';
    put(places_.emplace(what, static_cast<std::uint32_t>(places_.size())).first->second);
  }

  void begin_object(std::string_view module, std::string_view name) {
    put_class(module, name);
    text_ += ")\x81}(";
  }
  void end_object() { text_ += "ub"; }
  void put_size(at::IntArrayRef numbers) {
    put_class("torch", "Size");
    put_integers(numbers);
    text_ += "\x85R";
  }

  void put_bytes() {
    put_class(dcp::metadata_module, "BytesStorageMetadata");
    text_ += ")\x81";
  }
  void put_tensor(const StoredEntry& entry) {
    begin_object(dcp::metadata_module, "TensorStorageMetadata");
    put_name("properties");
    put_class(dcp::metadata_module, "TensorProperties");
    text_ += ")\x81(";
    put_class("torch", find_dtype(*entry.dtype)->name);
    put_class("torch.serialization", "_get_layout");
    put_name("torch.strided");
    text_ += "\x85R";
    put_bool(false);  // requires_grad
    put_class(dcp::metadata_module, "_MEM_FORMAT_ENCODING");
    text_ += "K";
    put(std::uint8_t{0});  // contiguous
    text_ += "\x85R";
    put_bool(false);  // pinned memory
    text_ += "tb";    // without the strides that versions from 2.12 on add, so that older ones read it, too
    put_name("size");
    put_size(entry.sizes);
    put_name("chunks");
    text_ += "](";
    for (const StoredItem& item : entry.items) {
      begin_object(dcp::metadata_module, "ChunkStorageMetadata");
      put_name("offsets");
      put_size(item.box.offsets);
      put_name("sizes");
      put_size(item.box.sizes);
      end_object();
    }
    text_ += 'e';
    end_object();
  }
  void put_item(const StoredEntry& entry, std::size_t i) {
    const StoredItem& item = entry.items[i];
    begin_object(dcp::metadata_module, "MetadataIndex");
    put_name("fqn");
    put_name(entry.key);
    put_name("index");
    if (entry.is_tensor()) {
      put_integer(static_cast<std::int64_t>(i));
      put_name("offset");
      put_size(item.box.offsets);
    } else {
      text_ += 'N';
    }
    end_object();
    begin_object(dcp::file_module, "_StorageInfo");
    put_name("relative_path");
    put_name(item.file);
    put_name("offset");
    put_integer(static_cast<std::int64_t>(item.offset));
    put_name("length");
    put_integer(static_cast<std::int64_t>(item.length));
    end_object();
  }

  std::unordered_map<std::string, std::uint32_t> places_;
};

/// Reads `.metadata`. Everything in it is checked: kinds, ranges, that the parts of each tensor are inside it, do not
/// overlap and cover it, and that each part stands in a file of this folder.
class DistributedMetadataReader {
 public:
  /// Throws DamagedCheckpoint. `rest` becomes what follows the pickle. One rank's own entries are only `some` of all:
  /// they need not cover their tensors.
  static std::vector<StoredEntry> read(std::string_view pickle, const std::string& path,
                                       std::string_view* rest = nullptr, bool some = false) {
    const auto no_storages = [&path](const std::string&) -> at::Storage { Refuse{path}("it has a tensor in it"); };
    PickleReader reader(pickle, path, no_storages, dcp::classes);
    const Value root = reader.read();
    if (rest != nullptr) *rest = reader.rest();
    DistributedMetadataReader checked(path);
    std::vector<StoredEntry> entries = checked.entries(root);
    for (const StoredEntry& entry : entries) {
      if (const std::string wrong = some ? "" : problem_of(entry); !wrong.empty()) checked.refuse(wrong);
    }
    return entries;
  }

  /// What is wrong with the parts of an entry; empty if they are its whole.
  static std::string problem_of(const StoredEntry& entry) {
    if (!entry.is_tensor()) {
      return entry.items.size() == 1 ? "" : "it does not say where '" + entry.key + "' is, or says it twice";
    }
    std::int64_t elements = 0;
    std::vector<Box> boxes;
    for (const StoredItem& item : entry.items) {
      const std::int64_t count = item.box.numel();
      const std::uint64_t most = item.length / c10::elementSize(*entry.dtype);
      if (item.file.empty() && count > 0) return "it does not say where a part of '" + entry.key + "' is";
      if (static_cast<std::uint64_t>(count) > most) {
        return "a part of '" + entry.key + "' has more elements than bytes that stand for it";
      }
      elements = std::min(elements + count, entry.numel() + 1);
      if (count > 0) boxes.push_back(item.box);
    }
    const bool whole = elements == entry.numel() && !overlap(boxes);
    return whole ? "" : "the parts of '" + entry.key + "' overlap, or do not cover it";
  }

 private:
  explicit DistributedMetadataReader(const std::string& path) : path_(path) {}

  [[noreturn]] void refuse(const std::string& why) const { Refuse{path_}(why); }
  [[noreturn]] void refuse_form() const {
    refuse("it is not what torch.distributed.checkpoint writes, or of a version that is not known here");
  }
  template <class T>
  const T& as(const Value* value) const {
    const T* data = value == nullptr ? nullptr : std::get_if<T>(&value->data());
    if (data == nullptr) refuse_form();
    return *data;
  }
  /// The name of an object's class, without its module; empty if it is no object.
  static std::string_view class_of(const Value& value) {
    const auto* object = std::get_if<Dict>(&value.data());
    const Value* name = object == nullptr ? nullptr : object->find("class");
    if (name == nullptr || !name->is<std::string>()) return {};
    const std::string_view full = std::get<std::string>(name->data());
    return full.substr(full.rfind('.') + 1);
  }
  /// What an object of that class is made of.
  template <class T>
  const T& state(const Value& object, std::string_view name) const {
    if (class_of(object) != name) refuse_form();
    return as<T>(std::get<Dict>(object.data()).find("state"));
  }
  const Value& at(const Dict& state, const char* name) const {
    const Value* value = state.find(name);
    if (value == nullptr) refuse_form();
    return *value;
  }
  std::vector<std::int64_t> numbers(const Value& value) const {
    const auto& items = as<List>(&value).items;
    if (items.size() > 64) refuse("a tensor in it has more than 64 dimensions");
    std::vector<std::int64_t> all;
    for (const Value& item : items) {
      const auto number = as<std::int64_t>(&item);
      if (number < 0) refuse("a size or offset in it is negative");
      all.push_back(number);
    }
    return all;
  }

  std::vector<StoredEntry> entries(const Value& root) {
    const Dict& metadata = state<Dict>(root, "Metadata");
    std::vector<StoredEntry> entries;
    std::unordered_map<std::string, std::size_t> places;
    for (const auto& [key, value] : as<Dict>(&at(metadata, "state_dict_metadata"))) {
      places.emplace(to_text(key), entries.size());
      StoredEntry& entry = entries.emplace_back();
      entry.key = to_text(key);
      entry.path = {key};
      if (class_of(value) == "TensorStorageMetadata") {
        read_tensor(value, entry);
      } else if (class_of(value) != "BytesStorageMetadata") {
        refuse_form();
      }
    }
    if (const Value* paths = metadata.find("planner_data"); paths != nullptr && !paths->is_none()) {
      for (const auto& [key, path] : as<Dict>(paths)) {
        if (const auto found = places.find(to_text(key)); found != places.end()) {
          entries[found->second].path = path_of(path);
        }
      }
    }
    const Value* items = metadata.find("storage_data");
    if (items == nullptr || (items->is<Dict>() && as<Dict>(items).size() > 0)) refuse_form();
    if (items->is<List>()) {
      for (const Value& pair : as<List>(items).items) read_item(as<List>(&pair).items, entries, places);
    }
    return entries;
  }

  StoredEntry::Path path_of(const Value& value) const {
    StoredEntry::Path path;
    for (const Value& step : as<List>(&value).items) {
      if (const auto* place = std::get_if<std::int64_t>(&step.data())) {
        if (*place < 0) refuse("a place in a list in it is negative");
        path.emplace_back(*place);
      } else {
        path.emplace_back(as<std::string>(&step));
      }
    }
    if (path.empty() || !std::holds_alternative<std::string>(path[0])) refuse_form();
    return path;
  }

  void read_tensor(const Value& value, StoredEntry& entry) const {
    const Dict& tensor = state<Dict>(value, "TensorStorageMetadata");
    const auto& properties = state<List>(at(tensor, "properties"), "TensorProperties").items;
    if (properties.size() < 2) refuse_form();
    const std::string& dtype = as<std::string>(&properties[0]);
    const auto* known = find_dtype(&DtypeName::name, std::string_view(dtype).substr(dtype.find('.') + 1));
    if (known == nullptr) refuse("'" + entry.key + "' has the dtype " + dtype + ", which is not known here");
    if (properties[1].is<std::string>() && as<std::string>(&properties[1]) != "torch.strided") {
      refuse("'" + entry.key + "' is not a dense tensor");
    }
    entry.dtype = known->dtype;
    entry.sizes = numbers(at(tensor, "size"));
    std::int64_t bytes = static_cast<std::int64_t>(c10::elementSize(known->dtype));
    for (const std::int64_t size : entry.sizes) {
      constexpr std::int64_t most = std::int64_t{1} << 60;  // so that sums of such sizes can be counted, too
      if (__builtin_mul_overflow(bytes, std::max<std::int64_t>(size, 1), &bytes) || bytes > most) {
        refuse("'" + entry.key + "' has more elements than can be counted");
      }
    }
    for (const Value& chunk : as<List>(&at(tensor, "chunks")).items) {
      const Dict& part = state<Dict>(chunk, "ChunkStorageMetadata");
      StoredItem& item = entry.items.emplace_back();
      item.box = {numbers(at(part, "offsets")), numbers(at(part, "sizes"))};
      bool inside = item.box.offsets.size() == entry.sizes.size() && item.box.sizes.size() == entry.sizes.size();
      for (std::size_t i = 0; inside && i < entry.sizes.size(); ++i) {
        inside = item.box.offsets[i] <= entry.sizes[i] && item.box.sizes[i] <= entry.sizes[i] - item.box.offsets[i];
      }
      if (!inside) refuse("a part of '" + entry.key + "' does not lie inside it");
    }
  }

  /// One pair of `storage_data`: which part, and where it stands.
  void read_item(const std::vector<Value>& pair, std::vector<StoredEntry>& entries,
                 const std::unordered_map<std::string, std::size_t>& places) const {
    if (pair.size() != 2) refuse_form();
    const Dict& index = state<Dict>(pair[0], "MetadataIndex");
    const auto found = places.find(as<std::string>(&at(index, "fqn")));
    if (found == places.end()) refuse("it says where '" + as<std::string>(&at(index, "fqn")) + "' is, but not what");
    StoredEntry& entry = entries[found->second];
    StoredItem* item = nullptr;
    if (entry.is_tensor()) {
      item = find_item(index, entry);
    } else if (entry.items.empty()) {
      item = &entry.items.emplace_back();
    }
    if (item == nullptr || !item->file.empty()) refuse("it says twice where a part of '" + entry.key + "' is");
    const Dict& info = state<Dict>(pair[1], "_StorageInfo");
    if (const Value* transforms = info.find("transform_descriptors"); transforms != nullptr && !transforms->is_none()) {
      if (!transforms->is<List>() || !as<List>(transforms).items.empty()) {
        refuse("'" + entry.key + "' was compressed or changed by an extension: save it without");
      }
    }
    item->file = as<std::string>(&at(info, "relative_path"));
    if (item->file.empty() || item->file[0] == '.' || item->file.find('/') != std::string::npos ||
        item->file.find('\0') != std::string::npos) {
      refuse("'" + entry.key + "' stands in '" + item->file + "', which is no file of this folder");
    }
    const auto offset = as<std::int64_t>(&at(info, "offset"));
    const auto length = as<std::int64_t>(&at(info, "length"));
    if (offset < 0 || length < 0) refuse("an offset or length in it is negative");
    item->offset = static_cast<std::uint64_t>(offset);
    item->length = static_cast<std::uint64_t>(length);
  }

  StoredItem* find_item(const Dict& index, StoredEntry& entry) const {
    const std::vector<std::int64_t> offsets = numbers(at(index, "offset"));
    if (const Value* hint = index.find("index"); hint != nullptr && hint->is<std::int64_t>()) {
      const auto i = static_cast<std::uint64_t>(as<std::int64_t>(hint));
      if (i < entry.items.size() && entry.items[i].box.offsets == offsets) return &entry.items[i];
    }
    for (StoredItem& item : entry.items) {
      if (item.box.offsets == offsets && item.file.empty()) return &item;
    }
    refuse("it says where a part of '" + entry.key + "' is that the tensor does not have");
  }

  const std::string& path_;
};

}  // namespace fabric::detail
