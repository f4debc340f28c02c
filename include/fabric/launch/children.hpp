// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

extern char** environ;  // NOLINT(readability-redundant-declaration): POSIX asks the program to declare it

namespace fabric {

/// The processes of this node's other local ranks, started by executing this program again with the same arguments.
///
/// They live and die with the job. If one fails, its reason is printed, the others are ended and so is this process,
/// within seconds and with a non-zero exit code, whatever its main thread waits for. If this process dies, so do they.
/// If it ends with success, it first waits for them.
class Children {
 public:
  /// An environment variable to set: name and value.
  using Setting = std::pair<std::string, std::string>;

  /// The children of this process; none until `start`.
  static Children& of_this_process() {
    static auto* children = new Children;  // never destroyed: the watching thread uses it to the very end
    return *children;
  }

  /// Starts one process for each entry of `settings`, for the local ranks 1, 2, ... in order, with these variables on
  /// top of this process's own. To be called once. Throws std::system_error when the program cannot be started.
  void start(const std::vector<std::vector<Setting>>& settings) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals stay the main thread's business
    // A child asks to be ended with the *thread* that started it, so the thread that starts is the one that watches.
    std::exception_ptr failure;
    bool done = false;
    watcher_ = std::thread([&, before] {
      try {
        spawn(settings, before);
      } catch (...) {
        failure = std::current_exception();
      }
      const bool failed = failure != nullptr;
      __atomic_store_n(&done, true, __ATOMIC_RELEASE);
      if (!failed) watch();
    });
    while (!__atomic_load_n(&done, __ATOMIC_ACQUIRE)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure) {
      watcher_.join();
      std::rethrow_exception(failure);
    }
    started_ = true;
    previous_terminate() = std::set_terminate([] {
      // When a peer dies, this rank often fails first, at a collective: let the watcher say who began.
      std::this_thread::sleep_for(patience);
      previous_terminate()();
      std::abort();
    });
#ifdef __GLIBC__
    on_exit([](int status, void* self) { static_cast<Children*>(self)->wait_at_exit(status); }, this);
#else
    std::atexit([] { of_this_process().wait_at_exit(0); });
#endif
  }

  [[nodiscard]] bool started() const { return started_; }

  /// To be called in each process early: if a parent's `start` made it, it ends when the parent does, and what an
  /// uncaught exception says is told to the parent. Otherwise nothing happens.
  static void join_parent() {
    const char* parent = std::getenv("FABRIC_PARENT");
    if (parent == nullptr) return;
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (std::to_string(getppid()) != parent) std::_Exit(1);  // it died before we could ask
    reason_fd() = std::atoi(std::getenv("FABRIC_REASON_FD"));
    fcntl(reason_fd(), F_SETFD, FD_CLOEXEC);
    unsetenv("FABRIC_PARENT");  // for programs that this one starts
    unsetenv("FABRIC_REASON_FD");
    previous_terminate() = std::set_terminate([] {
      tell_reason();
      previous_terminate()();
      std::abort();
    });
  }

 private:
  struct Child {
    pid_t pid = -1;
    int local_rank = 0;
    int reason_fd = -1;  ///< Reads what the child says about its failure; at its end when the child is.
    bool running = true;
    std::string reason;
  };

  Children() = default;

  static constexpr auto patience = std::chrono::milliseconds(1500);

  static int& reason_fd() {
    static int fd = -1;
    return fd;
  }
  static std::terminate_handler& previous_terminate() {
    static std::terminate_handler handler = nullptr;
    return handler;
  }
  static void tell_reason() {
    if (std::current_exception() == nullptr) return;
    try {
      std::rethrow_exception(std::current_exception());
    } catch (const std::exception& error) {
      (void)!write(reason_fd(), error.what(), std::strlen(error.what()));
    } catch (...) {
      constexpr char unknown[] = "an exception that is no std::exception";
      (void)!write(reason_fd(), unknown, sizeof unknown - 1);
    }
  }

  /// This program's arguments, as it was started.
  static std::vector<std::string> own_arguments() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> arguments;
    for (std::string argument; std::getline(file, argument, '\0');) arguments.push_back(argument);
    if (arguments.empty()) throw std::system_error(ENOENT, std::generic_category(), "fabric: /proc/self/cmdline");
    return arguments;
  }

  static std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  }

  void spawn(const std::vector<std::vector<Setting>>& settings, const sigset_t& mask) {
    auto arguments = own_arguments();
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &mask);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    for (const auto& extra : settings) {
      int ends[2];
      if (pipe(ends) != 0) {
        const int error = errno;
        end_all();
        posix_spawnattr_destroy(&attributes);
        throw std::system_error(error, std::generic_category(), "fabric: pipe");
      }
      fcntl(ends[0], F_SETFD, FD_CLOEXEC);
      std::vector<std::string> variables;
      for (char** variable = environ; *variable != nullptr; ++variable) {
        const std::string text = *variable;
        bool replaced = false;
        for (const auto& [name, value] : extra) replaced = replaced || text.starts_with(name + "=");
        if (!replaced) variables.push_back(text);
      }
      for (const auto& [name, value] : extra) variables.push_back(name + "=" + value);
      variables.push_back("FABRIC_PARENT=" + std::to_string(getpid()));
      variables.push_back("FABRIC_REASON_FD=" + std::to_string(ends[1]));
      Child child;
      const int error = posix_spawn(&child.pid, "/proc/self/exe", nullptr, &attributes, pointers(arguments).data(),
                                    pointers(variables).data());
      close(ends[1]);
      if (error != 0) {
        close(ends[0]);
        end_all();
        posix_spawnattr_destroy(&attributes);
        throw std::system_error(error, std::generic_category(), "fabric: cannot start " + arguments[0] + " again");
      }
      child.local_rank = static_cast<int>(children_.size()) + 1;
      child.reason_fd = ends[0];
      children_.push_back(child);
    }
    posix_spawnattr_destroy(&attributes);
  }

  /// Until no child runs: takes what they say, and ends everything as soon as one fails.
  void watch() {
    for (;;) {
      std::vector<pollfd> pipes;
      bool running = false;
      for (const Child& child : children_) {
        running = running || child.running;
        if (child.reason_fd >= 0) pipes.push_back({child.reason_fd, POLLIN, 0});
      }
      if (!running) return;
      constexpr int milliseconds = 500;  // for children whose pipe is kept open by a process of their own
      poll(pipes.data(), pipes.size(), milliseconds);
      for (Child& child : children_) {
        read_reason(child);
        int status = 0;
        if (child.running && waitpid(child.pid, &status, WNOHANG) == child.pid) {
          child.running = false;
          read_reason(child);
          if (status != 0) fail(child, status);
        }
      }
    }
  }

  static void read_reason(Child& child) {
    if (child.reason_fd < 0) return;
    pollfd pipe{child.reason_fd, POLLIN, 0};
    char buffer[4096];
    while (poll(&pipe, 1, 0) > 0) {
      const ssize_t n = read(child.reason_fd, buffer, sizeof buffer);
      if (n > 0) {
        child.reason.append(buffer, static_cast<std::size_t>(n));
      } else {
        close(child.reason_fd);
        child.reason_fd = -1;
        return;
      }
    }
  }

  [[noreturn]] void fail(const Child& failed, int status) {
    std::string message =
        "fabric: local rank " + std::to_string(failed.local_rank) + " (process " + std::to_string(failed.pid) + ") ";
    message += WIFSIGNALED(status) ? "was killed by signal " + std::to_string(WTERMSIG(status)) + " (" +
                                         strsignal(WTERMSIG(status)) + ")"
                                   : "ended with exit code " + std::to_string(WEXITSTATUS(status));
    if (!failed.reason.empty()) message += ": " + failed.reason;
    message += "\nfabric: ending the other processes of this job\n";
    end_all();
    (void)!write(STDERR_FILENO, message.data(), message.size());
    // What rank 0 has printed, unless its main thread is inside the stream, perhaps for ever.
    if (ftrylockfile(stdout) == 0) fflush_unlocked(stdout);
    std::_Exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }

  /// Ends all children: politely, then after two seconds not.
  void end_all() {
    for (const Child& child : children_) {
      if (child.running) kill(child.pid, SIGTERM);
    }
    for (int tenths = 0; tenths < 20; ++tenths) {
      bool running = false;
      for (Child& child : children_) {
        if (child.running && waitpid(child.pid, nullptr, WNOHANG) == child.pid) child.running = false;
        running = running || child.running;
      }
      if (!running) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    for (Child& child : children_) {
      if (!child.running) continue;
      kill(child.pid, SIGKILL);
      waitpid(child.pid, nullptr, 0);
      child.running = false;
    }
  }

  /// A program that failed does not wait for ranks that may wait for it.
  void wait_at_exit(int status) {
    if (status != 0) {
      std::this_thread::sleep_for(patience);  // as above
      for (const Child& child : children_) {
        if (child.running) kill(child.pid, SIGKILL);
      }
      std::fflush(nullptr);
      std::_Exit(status);  // before the watcher takes those deaths for failures
    }
    watcher_.join();
  }

  std::vector<Child> children_;
  std::thread watcher_;
  bool started_ = false;
};

}  // namespace fabric
