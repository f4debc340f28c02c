// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace fabric::tests {

/// A program that runs beside the test. What it and its own children print, to either stream, is collected. Its
/// environment is the test's own without what launchers set, plus `variables`.
class Process {
 public:
  using Variable = std::pair<std::string, std::string>;

  explicit Process(std::vector<std::string> command, const std::vector<Variable>& variables = {}) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
    output_ = ends[0];
    std::vector<std::string> environment = inherited();
    for (const auto& [name, value] : variables) environment.push_back(name + "=" + value);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
    const int error = posix_spawnp(&pid_, command[0].c_str(), &actions, nullptr, pointers(command).data(),
                                   pointers(environment).data());
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (error != 0) throw std::system_error(error, std::generic_category(), command[0]);
  }
  ~Process() {
    if (code_ == running) {
      ::kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(output_);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] const std::string& output() const { return text_; }
  void kill(int signal) const { ::kill(pid_, signal); }

  /// Reads until `text` has been printed; false if it has not been within that time, or never will.
  bool wait_for(const std::string& text, double seconds = 60) {
    const auto deadline = after(seconds);
    while (text_.find(text) == std::string::npos) {
      if (!read_some(deadline)) return false;
    }
    return true;
  }

  /// Waits until it has ended and nobody holds its output any more, so that no process that it started is left. Returns
  /// its exit code, or 128 + the signal that killed it, or `running` if that did not come about within the time.
  int wait(double seconds = 60) {
    const auto deadline = after(seconds);
    while (read_some(deadline)) {
    }
    while (!closed_ || code_ == running) {
      int status = 0;
      if (code_ == running && waitpid(pid_, &status, WNOHANG) == pid_) {
        code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      } else if (std::chrono::steady_clock::now() > deadline) {
        return running;
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
    return code_;
  }

  static constexpr int running = -1;

 private:
  using Time = std::chrono::steady_clock::time_point;

  static Time after(double seconds) {
    return std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<long>(seconds * 1000));
  }

  /// False at the end of the output, or of the time.
  bool read_some(Time deadline) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd end{output_, POLLIN, 0};
    if (closed_ || left.count() <= 0 || poll(&end, 1, static_cast<int>(left.count())) <= 0) return false;
    char buffer[4096];
    const ssize_t n = read(output_, buffer, sizeof buffer);
    if (n <= 0) {
      closed_ = true;
      return false;
    }
    text_.append(buffer, static_cast<std::size_t>(n));
    return true;
  }

  static std::vector<std::string> inherited() {
    std::vector<std::string> kept;
    for (char** variable = environ; *variable != nullptr; ++variable) {
      const std::string text = *variable;
      bool launcher = false;
      for (const char* prefix : {"MASTER_", "LOCAL_", "NODE_RANK=", "GROUP_", "WORLD_SIZE=", "RANK=", "ROLE_",
                                 "TORCHELASTIC_", "SLURM_", "LT_", "FABRIC_TEST_RANKS=", "OMP_NUM_THREADS="}) {
        launcher = launcher || text.rfind(prefix, 0) == 0;
      }
      if (!launcher) kept.push_back(text);
    }
    kept.emplace_back("OMP_NUM_THREADS=1");  // several processes on few cores
    return kept;
  }

  static std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    result.reserve(texts.size() + 1);
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  }

  pid_t pid_ = -1;
  int output_ = -1;
  bool closed_ = false;
  int code_ = running;
  std::string text_;
};

}  // namespace fabric::tests
