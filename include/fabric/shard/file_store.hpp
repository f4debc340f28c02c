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

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <torch/torch.h>

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
  void advise(FileRange range, int advice) const {
    if (range.size > 0) (void)madvise(address_ + range.begin, static_cast<std::size_t>(range.size), advice);
  }

 private:
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
  void drop(detail::FileRange /*range*/) {}

 private:
  int descriptor_;
  detail::Mapping mapping_;
};

/// Memory of the process, into which ranges are read and from which they are written: past the kernel's cache where the
/// file system can do that, so that all memory is bounded; and in the background with liburing (FABRIC_WITH_LIBURING).
class BufferedPages {
 public:
  BufferedPages(int descriptor, std::int64_t bytes)
      : mapping_(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), transfers_(descriptor, mapping_.address()) {
    // Where this is refused, or reading then fails, it goes by way of the cache.
    const int flags = fcntl(descriptor, F_GETFL);
    if (bytes == 0 || fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) return;
    if (pread(descriptor, mapping_.address(), page, 0) != page) (void)fcntl(descriptor, F_SETFL, flags);
  }

  [[nodiscard]] char* address() const { return mapping_.address(); }
  void begin_fetch(detail::FileRange range) { transfers_.begin_read(range); }
  void finish_fetch(detail::FileRange range) { transfers_.finish(range); }
  void begin_release(detail::FileRange range) { transfers_.begin_write(range); }
  void finish_release(detail::FileRange range) { transfers_.finish(range); }
  void drop(detail::FileRange range) { mapping_.advise(range, MADV_DONTNEED); }
  /// Do reads and writes go on while the program does something else?
  [[nodiscard]] bool in_background() const { return transfers_.in_background(); }

  static constexpr std::int64_t page = 4096;

 private:
  detail::Mapping mapping_;
  detail::FileTransfers transfers_;  // before the memory goes, it waits for what is under way
};

/// Tensors on a CPU whose values lie in a file, of which a part is in memory: an optimizer's state that is larger than
/// memory (Rajbhandari et al., "ZeRO-Infinity", SC 2021). The file has no name and is gone when the process is, however
/// it ends.
///
/// A tensor has the same addresses for life. Between `release` and `fetch` its values must not be touched; `prefetch`
/// begins to bring them. These take any tensor that lies in one of the store's, and mean the whole of that. To be used
/// by one thread at a time. Tensors may outlive the store.
template <class Pages = MappedPages>
class FileStore {
 public:
  /// Takes `bytes` of the disk that `folder` is on. Throws fabric::Error that names both if they are not to be had.
  FileStore(const std::string& folder, std::int64_t bytes) : state_(std::make_shared<State>(folder, rounded(bytes))) {}

  /// The bytes that tensors of so many bytes take of a store.
  [[nodiscard]] static constexpr std::int64_t rounded(std::int64_t bytes) { return (bytes + page - 1) / page * page; }

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
  /// Brings the values back into memory, if they are not there.
  void fetch(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    prefetch(tensor);
    Region& region = region_of(tensor);
    if (region.place == Place::coming) state_->pages.finish_fetch(region.range);
    if (region.place == Place::leaving) state_->stay(region);
    region.place = Place::here;
  }
  /// Writes the values to the file and gives their memory back: at once, or when the next tensor is released.
  void release(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    Region& region = region_of(tensor);
    if (region.place == Place::away || region.place == Place::leaving) return;
    if (region.place == Place::coming) state_->pages.finish_fetch(region.range);
    state_->finish_leaving();
    state_->pages.begin_release(region.range);
    region.place = Place::leaving;
    state_->leaving = &region;
  }
  /// Waits until all that was released is in the file and out of memory.
  void finish() { state_->finish_leaving(); }

  [[nodiscard]] const Pages& pages() const { return state_->pages; }

 private:
  static constexpr std::int64_t page = 4096;

  enum class Place : char { here, leaving, away, coming };
  struct Region {
    detail::FileRange range;
    Place place = Place::here;
  };

  struct State {
    State(const std::string& folder, std::int64_t size)
        : bytes(size), file(folder, size), pages(file.descriptor(), size) {}

    void finish_leaving() {
      if (leaving == nullptr) return;
      Region& region = *std::exchange(leaving, nullptr);
      pages.finish_release(region.range);
      pages.drop(region.range);
      region.place = Place::away;
    }
    /// What leaves is wanted again.
    void stay(Region& region) {
      leaving = nullptr;
      pages.finish_release(region.range);
    }

    std::int64_t bytes;
    detail::NamelessFile file;
    Pages pages;
    std::int64_t end = 0;                    // of the tensors
    std::map<std::int64_t, Region> regions;  // by where they begin
    Region* leaving = nullptr;
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
