// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <torch/types.h>

#include "fabric/error.hpp"
#include "fabric/shard/file_transfers.hpp"
#include "fabric/shard/nameless_file.hpp"

namespace fabric {

namespace detail {

/// Memory of its own addresses for a whole file.
class Mapping {
 public:
  Mapping(std::int64_t bytes, int flags, int descriptor) : bytes_(static_cast<std::size_t>(bytes)) {
    if (bytes == 0) return;
    void* const address = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, descriptor, 0);
    if (address == MAP_FAILED) {
      throw Error("fabric: offload: cannot map " + in_mebibytes(bytes) + ": " + std::generic_category().message(errno));
    }
    address_ = static_cast<char*>(address);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (address_ != nullptr) munmap(address_, bytes_);
  }

  [[nodiscard]] char* address() const { return address_; }
  /// Puts fresh memory, or the file's own pages, in the place of a range. What was there is gone.
  void replace_by_memory(FileRange range) const { replace(range, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1); }
  void replace_by_file(FileRange range, int descriptor) const { replace(range, MAP_SHARED, descriptor); }
  void advise(FileRange range, int advice) const {
    if (range.size > 0) (void)madvise(address_ + range.begin, static_cast<std::size_t>(range.size), advice);
  }

 private:
  void replace(FileRange range, int flags, int descriptor) const {
    const auto size = static_cast<std::size_t>(range.size);
    const off_t at = descriptor < 0 ? 0 : range.begin;
    if (mmap(address_ + range.begin, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, descriptor, at) != MAP_FAILED) {
      return;
    }
    throw Error("fabric: offload: cannot map " + in_mebibytes(range.size) + ": " +
                std::generic_category().message(errno));
  }

  std::size_t bytes_;
  char* address_ = nullptr;
};

}  // namespace detail

/// The file's own pages, shared with the kernel's cache, which decides when they are read and written. What is released
/// is no longer this process's, but stays in the cache while there is room.
class MappedPages {
 public:
  MappedPages(int descriptor, std::int64_t bytes) : descriptor_(descriptor), mapping_(bytes, MAP_SHARED, descriptor) {}

  [[nodiscard]] char* address() const { return mapping_.address(); }
  void begin_fetch(detail::FileRange range) { mapping_.advise(range, MADV_WILLNEED); }
  void finish_fetch(detail::FileRange /*range*/) {}  // the first use of a page waits for it
  void begin_release(detail::FileRange range) {
    mapping_.advise(range, MADV_DONTNEED);  // of a shared mapping: nothing that was written is lost
    (void)sync_file_range(descriptor_, range.begin, range.size, SYNC_FILE_RANGE_WRITE);
  }
  void finish_release(detail::FileRange /*range*/) {}
  void drop(detail::FileRange range) { mapping_.advise(range, MADV_DONTNEED); }

 private:
  int descriptor_;
  detail::Mapping mapping_;
};

/// Memory of the process, into which ranges are read and from which they are written: past the kernel's cache where the
/// file system can do that, so that all memory is bounded; and in the background with liburing (FABRIC_WITH_LIBURING).
/// In the place of what was released lie the file's own pages, so that whoever looks at it finds its values.
class BufferedPages {
 public:
  BufferedPages(int descriptor, std::int64_t bytes)
      : descriptor_(descriptor),
        mapping_(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1),
        transfers_(descriptor, mapping_.address()) {
    // Where this is refused, or reading then fails, it goes by way of the cache.
    const int flags = fcntl(descriptor, F_GETFL);
    if (bytes == 0 || fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) return;
    const auto size = static_cast<std::size_t>(detail::page_bytes);
    if (pread(descriptor, mapping_.address(), size, 0) != detail::page_bytes) (void)fcntl(descriptor, F_SETFL, flags);
  }

  [[nodiscard]] char* address() const { return mapping_.address(); }
  void begin_fetch(detail::FileRange range) {
    mapping_.replace_by_memory(range);
    or_back_to_file(range, [&] { transfers_.begin_read(range); });
  }
  void finish_fetch(detail::FileRange range) {
    or_back_to_file(range, [&] { transfers_.finish(range); });
  }
  void begin_release(detail::FileRange range) { transfers_.begin_write(range); }
  void finish_release(detail::FileRange range) { transfers_.finish(range); }
  void drop(detail::FileRange range) { mapping_.replace_by_file(range, descriptor_); }
  /// Do reads and writes go on while the program does something else?
  [[nodiscard]] bool in_background() const { return transfers_.in_background(); }

 private:
  /// `read()`; if that fails, the file's own pages are there again, and not half of them.
  template <class Read>
  void or_back_to_file(detail::FileRange range, const Read& read) {
    try {
      read();
    } catch (...) {
      mapping_.replace_by_file(range, descriptor_);
      throw;
    }
  }

  int descriptor_;
  detail::Mapping mapping_;
  detail::FileTransfers transfers_;  // before the memory goes, it waits for what is under way
};

/// One or the other, as the program chooses when it runs: `BufferedPages` if `past_cache`.
class OffloadPages {
 public:
  OffloadPages(int descriptor, std::int64_t bytes, bool past_cache)
      : pages_(past_cache ? Either(std::in_place_type<BufferedPages>, descriptor, bytes)
                          : Either(std::in_place_type<MappedPages>, descriptor, bytes)) {}

  [[nodiscard]] char* address() const {
    return std::visit([](const auto& pages) { return pages.address(); }, pages_);
  }
  void begin_fetch(detail::FileRange range) {
    std::visit([&](auto& pages) { pages.begin_fetch(range); }, pages_);
  }
  void finish_fetch(detail::FileRange range) {
    std::visit([&](auto& pages) { pages.finish_fetch(range); }, pages_);
  }
  void begin_release(detail::FileRange range) {
    std::visit([&](auto& pages) { pages.begin_release(range); }, pages_);
  }
  void finish_release(detail::FileRange range) {
    std::visit([&](auto& pages) { pages.finish_release(range); }, pages_);
  }
  void drop(detail::FileRange range) {
    std::visit([&](auto& pages) { pages.drop(range); }, pages_);
  }

 private:
  using Either = std::variant<MappedPages, BufferedPages>;
  Either pages_;
};

/// Tensors on a CPU whose values lie in a file, of which a part is in memory: an optimizer's state that is larger than
/// memory (Rajbhandari et al., "ZeRO-Infinity", SC 2021). The file has no name and is gone when the process is, however
/// it ends.
///
/// A tensor has the same addresses for life. Between `release` and `fetch` its values may be read, slowly, and must not
/// be changed; `prefetch` begins to bring them, and from then on they may not be read either. These take any tensor
/// that lies in one of the store's, and mean the whole of that. To be used by one thread at a time. Tensors may outlive
/// the store.
template <class Pages = OffloadPages>
class FileStore {
 public:
  /// Takes `bytes` of the disk that `folder` is on. Throws fabric::Error that names both if they are not to be had.
  /// `past_cache`, which only `OffloadPages` ask for, reads and writes past the kernel's cache: all memory is bounded,
  /// but while there is room for that cache it is faster.
  template <class... PastCache>
  FileStore(const std::string& folder, std::int64_t bytes, PastCache... past_cache)
      : state_(std::make_shared<State>(folder, rounded(bytes), past_cache...)) {}

  /// The bytes that tensors of so many bytes take of a store.
  [[nodiscard]] static constexpr std::int64_t rounded(std::int64_t bytes) {
    return (bytes + detail::page_bytes - 1) / detail::page_bytes * detail::page_bytes;
  }

  /// A tensor of zeros, in memory. Throws fabric::Error when the store is full.
  [[nodiscard]] at::Tensor tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
    const auto options = at::TensorOptions(dtype);
    const std::int64_t bytes = c10::multiply_integers(sizes) * static_cast<std::int64_t>(c10::elementSize(dtype));
    if (bytes == 0) return at::zeros(sizes, options);
    const detail::FileRange range{state_->end, rounded(bytes)};
    if (range.begin + range.size > state_->bytes) {
      throw Error("fabric: FileStore: " + detail::in_mebibytes(bytes) + " are wanted, but of " +
                  detail::in_mebibytes(state_->bytes) + " only " + detail::in_mebibytes(state_->bytes - state_->end) +
                  " are left: make the store with the sum of rounded(bytes) of its tensors");
    }
    state_->end += range.size;
    state_->regions.emplace(range.begin, Region{range});
    return at::from_blob(
        state_->pages.address() + range.begin, sizes, [state = state_](void* /*data*/) {}, options);
  }

  /// Begins to bring the values back into memory.
  void prefetch(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    Region& region = region_of(tensor);
    if (region.place != Place::away) return;  // what leaves is still here
    state_->pages.begin_fetch(region.range);
    region.place = Place::coming;
  }
  /// Brings the values back into memory, if they are not there. Returns whether they were in the file alone.
  bool fetch(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return false;
    const bool was_away = region_of(tensor).place == Place::away;
    prefetch(tensor);
    state_->bring(region_of(tensor));
    return was_away;
  }
  /// Writes the values of one or more tensors to the file and gives their memory back: at once, or when others are
  /// released.
  void release(at::TensorList tensors) {
    state_->finish_leaving();
    for (const at::Tensor& tensor : tensors) {
      if (tensor.numel() == 0) continue;
      Region& region = region_of(tensor);
      if (region.place == Place::away || region.place == Place::leaving) continue;
      state_->bring(region);
      state_->pages.begin_release(region.range);
      region.place = Place::leaving;
      state_->leaving.push_back(&region);
    }
  }
  /// Gives the memory back of what has not changed since it came from the file: nothing is written.
  void discard(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    Region& region = region_of(tensor);
    if (region.place == Place::away || region.place == Place::leaving) return;
    state_->bring(region);
    state_->pages.drop(region.range);
    region.place = Place::away;
  }
  /// Waits until all that was released is in the file and out of memory.
  void finish() { state_->finish_leaving(); }

  [[nodiscard]] const Pages& pages() const { return state_->pages; }

 private:
  enum class Place : char { here, leaving, away, coming };
  struct Region {
    detail::FileRange range;
    Place place = Place::here;
  };

  struct State {
    template <class... PastCache>
    State(const std::string& folder, std::int64_t size, PastCache... past_cache)
        : bytes(size), file(folder, size), pages(file.descriptor(), size, past_cache...) {}

    /// What could not be written stays in memory.
    void finish_leaving() {
      while (!leaving.empty()) {
        Region& region = *leaving.back();
        leaving.pop_back();
        region.place = Place::here;
        pages.finish_release(region.range);
        pages.drop(region.range);
        region.place = Place::away;
      }
    }
    /// Into memory, what comes or leaves.
    void bring(Region& region) {
      if (region.place == Place::coming) {
        region.place = Place::away;  // if that fails
        pages.finish_fetch(region.range);
      } else if (region.place == Place::leaving) {
        std::erase(leaving, &region);
        region.place = Place::here;
        pages.finish_release(region.range);
      }
      region.place = Place::here;
    }

    std::int64_t bytes;
    detail::NamelessFile file;
    Pages pages;
    std::int64_t end = 0;                    // of the tensors
    std::map<std::int64_t, Region> regions;  // by where they begin
    std::vector<Region*> leaving;
  };

  [[nodiscard]] Region& region_of(const at::Tensor& tensor) const {
    const auto* const data = static_cast<const char*>(tensor.const_data_ptr());
    const std::int64_t at = data - state_->pages.address();
    if (tensor.is_cpu() && at >= 0 && at < state_->end) return std::prev(state_->regions.upper_bound(at))->second;
    throw Error("fabric: FileStore: a tensor that lies in none of the store's was given to it");
  }

  std::shared_ptr<State> state_;
};

}  // namespace fabric
