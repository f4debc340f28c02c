// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fabric/checkpoint/crc32.hpp"
#include "fabric/checkpoint/file.hpp"

/// Zip archives of stored records, which is what `torch.save` writes: reading one from memory, and writing one. Not by
/// LibTorch's PyTorchStreamReader, which is built without the comparison of checksums: a flipped bit comes through it,
/// here as in `torch.load`.
namespace fabric::detail {

/// A number that a file holds, little-endian.
template <class Number>
[[nodiscard]] Number number_at(std::string_view bytes, std::size_t place) {
  Number number;
  std::memcpy(&number, bytes.data() + place, sizeof number);
  return number;
}

namespace zip {
inline constexpr std::uint32_t local_signature = 0x04034b50;
inline constexpr std::uint32_t central_signature = 0x02014b50;
inline constexpr std::uint32_t end_signature = 0x06054b50;
inline constexpr std::uint32_t end64_signature = 0x06064b50;
inline constexpr std::uint32_t locator_signature = 0x07064b50;
inline constexpr std::size_t local_size = 30;
inline constexpr std::size_t central_size = 46;
inline constexpr std::size_t end_size = 22;
inline constexpr std::size_t end64_size = 56;
inline constexpr std::size_t locator_size = 20;
inline constexpr std::size_t step = std::size_t{1} << 20U;  // so much stays in the cache between checksum and write
inline constexpr std::uint32_t see_zip64 = 0xFFFFFFFF;      // the number stands in an extra field of 64 bits
}  // namespace zip

/// One record of an archive.
struct ZipRecord {
  std::string name;
  std::string_view bytes;
  std::uint32_t crc = 0;
  bool stored = true;  ///< Not compressed.
};

/// The records of an archive in memory. Every size and place is checked against the memory, and no two records share a
/// byte, before anything is done with them.
class ZipReader {
 public:
  /// Throws DamagedCheckpoint; `path` is for its message.
  ZipReader(std::string_view file, std::string path) : file_(file), path_(std::move(path)) {
    const Directory directory = find_directory();
    std::size_t place = directory.place;
    for (std::uint64_t i = 0; i < directory.entries; ++i) place = read_entry(place, directory);
    if (place != directory.place + directory.size) refuse("its directory does not end where it should");
    refuse_overlaps();
    for (std::size_t i = 0; i < records_.size(); ++i) {
      if (!places_.emplace(records_[i].name, i).second) refuse("it has two records " + records_[i].name);
    }
  }

  [[nodiscard]] const std::vector<ZipRecord>& records() const { return records_; }
  /// Null if there is none of that name.
  [[nodiscard]] const ZipRecord* find(const std::string& name) const {
    const auto place = places_.find(name);
    return place == places_.end() ? nullptr : &records_[place->second];
  }

  /// Throws DamagedCheckpoint unless every record is what was written. None may be compressed.
  void verify() const {
    for (const ZipRecord& record : records_) verify(record);
  }
  /// The same for one of them.
  void verify(const ZipRecord& record) const {
    verify_stored(record);
    if (crc32(record.bytes.data(), record.bytes.size()) != record.crc) refuse_checksum(record);
  }
  void verify_stored(const ZipRecord& record) const {
    if (!record.stored) refuse("its record " + record.name + " is compressed, which torch.save does not do");
  }
  [[noreturn]] void refuse_checksum(const ZipRecord& record) const {
    refuse("the checksum of its record " + record.name +
           " is wrong (a file of torch.serialization.set_crc32_options(False) has none: save it again with True)");
  }

  [[noreturn]] void refuse(const std::string& why) const { Refuse{path_}(why); }

 private:
  struct Directory {
    std::uint64_t place = 0;
    std::uint64_t size = 0;
    std::uint64_t entries = 0;
  };

  template <class Number>
  [[nodiscard]] Number number(std::size_t place) const {
    if (place > file_.size() || file_.size() - place < sizeof(Number)) refuse("it is cut short");
    return number_at<Number>(file_, place);
  }

  /// The directory stands at the end, so that a file that is cut short has none.
  [[nodiscard]] Directory find_directory() const {
    const std::size_t furthest = std::min<std::size_t>(file_.size(), zip::end_size + 0xFFFF);
    std::size_t end = file_.size() + 1;
    for (std::size_t back = zip::end_size; back <= furthest; ++back) {
      const std::size_t place = file_.size() - back;
      if (number<std::uint32_t>(place) == zip::end_signature &&
          number<std::uint16_t>(place + 20) == back - zip::end_size) {
        end = place;
        break;
      }
    }
    if (end > file_.size()) {
      const bool pickle = file_.size() > 1 && file_[0] == '\x80' && file_[1] == '\x02';
      refuse(pickle ? "it is in the format that torch.save had before 1.6: load it in Python and save it again"
                    : "it is no zip archive, or cut short");
    }
    Directory directory{number<std::uint32_t>(end + 16), number<std::uint32_t>(end + 12),
                        number<std::uint16_t>(end + 10)};
    std::size_t directory_end = end;
    // torch.save always writes the wide form, too.
    if (end >= zip::locator_size && number<std::uint32_t>(end - zip::locator_size) == zip::locator_signature) {
      const auto end64 = number<std::uint64_t>(end - zip::locator_size + 8);
      if (end64 > file_.size() || number<std::uint32_t>(end64) != zip::end64_signature) {
        refuse("the end of its directory is damaged");
      }
      directory = {number<std::uint64_t>(end64 + 48), number<std::uint64_t>(end64 + 40),
                   number<std::uint64_t>(end64 + 32)};
      directory_end = end64;
    }
    if (directory.place > directory_end || directory.size != directory_end - directory.place ||
        directory.entries > directory.size / zip::central_size) {
      refuse("its directory is damaged or in another place");
    }
    return directory;
  }

  /// Reads the entry at `place` and returns the place of the next.
  std::size_t read_entry(std::size_t place, const Directory& directory) {
    const std::size_t end = directory.place + directory.size;
    if (end - place < zip::central_size || number<std::uint32_t>(place) != zip::central_signature) {
      refuse("its directory is damaged");
    }
    const auto flags = number<std::uint16_t>(place + 8);
    const auto method = number<std::uint16_t>(place + 10);
    std::uint64_t packed = number<std::uint32_t>(place + 20);
    std::uint64_t size = number<std::uint32_t>(place + 24);
    const std::size_t name_size = number<std::uint16_t>(place + 28);
    const std::size_t extra_size = number<std::uint16_t>(place + 30);
    const std::size_t comment_size = number<std::uint16_t>(place + 32);
    std::uint64_t local = number<std::uint32_t>(place + 42);
    const std::size_t next = place + zip::central_size + name_size + extra_size + comment_size;
    if (next > end) refuse("its directory is damaged");
    ZipRecord record;
    record.name = file_.substr(place + zip::central_size, name_size);
    record.crc = number<std::uint32_t>(place + 16);
    read_zip64(file_.substr(place + zip::central_size + name_size, extra_size), {&size, &packed, &local});
    if ((flags & 1U) != 0) refuse("its record " + record.name + " is encrypted");
    record.stored = method == 0 && packed == size;
    if (local > directory.place || directory.place - local < zip::local_size ||
        number<std::uint32_t>(local) != zip::local_signature || number<std::uint16_t>(local + 26) != name_size) {
      refuse("its record " + record.name + " is not where it should be");
    }
    const std::size_t start = local + zip::local_size + name_size + number<std::uint16_t>(local + 28);
    if (start > directory.place || packed > directory.place - start ||
        file_.substr(local + zip::local_size, name_size) != record.name) {
      refuse("its record " + record.name + " is not where it should be");
    }
    record.bytes = file_.substr(start, packed);
    spans_.emplace_back(local, start + packed);
    records_.push_back(std::move(record));
    return next;
  }

  /// The numbers that did not fit 32 bits, in their order.
  void read_zip64(std::string_view extra, const std::array<std::uint64_t*, 3>& numbers) const {
    while (extra.size() >= 4) {
      const auto id = number_at<std::uint16_t>(extra, 0);
      const std::size_t size = number_at<std::uint16_t>(extra, 2);
      extra.remove_prefix(4);
      if (size > extra.size()) refuse("its directory is damaged");
      if (id == 1) {
        std::string_view field = extra.substr(0, size);
        for (std::uint64_t* wide : numbers) {
          if (*wide != zip::see_zip64) continue;
          if (field.size() < 8) refuse("its directory is damaged");
          *wide = number_at<std::uint64_t>(field, 0);
          field.remove_prefix(8);
        }
        return;
      }
      extra.remove_prefix(size);
    }
  }

  void refuse_overlaps() {
    std::sort(spans_.begin(), spans_.end());
    for (std::size_t i = 1; i < spans_.size(); ++i) {
      if (spans_[i].first < spans_[i - 1].second) refuse("two of its records lie over one another");
    }
  }

  std::string_view file_;
  std::string path_;
  std::vector<ZipRecord> records_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans_;
  std::unordered_map<std::string, std::size_t> places_;
};

/// Writes an archive into a sink (DurableFile, MemoryFile). The data of each record begins at a multiple of 64 bytes,
/// so that it can be used where it lies.
template <class Sink>
class ZipWriter {
 public:
  /// With `always_zip64` every number is written in the form for archives beyond 4 GB.
  explicit ZipWriter(Sink& sink, bool always_zip64 = false) : sink_(sink), always_zip64_(always_zip64) {}

  /// Adds a record and returns its checksum. `steps` gets the checksum up to the end of each `zip::step` bytes.
  std::uint32_t add(const std::string& name, const void* data, std::size_t size,
                    std::vector<std::uint32_t>* steps = nullptr) {
    Entry entry{name, size, sink_.position(), 0};
    const bool wide = always_zip64_ || size >= zip::see_zip64;
    std::string extra;
    if (wide) {
      put<std::uint16_t>(extra, 1);
      put<std::uint16_t>(extra, 16);
      put<std::uint64_t>(extra, size);
      put<std::uint64_t>(extra, size);
    }
    const std::size_t start = entry.place + zip::local_size + name.size() + extra.size() + padding_header;
    const std::size_t padding = (alignment - start % alignment) % alignment;
    put<std::uint16_t>(extra, 0x4246);  // "FB", as PyTorch names its padding
    put<std::uint16_t>(extra, padding);
    extra.append(padding, '\0');

    std::string header;
    put<std::uint32_t>(header, zip::local_signature);
    put_common(header, 0, wide ? zip::see_zip64 : size, name.size(), extra.size());
    header += name;
    header += extra;
    sink_.write(header.data(), header.size());
    for (std::size_t done = 0; done < size; done += zip::step) {
      const char* part = static_cast<const char*>(data) + done;
      const std::size_t part_size = std::min(zip::step, size - done);
      entry.crc = crc32(part, part_size, entry.crc);
      if (steps != nullptr) steps->push_back(entry.crc);
      sink_.write(part, part_size);
    }
    sink_.patch(entry.place + 14, &entry.crc, sizeof entry.crc);
    entries_.push_back(entry);
    return entry.crc;
  }

  /// Writes the directory, without which nobody can read the archive.
  void finish() {
    const std::size_t place = sink_.position();
    std::string directory;
    for (const Entry& entry : entries_) add_to(directory, entry);
    const std::size_t size = directory.size();
    const std::size_t count = entries_.size();
    const bool wide = always_zip64_ || place >= zip::see_zip64 || size >= zip::see_zip64 || count >= 0xFFFF;
    if (wide) {
      put<std::uint32_t>(directory, zip::end64_signature);
      put<std::uint64_t>(directory, zip::end64_size - 12);
      put<std::uint16_t>(directory, version);
      put<std::uint16_t>(directory, version);
      put<std::uint64_t>(directory, 0);
      put<std::uint64_t>(directory, count);
      put<std::uint64_t>(directory, count);
      put<std::uint64_t>(directory, size);
      put<std::uint64_t>(directory, place);
      put<std::uint32_t>(directory, zip::locator_signature);
      put<std::uint32_t>(directory, 0);
      put<std::uint64_t>(directory, place + size);
      put<std::uint32_t>(directory, 1);
    }
    put<std::uint32_t>(directory, zip::end_signature);
    put<std::uint32_t>(directory, 0);
    put<std::uint16_t>(directory, wide ? 0xFFFF : count);
    put<std::uint16_t>(directory, wide ? 0xFFFF : count);
    put<std::uint32_t>(directory, wide ? zip::see_zip64 : size);
    put<std::uint32_t>(directory, wide ? zip::see_zip64 : place);
    put<std::uint16_t>(directory, 0);
    sink_.write(directory.data(), directory.size());
  }

 private:
  struct Entry {
    std::string name;
    std::uint64_t size = 0;
    std::uint64_t place = 0;
    std::uint32_t crc = 0;
  };
  static constexpr std::size_t alignment = 64;
  static constexpr std::size_t padding_header = 4;
  static constexpr std::uint16_t version = 45;

  template <class Number, class Given>
  static void put(std::string& text, Given number) {
    const auto exact = static_cast<Number>(number);
    text.append(reinterpret_cast<const char*>(&exact), sizeof exact);
  }

  /// What the local and the central header have in common.
  static void put_common(std::string& header, std::uint32_t crc, std::uint64_t size, std::size_t name_size,
                         std::size_t extra_size) {
    put<std::uint16_t>(header, version);
    put<std::uint16_t>(header, 0);       // flags
    put<std::uint16_t>(header, 0);       // stored
    put<std::uint16_t>(header, 0);       // no time, so that equal states are equal files
    put<std::uint16_t>(header, 0x0021);  // 1980-01-01
    put<std::uint32_t>(header, crc);
    put<std::uint32_t>(header, size);
    put<std::uint32_t>(header, size);
    put<std::uint16_t>(header, name_size);
    put<std::uint16_t>(header, extra_size);
  }

  void add_to(std::string& directory, const Entry& entry) const {
    const bool wide = always_zip64_ || entry.size >= zip::see_zip64;
    const bool far = always_zip64_ || entry.place >= zip::see_zip64;
    std::string extra;
    if (wide || far) {
      put<std::uint16_t>(extra, 1);
      put<std::uint16_t>(extra, (wide ? 16 : 0) + (far ? 8 : 0));
      if (wide) put<std::uint64_t>(extra, entry.size);
      if (wide) put<std::uint64_t>(extra, entry.size);
      if (far) put<std::uint64_t>(extra, entry.place);
    }
    put<std::uint32_t>(directory, zip::central_signature);
    put<std::uint16_t>(directory, version);
    put_common(directory, entry.crc, wide ? zip::see_zip64 : entry.size, entry.name.size(), extra.size());
    put<std::uint16_t>(directory, 0);
    put<std::uint16_t>(directory, 0);
    put<std::uint16_t>(directory, 0);
    put<std::uint32_t>(directory, 0);
    put<std::uint32_t>(directory, far ? zip::see_zip64 : entry.place);
    directory += entry.name;
    directory += extra;
  }

  Sink& sink_;
  bool always_zip64_;
  std::vector<Entry> entries_;
};

}  // namespace fabric::detail
