// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fstream>
#include <string>

#include <dirent.h>
#include <dlfcn.h>
#include <unistd.h>

#include "fabric/error.hpp"

namespace fabric::detail {

/// Has this process initialised CUDA's driver, in which way so ever? Asks without doing so.
inline bool cuda_is_initialised() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return false;
  constexpr int not_initialised = 3;  // CUDA_ERROR_NOT_INITIALIZED
  int count = 0;
  auto* get_count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  const bool initialised = get_count != nullptr && get_count(&count) != not_initialised;
  dlclose(driver);
  return initialised;
}

/// The names of this process's threads other than the calling one.
inline std::string other_threads() {
  std::string names;
  DIR* folder = opendir("/proc/self/task");
  if (folder == nullptr) return names;
  const std::string own = std::to_string(gettid());
  while (const dirent* entry = readdir(folder)) {
    if (entry->d_name[0] == '.' || own == entry->d_name) continue;
    std::string name;
    std::ifstream file(std::string("/proc/self/task/") + entry->d_name + "/comm");
    std::getline(file, name);
    names += (names.empty() ? "" : ", ") + name;
  }
  closedir(folder);
  return names;
}

/// A forked process has its parent's memory, but not its threads and not its GPU. Sends OpenMP's idle threads home, for
/// whom a child would wait for ever in its first parallel operator (LibTorch's other pools mind forks themselves).
/// Throws fabric::Error if CUDA is in use, or where OpenMP's threads cannot be sent home.
inline void prepare_to_fork() {
  const std::string instead = ". Fork before that, or use ddp_spawn or ddp, which start the processes afresh";
  if (cuda_is_initialised()) {
    throw Error("fabric: launch: this process has initialised CUDA, which does not survive a fork" + instead);
  }
  using Pause = int (*)(int kind);
  constexpr int hard = 2;  // omp_pause_hard: the threads end
  auto* pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  if (pause != nullptr && pause(hard) == 0) return;
  const std::string threads = other_threads();
  if (threads.empty()) return;
  throw Error("fabric: launch: this process has run operators in parallel, and the threads for that (" + threads +
              ") would be missing in a forked one, which would wait for them" + instead);
}

}  // namespace fabric::detail
