// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <ATen/ATen.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/json.hpp"
#include "fabric/checkpoint/pickle_reader.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/stored_tensors.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/checkpoint/zip.hpp"

namespace fabric {

/// What a file holds.
struct CheckpointContents {
  Value state;
  Dict manifest;  ///< Who wrote it and how; empty if it was not this library.
  /// Where the tensors of `state` are that are not in memory.
  std::shared_ptr<const StoredTensors> stored{};
};

namespace detail {

/// Can the processor read numbers of any kind there?
[[nodiscard]] inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(std::max_align_t) == 0;
}

/// Storage of bytes where they lie in `file`, even if they cannot be read as numbers there.
[[nodiscard]] inline at::Storage storage_over(const Bytes& file, std::string_view bytes) {
  auto* owner = new std::shared_ptr<void>(file.owner);
  at::DataPtr data(
      file.data + (bytes.data() - file.data), owner,
      [](void* shared) { delete static_cast<std::shared_ptr<void>*>(shared); }, at::kCPU);
  return {at::Storage::use_byte_size_t(), bytes.size(), std::move(data), nullptr,
          /*resizable=*/false};
}

/// Storage of bytes that lie in `file`, without a copy where the processor can read them there.
[[nodiscard]] inline at::Storage storage_in(const Bytes& file, std::string_view bytes) {
  if (is_aligned(bytes.data()) && !bytes.empty()) return storage_over(file, bytes);
  at::Storage copy(at::Storage::use_byte_size_t(), static_cast<std::int64_t>(bytes.size()), c10::GetAllocator(at::kCPU),
                   /*resizable=*/false);
  if (!bytes.empty()) std::memcpy(copy.mutable_data(), bytes.data(), bytes.size());
  return copy;
}

/// The bytes of a storage in the memory of the processor.
[[nodiscard]] inline at::Storage on_cpu(const at::Storage& storage) {
  if (storage.device().is_cpu()) return storage;
  const auto options = at::TensorOptions(at::kByte).device(storage.device());
  return at::empty({0}, options).set_(storage).cpu().storage();
}

/// Throws DamagedCheckpoint unless the file is the one that its manifest tells of.
inline void check_manifest(const Dict& manifest,
                           const std::unordered_map<std::string, std::pair<std::size_t, std::uint32_t>>& records,
                           const std::string& path) {
  const Refuse refuse{path};
  const Value* format = manifest.find("format");
  if (format == nullptr || !format->is<std::int64_t>()) refuse("its manifest is damaged");
  if (const auto number = format->as<std::int64_t>("format"); number != 1) {
    refuse("it is of format " + std::to_string(number) + ", which a newer version of this library wrote: 1 is read");
  }
  const Value* listed = manifest.find("records");
  if (listed == nullptr || !listed->is<Dict>()) refuse("its manifest is damaged");
  for (const auto& [name, facts] : listed->as<Dict>("records")) {
    const auto found = records.find(to_text(name));
    if (found == records.end()) refuse("its record " + to_text(name) + " is missing");
    const List wanted{{Value(found->second.first), Value(found->second.second)}, false};
    if (!facts.is<List>() || facts.as<List>("record").items.size() != 2) refuse("its manifest is damaged");
    for (std::size_t i = 0; i < 2; ++i) {
      const Value& fact = facts.as<List>("record").items[i];
      if (!fact.is<std::int64_t>() || fact.as<std::int64_t>("") != wanted.items[i].as<std::int64_t>("")) {
        refuse("its record " + to_text(name) + " is not the one that was saved");
      }
    }
  }
}

/// One of `torch.save`'s archives in memory. What is in its records is not verified yet.
class TorchArchive {
 public:
  /// Throws DamagedCheckpoint unless `torch.save`, on a machine like this, has written it.
  TorchArchive(Bytes file, const std::string& path) : file_(std::move(file)), zip_(file_.view(), path), path_(path) {
    if (zip_.records().empty()) zip_.refuse("it is an empty archive");
    const std::string& first = zip_.records()[0].name;
    folder_ = first.substr(0, first.find('/') + 1);
    if (zip_.find(folder_ + "data.pkl") == nullptr)
      zip_.refuse("it has no data.pkl, so that torch.save has not written it");
    if (zip_.find(folder_ + "constants.pkl") != nullptr) {
      zip_.refuse("torch::save or torch.jit.save wrote it: load it with torch::load");
    }
    if (const auto* order = zip_.find(folder_ + "byteorder"); order != nullptr && order->bytes != "little") {
      zip_.refuse("a big-endian machine wrote it");
    }
  }

  [[nodiscard]] const ZipReader& zip() const { return zip_; }
  [[nodiscard]] const std::string& folder() const { return folder_; }

  /// What was saved. Tensors share the memory of the file where the processor can read them there, or if they are only
  /// wanted `in_place`, to know where they lie.
  [[nodiscard]] Value read(bool in_place = false) const {
    std::unordered_map<std::string, at::Storage> storages;
    const auto storage = [&](const std::string& key) {
      if (const auto known = storages.find(key); known != storages.end()) return known->second;
      const auto* record = zip_.find(folder_ + "data/" + key);
      if (record == nullptr) zip_.refuse("it has no storage " + key);
      const auto make = in_place && !record->bytes.empty() ? storage_over : storage_in;
      return storages.emplace(key, make(file_, record->bytes)).first->second;
    };
    return PickleReader(zip_.find(folder_ + "data.pkl")->bytes, path_, storage).read();
  }

 private:
  Bytes file_;
  ZipReader zip_;
  std::string path_;
  std::string folder_;
};

}  // namespace detail

/// The files of Python's `torch.save` and `torch.load`. What is written here, Python reads as a dict with
/// `torch.load(path, weights_only=True)`, also with `mmap=True`; what Python's `torch.save` wrote, as far as
/// `weights_only=True` allows it, is read here.
struct TorchFile {
  static constexpr std::string_view extension = ".pt";

  /// Throws fabric::Error that names the key of what cannot be written. `memory_of(storage)` gives each storage when it
  /// is its turn, as one in the memory of the processor.
  template <class Sink, class MemoryOf = at::Storage (*)(const at::Storage&)>
  static void write(Sink& sink, const Value& state, Dict manifest, const MemoryOf& memory_of = detail::on_cpu) {
    const detail::PickleWriter pickle(state);
    detail::ZipWriter<Sink> zip(sink);
    Dict records;
    const auto add = [&](const std::string& name, const void* data, std::size_t size) {
      const std::uint32_t crc = zip.add("archive/" + name, data, size);
      records[name] = List{{Value(size), Value(crc)}, false};
    };
    add("data.pkl", pickle.pickle().data(), pickle.pickle().size());
    add("byteorder", "little", 6);
    for (std::size_t i = 0; i < pickle.storages().size(); ++i) {
      const at::Storage storage = memory_of(pickle.storages()[i]);
      add("data/" + std::to_string(i), storage.data(), storage.nbytes());
    }
    add("version", "3\n", 2);
    manifest["format"] = 1;
    manifest["records"] = std::move(records);
    const std::string json = detail::JsonWriter::write(manifest);
    zip.add("archive/fabric.json", json.data(), json.size());
    zip.finish();
  }

  /// Tensors share the memory of `file`. Everything is verified before anything is returned. Throws DamagedCheckpoint.
  [[nodiscard]] static CheckpointContents read(const detail::Bytes& file, const std::string& path) {
    const detail::TorchArchive archive(file, path);
    const detail::ZipReader& zip = archive.zip();
    const std::string& folder = archive.folder();
    zip.verify();
    CheckpointContents contents;
    if (const auto* json = zip.find(folder + "fabric.json")) {
      const Value manifest = detail::JsonReader::read(json->bytes, "the manifest of " + path);
      if (!manifest.is<Dict>()) zip.refuse("its manifest is damaged");
      contents.manifest = manifest.as<Dict>("the manifest");
      std::unordered_map<std::string, std::pair<std::size_t, std::uint32_t>> records;
      for (const auto& record : zip.records()) {
        if (record.name.starts_with(folder)) {
          records[record.name.substr(folder.size())] = {record.bytes.size(), record.crc};
        }
      }
      detail::check_manifest(contents.manifest, records, path);
    }
    contents.state = archive.read();
    return contents;
  }
};

}  // namespace fabric
