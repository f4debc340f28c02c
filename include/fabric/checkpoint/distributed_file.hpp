// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <sys/stat.h>

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/crc32.hpp"
#include "fabric/checkpoint/distributed_metadata.hpp"
#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/json.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/checkpoint/zip.hpp"

/// The files of a distributed checkpoint: one for each rank, in which items follow each other, each an archive of
/// `torch.save`; `.metadata`, which says what they are; and `fabric.json`, which Python passes over, with the checksums
/// of parts of large items, so that a rank that reads a part can verify what it reads.
namespace fabric::detail {

namespace dcp {
inline constexpr const char* metadata_name = ".metadata";
inline constexpr const char* manifest_name = "fabric.json";
/// Behind the pickle in `.metadata`, where Python does not look: this, the checksum of the pickle, that of fabric.json.
inline constexpr std::string_view trailer = "FABRIC1\n";
inline constexpr std::size_t alignment = 64;
}  // namespace dcp

/// What one rank writes, and what stands where then.
class DistributedFile {
 public:
  DistributedFile(const std::string& folder, const std::string& name) : name_(name), file_(folder + "/" + name) {}

  /// Adds a part of a tensor: `part` has the sizes of `box`. Throws fabric::Error for what cannot be written.
  void add(const std::string& key, StoredEntry::Path path, at::IntArrayRef sizes, const Box& box,
           const at::Tensor& part) {
    check_writable(part, key);
    StoredEntry& entry = entry_of(key, std::move(path));
    entry.dtype = part.scalar_type();
    entry.sizes = sizes.vec();
    // A tensor that has its storage for itself, since storages are saved whole.
    const at::Tensor plain = part.detach().cpu().contiguous();
    const at::Tensor alone = at::from_blob(plain.data_ptr(), plain.sizes(), plain.options());
    write_item(entry, box, alone);
  }
  /// Adds a value that is no tensor.
  void add(const std::string& key, StoredEntry::Path path, const Value& value) {
    write_item(entry_of(key, std::move(path)), {}, value);
  }

  /// Brings the file to the disk.
  void commit() { file_.commit(); }

  [[nodiscard]] const std::vector<StoredEntry>& entries() const { return entries_; }
  /// For the manifest: the file's size, and the checksums of large items by their places.
  [[nodiscard]] Dict facts() const { return {{"size", file_.position()}, {"items", steps_}}; }
  [[nodiscard]] const std::string& name() const { return name_; }

 private:
  /// A part of the file that is a file of its own to who writes it.
  struct Section {
    DurableFile& file;
    std::size_t start;
    void write(const void* data, std::size_t size) { file.write(data, size); }
    void patch(std::size_t place, const void* data, std::size_t size) { file.patch(start + place, data, size); }
    [[nodiscard]] std::size_t position() const { return file.position() - start; }
  };

  StoredEntry& entry_of(const std::string& key, StoredEntry::Path path) {
    const auto [place, added] = places_.emplace(key, entries_.size());
    if (added) {
      StoredEntry& entry = entries_.emplace_back();
      entry.key = key;
      entry.path = std::move(path);
    } else if (entries_[place->second].path != path) {
      refuse_to_write(key, "is the key of two values: names with dots come to the same");
    }
    return entries_[place->second];
  }

  void write_item(StoredEntry& entry, Box box, const Value& value) {
    const std::string padding((dcp::alignment - file_.position() % dcp::alignment) % dcp::alignment, '\0');
    file_.write(padding.data(), padding.size());
    StoredItem item{std::move(box), name_, file_.position(), 0};
    Section section{file_, file_.position()};
    ZipWriter zip(section);
    const PickleWriter pickle(value);
    zip.add("archive/data.pkl", pickle.pickle().data(), pickle.pickle().size());
    zip.add("archive/byteorder", "little", 6);
    for (std::size_t i = 0; i < pickle.storages().size(); ++i) {
      const at::Storage storage = on_cpu(pickle.storages()[i]);
      std::vector<std::uint32_t> steps;
      zip.add("archive/data/" + std::to_string(i), storage.data(), storage.nbytes(), &steps);
      if (entry.is_tensor() && steps.size() > 1) steps_[std::to_string(item.offset)] = hexadecimal(steps);
    }
    zip.add("archive/version", "3\n", 2);
    zip.finish();
    item.length = section.position();
    entry.items.push_back(std::move(item));
  }

  static std::string hexadecimal(const std::vector<std::uint32_t>& numbers) {
    std::string text;
    char digits[16];
    for (const std::uint32_t number : numbers) {
      std::snprintf(digits, sizeof digits, "%08x", number);
      text += digits;
    }
    return text;
  }

  std::string name_;
  DurableFile file_;
  std::vector<StoredEntry> entries_;
  std::unordered_map<std::string, std::size_t> places_;
  Dict steps_;
};

/// Writes what makes a folder of such files a checkpoint, `.metadata` last.
inline void write_distributed_metadata(const std::string& folder, const std::vector<StoredEntry>& entries,
                                       const Dict& manifest) {
  const auto write = [&](const char* name, const std::string& bytes) {
    DurableFile file(folder + "/" + name);
    file.write(bytes.data(), bytes.size());
    file.commit();
  };
  const std::string json = JsonWriter::write(manifest);
  write(dcp::manifest_name, json);
  std::string metadata = DistributedMetadataWriter(entries).pickle();
  const std::uint32_t checksums[] = {crc32(metadata.data(), metadata.size()), crc32(json.data(), json.size())};
  metadata += dcp::trailer;
  metadata.append(reinterpret_cast<const char*>(checksums), sizeof checksums);
  write(dcp::metadata_name, metadata);
}

/// A distributed checkpoint on the disk, of this library or of Python. Files are mapped, so that only those parts come
/// to memory that are looked at.
class DistributedReader {
 public:
  /// Where a part of a tensor is to go: `target` has the sizes of `box`.
  struct Wanted {
    Box box;
    at::Tensor target;
  };

  /// Throws DamagedCheckpoint unless the metadata is sound, and every file is there and as large as it says.
  explicit DistributedReader(std::string folder) : folder_(std::move(folder)) {
    const std::string path = folder_ + "/" + dcp::metadata_name;
    const Bytes metadata = map_file(path);
    std::string_view rest;
    entries_ = DistributedMetadataReader::read(metadata.view(), path, &rest);
    if (!rest.empty()) read_manifest(metadata.view(), rest);
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      places_.emplace(entries_[i].key, i);
      for (const StoredItem& item : entries_[i].items) {
        if (!item.file.empty()) check_place(item);
      }
    }
  }

  [[nodiscard]] const std::string& folder() const { return folder_; }
  [[nodiscard]] const std::vector<StoredEntry>& entries() const { return entries_; }
  /// Null if there is none of that key.
  [[nodiscard]] const StoredEntry* find(const std::string& key) const {
    const auto found = places_.find(key);
    return found == places_.end() ? nullptr : &entries_[found->second];
  }
  /// By what it was saved; empty if that was not this library.
  [[nodiscard]] const Dict& manifest() const { return manifest_; }

  /// A value that is no tensor. Throws DamagedCheckpoint.
  [[nodiscard]] Value value(const StoredEntry& entry) const {
    const StoredItem& item = entry.items.at(0);
    const TorchArchive archive = archive_of(entry, item);
    archive.zip().verify();
    return archive.read();
  }

  /// Throws DamagedCheckpoint unless that part of a tensor can be read and is what was saved.
  void check(const StoredEntry& entry, const Box& wanted) const {
    each_part(entry, wanted, [&](const StoredItem& item, const Box& common) {
      const TorchArchive archive = archive_of(entry, item);
      const at::Tensor stored = tensor_of(archive, entry, item);
      for (const ZipRecord& record : archive.zip().records()) {
        if (record.name != archive.folder() + "data/0") archive.zip().verify(record);
      }
      if (const ZipRecord* data = archive.zip().find(archive.folder() + "data/0")) {
        verify(archive.zip(), *data, item, part_of(stored, item.box, common));
      }
    });
  }
  /// Copies a part of a tensor, to another device and dtype if need be.
  void read(const StoredEntry& entry, const Wanted& wanted) const {
    const c10::NoGradGuard no_grad;
    each_part(entry, wanted.box, [&](const StoredItem& item, const Box& common) {
      const at::Tensor stored = tensor_of(archive_of(entry, item), entry, item);
      part_of(wanted.target, wanted.box, common).copy_(readable(part_of(stored, item.box, common)));
    });
  }

 private:
  [[nodiscard]] std::string path_of(const std::string& file) const { return folder_ + "/" + file; }

  template <class Visit>
  static void each_part(const StoredEntry& entry, const Box& wanted, const Visit& visit) {
    for (const StoredItem& item : entry.items) {
      if (const auto common = intersection(item.box, wanted)) visit(item, *common);
    }
  }

  void read_manifest(std::string_view metadata, std::string_view rest) {
    const Refuse refuse{folder_};
    if (rest.size() != dcp::trailer.size() + 8 || !rest.starts_with(dcp::trailer)) {
      refuse("its .metadata goes on after its end");
    }
    if (crc32(metadata.data(), metadata.size() - rest.size()) != number_at<std::uint32_t>(rest, dcp::trailer.size())) {
      refuse("the checksum of its .metadata is wrong");
    }
    const std::string path = path_of(dcp::manifest_name);
    const Bytes json = map_file(path);
    if (crc32(json.data, json.size) != number_at<std::uint32_t>(rest, dcp::trailer.size() + 4)) {
      refuse("its fabric.json is not the one that was saved");
    }
    const Value manifest = JsonReader::read(json.view(), "the manifest of " + folder_);
    const auto* dict = std::get_if<Dict>(&manifest.data());
    const Value* format = dict == nullptr ? nullptr : dict->find("format");
    if (format == nullptr || !format->is<std::int64_t>()) refuse("its manifest is damaged");
    if (const auto number = std::get<std::int64_t>(format->data()); number != 1) {
      refuse("it is of format " + std::to_string(number) + ", which a newer version of this library wrote: 1 is read");
    }
    manifest_ = *dict;
    const Value* files = manifest_.find("files");
    if (files == nullptr || !files->is<Dict>()) refuse("its manifest is damaged");
    for (const auto& [name, facts] : std::get<Dict>(files->data())) {
      const auto* known = std::get_if<Dict>(&facts.data());
      const Value* size = known == nullptr ? nullptr : known->find("size");
      const Value* items = known == nullptr ? nullptr : known->find("items");
      if (size == nullptr || !size->is<std::int64_t>() || items == nullptr || !items->is<Dict>()) {
        refuse("its manifest is damaged");
      }
      if (static_cast<std::int64_t>(size_of(to_text(name))) != std::get<std::int64_t>(size->data())) {
        refuse("its file " + to_text(name) + " is cut short, or not the one that was saved");
      }
    }
  }

  std::uint64_t size_of(const std::string& file) const {
    const auto known = sizes_.find(file);
    if (known != sizes_.end()) return known->second;
    struct stat facts {};
    const std::string path = path_of(file);
    if (stat(path.c_str(), &facts) != 0) Refuse{folder_}("its file " + file + ": " + std::strerror(errno));
    return sizes_.emplace(file, static_cast<std::uint64_t>(facts.st_size)).first->second;
  }
  void check_place(const StoredItem& item) const {
    const std::uint64_t size = size_of(item.file);
    if (item.offset > size || item.length > size - item.offset) {
      Refuse{folder_}("its file " + item.file + " is cut short: it has " + std::to_string(size) +
                      " bytes, and should have " + std::to_string(item.offset + item.length) + " or more");
    }
  }

  [[nodiscard]] TorchArchive archive_of(const StoredEntry& entry, const StoredItem& item) const {
    auto known = files_.find(item.file);
    if (known == files_.end()) known = files_.emplace(item.file, map_file(path_of(item.file))).first;
    const Bytes& file = known->second;
    const std::string name = path_of(item.file) + " ('" + entry.key + "')";
    if (item.offset > file.size || item.length > file.size - item.offset) Refuse{name}("the file has become shorter");
    if (item.length < 4 || number_at<std::uint32_t>({file.data + item.offset, 4}, 0) != zip::local_signature) {
      Refuse{name}("it is no archive of torch.save (of SerializationFormat.SAFETENSORS, or damaged)");
    }
    return TorchArchive({file.owner, file.data + item.offset, item.length}, name);
  }

  static at::Tensor tensor_of(const TorchArchive& archive, const StoredEntry& entry, const StoredItem& item) {
    const Value value = archive.read(/*in_place=*/true);
    const auto* tensor = std::get_if<at::Tensor>(&value.data());
    if (tensor == nullptr || tensor->sizes() != at::IntArrayRef(item.box.sizes) ||
        tensor->scalar_type() != *entry.dtype) {
      archive.zip().refuse("it is not the part of the tensor that .metadata says");
    }
    return *tensor;
  }

  /// Verifies the bytes of a part of what a record holds: all of them where the record is small or all is wanted, else
  /// those whose checksums are known.
  void verify(const ZipReader& zip, const ZipRecord& data, const StoredItem& item, const at::Tensor& part) const {
    zip.verify_stored(data);
    if (data.bytes.size() <= zip::step) return zip.verify(data);
    const std::string* steps = steps_of(item);
    const std::size_t count = (data.bytes.size() + zip::step - 1) / zip::step;
    if (steps != nullptr && steps->size() != 8 * count) zip.refuse("its checksums are damaged");
    // If the tensor is in another record after all, that was verified as a whole.
    if (part.storage().nbytes() != data.bytes.size()) return zip.verify(data);
    const auto [first, last] = range_of(part);
    if (steps == nullptr) {
      if (last - first == data.bytes.size()) zip.verify(data);
      return;
    }
    for (std::size_t i = first / zip::step; i * zip::step < last; ++i) {
      const std::string_view bytes = data.bytes.substr(i * zip::step, zip::step);
      const std::uint32_t before = i == 0 ? 0 : number_of(*steps, i - 1);
      if (crc32(bytes.data(), bytes.size(), before) != number_of(*steps, i)) zip.refuse_checksum(data);
    }
  }

  /// The bytes of its storage that a tensor with elements lies in.
  static std::pair<std::size_t, std::size_t> range_of(const at::Tensor& part) {
    std::int64_t last = part.storage_offset();
    for (std::int64_t i = 0; i < part.dim(); ++i) last += (part.size(i) - 1) * part.stride(i);
    return {static_cast<std::size_t>(part.storage_offset()) * part.element_size(),
            static_cast<std::size_t>(last + 1) * part.element_size()};
  }
  /// The tensor, copied if the processor cannot read it where it lies: Python's items begin anywhere.
  static at::Tensor readable(const at::Tensor& part) {
    const auto* bytes = static_cast<const char*>(part.storage().data());
    if (is_aligned(bytes)) return part;
    const auto [first, last] = range_of(part);
    const at::Tensor copy = at::empty({static_cast<std::int64_t>(last - first)}, at::kByte);
    std::memcpy(copy.data_ptr(), bytes + first, last - first);
    return at::empty({0}, part.options()).set_(copy.storage(), 0, part.sizes(), part.strides());
  }
  [[nodiscard]] const std::string* steps_of(const StoredItem& item) const {
    const Value* files = manifest_.find("files");
    const Value* facts = files == nullptr ? nullptr : std::get<Dict>(files->data()).find(item.file);
    if (facts == nullptr) return nullptr;
    const Dict& items = std::get<Dict>(std::get<Dict>(facts->data()).at("items").data());
    const Value* steps = items.find(std::to_string(item.offset));
    return steps == nullptr ? nullptr : std::get_if<std::string>(&steps->data());
  }
  static std::uint32_t number_of(const std::string& hexadecimal, std::size_t place) {
    std::uint32_t number = 0;
    std::from_chars(hexadecimal.data() + 8 * place, hexadecimal.data() + 8 * (place + 1), number, 16);
    return number;  // if those were no digits, a wrong one
  }

  std::string folder_;
  std::vector<StoredEntry> entries_;
  std::unordered_map<std::string, std::size_t> places_;
  Dict manifest_;
  mutable std::unordered_map<std::string, std::uint64_t> sizes_;
  mutable std::unordered_map<std::string, Bytes> files_;
};

}  // namespace fabric::detail
