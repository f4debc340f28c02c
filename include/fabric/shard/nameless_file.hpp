// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "fabric/error.hpp"

namespace fabric::detail {

/// Of the page sizes that kernels have on this kind of machine, the largest.
#if defined(__x86_64__)
inline constexpr std::int64_t page_bytes = 4096;
#else
inline constexpr std::int64_t page_bytes = 65536;
#endif

/// A part of a file, in bytes; whole pages.
struct FileRange {
  std::int64_t begin = 0;
  std::int64_t size = 0;
};

inline std::string in_mebibytes(std::int64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%lld bytes (%.1f MiB)", static_cast<long long>(bytes),
                static_cast<double>(bytes) / (1 << 20));
  return text;
}

/// A file that has its whole size and no name: when the process ends, however it does, the space is free again.
class NamelessFile {
 public:
  /// Throws fabric::Error if `folder` cannot hold such a file.
  NamelessFile(const std::string& folder, std::int64_t bytes) : descriptor_(open_in(folder)) {
    try {
      reserve(folder, bytes);
    } catch (...) {
      close(descriptor_);
      throw;
    }
  }
  NamelessFile(const NamelessFile&) = delete;
  NamelessFile& operator=(const NamelessFile&) = delete;
  ~NamelessFile() { close(descriptor_); }

  [[nodiscard]] int descriptor() const { return descriptor_; }

 private:
  static int open_in(const std::string& folder) {
    const int nameless = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (nameless >= 0) return nameless;
    std::string path = folder + "/fabric-offload-XXXXXX";  // for file systems that have no O_TMPFILE
    const int named = mkostemp(path.data(), O_CLOEXEC);
    if (named < 0) {
      throw Error("fabric: offload: no file can be made in the folder " + folder + ": " +
                  std::generic_category().message(errno) +
                  ". Name one that exists and can be written, on a fast local disk");
    }
    unlink(path.c_str());
    return named;
  }

  void reserve(const std::string& folder, std::int64_t bytes) const {
    struct statvfs space {};
    const bool known = fstatvfs(descriptor_, &space) == 0;
    const auto free = static_cast<std::int64_t>(space.f_bavail) * static_cast<std::int64_t>(space.f_frsize);
    // Asked first: what fails would have filled the disk before it does, and others would fail too.
    const int error = known && free < bytes ? ENOSPC : bytes == 0 ? 0 : posix_fallocate(descriptor_, 0, bytes);
    if (error == 0) return;
    throw Error("fabric: offload: the folder " + folder + " cannot hold " + in_mebibytes(bytes) + ": " +
                std::generic_category().message(error) + (known ? "; " + in_mebibytes(free) + " are free" : "") +
                ". Each rank needs as much. Make room, name a folder on another disk, or shard over more ranks");
  }

  int descriptor_;
};

}  // namespace fabric::detail
