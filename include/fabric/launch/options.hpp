// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fabric/error.hpp"

namespace fabric {

/// How processes come together, whatever strategy they follow.
struct LaunchOptions {
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};  ///< For all to come, and of each collective.
  /// Compare each collective with those of the other ranks, and say what both sides do where they differ. For finding
  /// out why a job hangs: it costs more than the collectives themselves. FABRIC_DETECT_DESYNC=1 turns it on, too.
  bool detect_desync = false;
  /// Each rank writes what it prints to `rank_N.log` in this folder. By default the variable FABRIC_LOG_DIR; if that is
  /// not set, processes that this one starts print through it, each line with its rank in front.
  std::string log_dir{};
};

namespace detail {

inline LaunchOptions with_variables(LaunchOptions options) {
  const char* log_dir = std::getenv("FABRIC_LOG_DIR");
  const char* detect = std::getenv("FABRIC_DETECT_DESYNC");
  if (options.log_dir.empty() && log_dir != nullptr) options.log_dir = log_dir;
  options.detect_desync = options.detect_desync || (detect != nullptr && std::strcmp(detect, "0") != 0);
  return options;
}

/// Sends this process's output to the rank's file. Returns a descriptor of what was standard error before.
inline int write_own_log(const std::string& folder, int rank) {
  for (std::size_t end = 0; end != std::string::npos;) {
    end = folder.find('/', end + 1);
    mkdir(folder.substr(0, end).c_str(), 0777);  // what is wrong with it is said below
  }
  const std::string path = folder + "/rank_" + std::to_string(rank) + ".log";
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0) throw Error("fabric: launch: log_dir " + folder + ": " + path + ": " + std::strerror(errno));
  std::fflush(nullptr);
  const int console = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
  dup2(file, STDOUT_FILENO);
  dup2(file, STDERR_FILENO);
  close(file);
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  return console;
}

}  // namespace detail
}  // namespace fabric
