// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// A folder that is there whole or not at all: it is filled under another name beside its place, and then takes the
/// place, at once where the file system can exchange two names. What had the name before stays until then.
class ReplacedFolder {
 public:
  explicit ReplacedFolder(std::string path) : path_(std::move(path)) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  }

  /// Where the folder is filled.
  [[nodiscard]] std::string temporary() const { return beside(".tmp"); }

  /// The folder, or where it is if a job was killed while it was replaced on a file system that cannot exchange names.
  [[nodiscard]] std::string existing(const std::string& needed) const {
    const std::string old = beside(".old");
    return access((path_ + "/" + needed).c_str(), F_OK) != 0 && access((old + "/" + needed).c_str(), F_OK) == 0 ? old
                                                                                                                : path_;
  }

  /// Makes an empty temporary folder. `belongs(name)` says whether a file is one that may be replaced: throws
  /// fabric::Error if the folder has others, which would be lost.
  template <class Belongs>
  void begin(const Belongs& belongs) const {
    std::error_code error;
    const auto status = std::filesystem::status(path_, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_directory(status)) {
      throw Error("fabric: cannot write the folder " + path_ + ": a file has that name");
    }
    if (std::filesystem::is_directory(status)) {
      for (const auto& entry : std::filesystem::directory_iterator(path_, error)) {
        if (belongs(entry.path().filename().string())) continue;
        throw Error("fabric: cannot replace the folder " + path_ + ": it has " + entry.path().filename().string() +
                    ", which is no part of a checkpoint and would be lost. Choose a folder of its own");
      }
    }
    make_folder(folder_of(path_));
    remove(temporary());
    make_folder(temporary());
  }
  /// The temporary folder, whose files are on the disk, takes its place.
  void commit() const {
    const std::string from = temporary();
    const std::string old = beside(".old");
    if (access(path_.c_str(), F_OK) != 0) {
      if (rename(from.c_str(), path_.c_str()) != 0) file_error("write", path_, errno);
    } else if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, path_.c_str(), RENAME_EXCHANGE) != 0) {
      if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) file_error("write", path_, errno);
      remove(old);
      if (rename(path_.c_str(), old.c_str()) != 0 || rename(from.c_str(), path_.c_str()) != 0) {
        file_error("write", path_, errno);
      }
    }
    sync_folder(folder_of(path_));
    remove(from);
    remove(old);
  }
  /// Removes what was written so far.
  void abandon() const { remove(temporary()); }

 private:
  [[nodiscard]] std::string beside(const char* ending) const {
    return folder_of(path_) + "/." + name_of_file(path_) + ending;
  }
  static void remove(const std::string& folder) {
    std::error_code error;
    std::filesystem::remove_all(folder, error);
  }

  std::string path_;
};

}  // namespace fabric::detail
