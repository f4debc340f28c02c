// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>

#include <unistd.h>

namespace fabric::tests {

/// The value of an environment variable.
inline std::string variable(const char* name, const char* otherwise = "-") {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

/// One line to standard output, in one write.
inline void say(const std::string& text) {
  const std::string line = text + "\n";
  (void)!write(STDOUT_FILENO, line.data(), line.size());
}

/// Says "rank R is process P".
inline void say_who(int rank) { say("rank " + std::to_string(rank) + " is process " + std::to_string(getpid())); }

/// The process that said it is that rank. Throws if none did: a test must not take -1, which is everybody, for one.
inline pid_t process_of(const std::string& output, int rank) {
  const std::string text = "rank " + std::to_string(rank) + " is process ";
  const auto at = output.find(text);
  if (at == std::string::npos) throw std::runtime_error("nobody said: " + text);
  return std::atoi(output.c_str() + at + text.size());
}

/// Does the process run? One that has ended but that nobody has asked for does not.
inline bool alive(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  if (!std::getline(stat, text)) return false;
  const std::string state = text.substr(text.rfind(')'), 3);
  return state != ") Z" && state != ") X";
}

/// Has the process ended, or does it within so many seconds? The kernel closes a process's files before it is done with
/// it, so that who has waited for the end of its output may still find it.
inline bool ends(pid_t pid, double seconds = 2) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (alive(pid)) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

inline std::size_t count(const std::string& text, const std::string& what) {
  std::size_t found = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
  return found;
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace fabric::tests
