// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fabric/error.hpp"

namespace fabric {

/// A checkpoint that cannot be used: it is not there, cut short, damaged, or not of the kind that is read. (A whole one
/// that does not fit the program's state is a plain fabric::Error.)
class DamagedCheckpoint : public Error {
 public:
  using Error::Error;
};

namespace detail {

/// Says that a file cannot be loaded, and why.
struct Refuse {
  const std::string& path;

  [[noreturn]] void operator()(const std::string& why) const {
    throw DamagedCheckpoint("fabric: " + path + " cannot be loaded: " + why);
  }
};

[[noreturn]] inline void file_error(const std::string& what, const std::string& path, int error) {
  throw Error("fabric: cannot " + what + " " + path + ": " + std::strerror(error));
}

/// Bytes and what keeps them in memory. They may be written to, but nobody else sees that.
struct Bytes {
  std::shared_ptr<void> owner;
  char* data = nullptr;
  std::size_t size = 0;

  [[nodiscard]] std::string_view view() const { return {data, size}; }
};

/// A file as memory that is filled from the disk when it is looked at, so that a checkpoint is not in memory twice.
/// Throws DamagedCheckpoint if it cannot be read.
[[nodiscard]] inline Bytes map_file(const std::string& path) {
  const Refuse refuse{path};
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) refuse(std::strerror(errno));
  struct stat facts {};
  if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    close(file);
    refuse("it is not a file");
  }
  Bytes bytes;
  bytes.size = static_cast<std::size_t>(facts.st_size);
  if (bytes.size == 0) {
    close(file);
    return bytes;
  }
  void* memory = mmap(nullptr, bytes.size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  const int error = errno;
  close(file);
  if (memory == MAP_FAILED) refuse(std::strerror(error));
  madvise(memory, bytes.size, MADV_SEQUENTIAL);
  bytes.data = static_cast<char*>(memory);
  bytes.owner = std::shared_ptr<void>(memory, [size = bytes.size](void* mapped) { munmap(mapped, size); });
  return bytes;
}

/// The folder that a file lies in.
[[nodiscard]] inline std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}
[[nodiscard]] inline std::string name_of_file(const std::string& path) { return path.substr(path.rfind('/') + 1); }

/// Makes what was done to the names in a folder survive a crash of the machine.
inline void sync_folder(const std::string& folder) {
  const int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) file_error("open the folder", folder, errno);
  const int result = fsync(file);
  const int error = errno;
  close(file);
  if (result != 0 && error != EINVAL) file_error("sync the folder", folder, error);  // EINVAL: it cannot be synced
}

/// Makes a folder and those that it lies in, as far as they are missing. Throws fabric::Error.
inline void make_folder(const std::string& folder) {
  if (mkdir(folder.c_str(), 0777) == 0 || errno == EEXIST) return;
  const int error = errno;
  if (error == ENOENT && folder_of(folder) != folder) {
    make_folder(folder_of(folder));
    if (mkdir(folder.c_str(), 0777) == 0 || errno == EEXIST) return;
  }
  file_error("make the folder", folder, error);
}

/// A file that is there whole or not at all: it is written under another name beside its place, brought to the disk,
/// and only then renamed. What had the name before stays until then, and for good if anything fails.
class DurableFile {
 public:
  explicit DurableFile(std::string path)
      : path_(std::move(path)), temporary_(folder_of(path_) + "/." + name_of_file(path_) + ".tmp") {
    file_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file_ < 0) file_error("write", temporary_, errno);
  }
  ~DurableFile() {
    if (file_ < 0) return;
    close(file_);
    unlink(temporary_.c_str());
  }
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;

  void write(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t n = ::write(file_, bytes, std::min(size, one_write));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) file_error("write", path_, errno);
      bytes += n;
      size -= static_cast<std::size_t>(n);
      position_ += static_cast<std::size_t>(n);
      // The disk begins while the rest is still being prepared.
      if (position_ - started_ >= one_write) {
        sync_file_range(file_, static_cast<off_t>(started_), static_cast<off_t>(position_ - started_),
                        SYNC_FILE_RANGE_WRITE);
        started_ = position_;
      }
    }
  }

  /// Writes over what stands at `place`.
  void patch(std::size_t place, const void* data, std::size_t size) {
    if (pwrite(file_, data, size, static_cast<off_t>(place)) != static_cast<ssize_t>(size)) {
      file_error("write", path_, errno);
    }
  }

  [[nodiscard]] std::size_t position() const { return position_; }

  /// After this the file is at its place, also after a crash of the machine.
  void commit() {
    if (fsync(file_) != 0) file_error("write", path_, errno);
    const int closed = close(std::exchange(file_, -1));
    int error = errno;
    if (closed == 0 && rename(temporary_.c_str(), path_.c_str()) == 0) {
      sync_folder(folder_of(path_));
      return;
    }
    if (closed == 0) error = errno;
    unlink(temporary_.c_str());
    file_error("write", path_, error);
  }

 private:
  static constexpr std::size_t one_write = std::size_t{8} << 20U;
  std::string path_;
  std::string temporary_;
  int file_ = -1;
  std::size_t position_ = 0;
  std::size_t started_ = 0;
};

/// The same in memory.
struct MemoryFile {
  std::string bytes;

  void write(const void* data, std::size_t size) { bytes.append(static_cast<const char*>(data), size); }
  void patch(std::size_t place, const void* data, std::size_t size) {
    bytes.replace(place, size, static_cast<const char*>(data), size);
  }
  [[nodiscard]] std::size_t position() const { return bytes.size(); }
};

}  // namespace detail
}  // namespace fabric
