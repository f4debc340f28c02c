// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <iterator>
#include <mutex>
#include <optional>
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
#include <sys/syscall.h>
#endif

extern char** environ;  // NOLINT(readability-redundant-declaration): POSIX asks the program to declare it

namespace fabric {

/// The exit code of a program that leaves because it was asked to, and can be continued: EX_TEMPFAIL of sysexits.h. A
/// process that ends with it has not failed.
inline constexpr int preempted_exit_code = 75;

/// Processes that this one has started for other ranks of its node: this program, started again with the same
/// arguments, or forks. Each line that they print is passed on with their rank in front. They end when this process
/// does.
class Children {
 public:
  /// An environment variable to set: name and value.
  using Setting = std::pair<std::string, std::string>;
  /// One process to be.
  struct Plan {
    int rank = 0;  ///< Global; for messages.
    std::vector<Setting> settings{};
    std::vector<int> keep{};  ///< Descriptors that it inherits.
    bool label = true;        ///< Pass on what it prints, with its rank.
  };
  /// A child that ended with something else than success or preemption.
  struct Failure {
    int rank = 0;
    pid_t pid = 0;
    int code = 0;          ///< Its exit code, or 128 + the signal that ended it.
    std::string reason{};  ///< "was killed by signal 9 (Killed)".
  };

  /// The children of this process; none until they are started.
  static Children& of_this_process() {
    static auto* children = new Children;  // never destroyed: the watching thread uses it to the very end
    return *children;
  }

  /// Starts the processes and a thread that watches them; `failed(failure)` is called in it if one fails. Throws
  /// std::system_error when the program cannot be started.
  void start(const std::vector<Plan>& plans, std::function<void(const Failure&)> failed) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals stay the main thread's business
    // A child asks to be ended with the *thread* that started it, so the thread that starts is the one that watches.
    std::exception_ptr failure;
    std::atomic<bool> tried = false;
    watcher_ = std::thread([&, before, failed = std::move(failed)] {
      try {
        execute(plans, before);
      } catch (...) {
        failure = std::current_exception();
      }
      const bool started = failure == nullptr;
      tried = true;  // and nothing of the caller's is touched any more
      tried.notify_one();
      if (!started) return;
      if (const auto first = watch()) failed(*first);
    });
    tried.wait(false);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure) {
      watcher_.join();
      std::rethrow_exception(failure);
    }
  }

  /// Starts the processes, without a thread. To be followed by `watch`.
  void execute(const std::vector<Plan>& plans, const sigset_t& mask) {
    auto arguments = own_arguments();
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &mask);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    int error = 0;
    for (const Plan& plan : plans) {
      auto variables = environment_of(plan);
      Child child{.rank = plan.rank};
      int ends[2] = {-1, -1};
      if (plan.label) open_pipes(child, ends);
      posix_spawn_file_actions_t actions;
      posix_spawn_file_actions_init(&actions);
      for (const int fd : plan.keep) posix_spawn_file_actions_adddup2(&actions, fd, fd);  // clears close-on-exec
      if (plan.label) {
        posix_spawn_file_actions_adddup2(&actions, ends[0], STDOUT_FILENO);
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
      }
      error = posix_spawn(&child.pid, "/proc/self/exe", &actions, &attributes, pointers(arguments).data(),
                          pointers(variables).data());
      posix_spawn_file_actions_destroy(&actions);
      for (const int end : ends) close_if_open(end);
      if (error != 0) break;
      add(std::move(child));
    }
    posix_spawnattr_destroy(&attributes);
    if (error == 0) return;
    end_all();
    throw std::system_error(error, std::generic_category(), "fabric: cannot start " + arguments[0] + " again");
  }

  /// Forks this process; true in the children, where their settings are set. To be followed by `watch` in the parent.
  bool fork_all(const std::vector<Plan>& plans) {
    std::fflush(nullptr);  // or each would print what is waiting
    for (const Plan& plan : plans) {
      Child child{.rank = plan.rank};
      int ends[2] = {-1, -1};
      if (plan.label) open_pipes(child, ends);
      const pid_t parent = getpid();
      child.pid = fork();
      if (child.pid < 0) {
        const int error = errno;
        end_all();
        throw std::system_error(error, std::generic_category(), "fabric: fork");
      }
      if (child.pid == 0) {
        children_.clear();  // its siblings are none of its business
        if (plan.label) {
          dup2(ends[0], STDOUT_FILENO);
          dup2(ends[1], STDERR_FILENO);
        }
        for (const int end : ends) close_if_open(end);
        for (const auto& [name, value] : plan.settings) setenv(name.c_str(), value.c_str(), 1);
        setenv("FABRIC_PARENT", std::to_string(parent).c_str(), 1);
        join_parent();
        return true;
      }
      for (const int end : ends) close_if_open(end);
      add(std::move(child));
    }
    return false;
  }

  /// To be called in each process early: if a parent started it, it ends when the parent does.
  static void join_parent() {
    const char* parent = std::getenv("FABRIC_PARENT");
    if (parent == nullptr) return;
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (std::to_string(getppid()) != parent) std::_Exit(1);  // it died before we could ask
    unsetenv("FABRIC_PARENT");                               // for programs that this one starts
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);           // the parent passes on lines
  }

  /// Until no child runs, or one has failed: returns the first that has, after giving the others that long to end by
  /// themselves. Passes on what they print.
  std::optional<Failure> watch(std::chrono::milliseconds patience_with_others = {}) {
    std::optional<Failure> first;
    std::chrono::steady_clock::time_point end;
    while (!first || (std::chrono::steady_clock::now() < end && any_runs())) {
      std::vector<pollfd> fds;
      int timeout = -1;
      {
        const std::lock_guard lock(mutex_);
        bool waits = false;
        for (const Child& child : children_) {
          for (const Stream& stream : child.streams) {
            if (stream.fd >= 0) fds.push_back({stream.fd, POLLIN, 0});
            waits = waits || stream.fd >= 0;
          }
          if (!child.running) continue;
          waits = true;
          if (child.handle >= 0) fds.push_back({child.handle, POLLIN, 0});
          constexpr int often = 50;
          if (child.handle < 0) timeout = often;
        }
        if (!waits) return first;
        constexpr int patience = 300;  // a process of theirs may hold their streams for ever
        if (first || !any_running()) timeout = patience;
      }
      const int ready = poll(fds.data(), fds.size(), timeout);
      const std::lock_guard lock(mutex_);
      pass_on();
      if (ready == 0 && !any_running()) return first;
      for (Child& child : children_) {
        int status = 0;
        if (!child.running || waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
        child.running = false;
        close_if_open(std::exchange(child.handle, -1));
        pass_on();
        const bool preempted = WIFEXITED(status) && WEXITSTATUS(status) == preempted_exit_code;
        preempted_ = preempted_ || preempted;
        if (status == 0 || preempted || first) continue;
        first = failure_of(child, status);
        end = std::chrono::steady_clock::now() + patience_with_others;
      }
    }
    return first;
  }
  /// Their process ids.
  [[nodiscard]] std::vector<pid_t> ids() {
    const std::lock_guard lock(mutex_);
    std::vector<pid_t> ids;
    for (const Child& child : children_) ids.push_back(child.pid);
    return ids;
  }
  /// Has one of them ended because it was asked to stop?
  [[nodiscard]] bool preempted() const { return preempted_; }

  /// Waits for all of them, if a thread watches them.
  void wait() {
    if (watcher_.joinable()) watcher_.join();
  }

  /// Ends all children: lets them end by themselves for that long, then asks them to, then after two seconds makes
  /// them.
  void end_all(std::chrono::milliseconds patience = {}) {
    const std::lock_guard lock(mutex_);
    wait_for_end(patience);
    for (const Child& child : children_) {
      if (child.running) kill(child.pid, SIGTERM);
    }
    wait_for_end(std::chrono::seconds(2));
    for (Child& child : children_) {
      if (!child.running) continue;
      kill(child.pid, SIGKILL);
      waitpid(child.pid, nullptr, 0);
      child.running = false;
    }
    pass_on();
  }

  /// To start others, after all have ended.
  void forget() {
    const std::lock_guard lock(mutex_);
    for (Child& child : children_) {
      for (const Stream& stream : child.streams) close_if_open(stream.fd);
      close_if_open(child.handle);
    }
    children_.clear();
    preempted_ = false;
  }

 private:
  struct Stream {
    int fd = -1;
    int to = -1;
    std::string line{};
  };
  struct Child {
    pid_t pid = -1;
    int rank = 0;
    int handle = -1;  ///< Readable when the process has ended; -1 where the system has no such thing.
    bool running = true;
    Stream streams[2]{{.to = STDOUT_FILENO}, {.to = STDERR_FILENO}};
  };

  Children() = default;

  /// This program's arguments, as it was started.
  static std::vector<std::string> own_arguments() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> arguments;
    for (std::string argument; std::getline(file, argument, '\0');) arguments.push_back(argument);
    if (arguments.empty()) throw std::system_error(ENOENT, std::generic_category(), "fabric: /proc/self/cmdline");
    return arguments;
  }

  /// This process's variables with the plan's in place of those of the same names.
  static std::vector<std::string> environment_of(const Plan& plan) {
    std::vector<std::string> variables;
    for (char** variable = environ; *variable != nullptr; ++variable) {
      const std::string text = *variable;
      bool replaced = false;
      for (const auto& [name, value] : plan.settings) replaced = replaced || text.starts_with(name + "=");
      if (!replaced) variables.push_back(text);
    }
    for (const auto& [name, value] : plan.settings) variables.push_back(name + "=" + value);
    variables.push_back("FABRIC_PARENT=" + std::to_string(getpid()));
    return variables;
  }

  static std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    result.reserve(texts.size() + 1);
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  }

  static void close_if_open(int fd) {
    if (fd >= 0) close(fd);
  }
  static void open_pipes(Child& child, int (&ends)[2]) {
    for (int i = 0; i < 2; ++i) {
      int pipe[2];
      if (pipe2(pipe, O_CLOEXEC) != 0) throw std::system_error(errno, std::generic_category(), "fabric: pipe");
      fcntl(pipe[0], F_SETFL, O_NONBLOCK);
      child.streams[i].fd = pipe[0];
      ends[i] = pipe[1];
    }
  }

  void add(Child child) {
#ifdef SYS_pidfd_open
    child.handle = static_cast<int>(syscall(SYS_pidfd_open, child.pid, 0));
#endif
    const std::lock_guard lock(mutex_);
    children_.push_back(std::move(child));
  }

  [[nodiscard]] bool any_runs() {
    const std::lock_guard lock(mutex_);
    return any_running();
  }
  [[nodiscard]] bool any_running() const {
    for (const Child& child : children_) {
      if (child.running) return true;
    }
    return false;
  }

  /// Writes the lines that have arrived, each with its rank and at once.
  void pass_on() {
    for (Child& child : children_) {
      for (Stream& stream : child.streams) {
        char buffer[4096];
        while (stream.fd >= 0) {
          const ssize_t n = read(stream.fd, buffer, sizeof buffer);
          if (n < 0 && errno == EINTR) continue;
          if (n < 0 && errno == EAGAIN) break;
          if (n > 0) {
            stream.line.append(buffer, static_cast<std::size_t>(n));
          } else {
            close(std::exchange(stream.fd, -1));
            if (!stream.line.empty()) stream.line += '\n';
          }
          const auto end = stream.line.rfind('\n');
          if (end == std::string::npos) continue;
          const std::string label = "[rank " + std::to_string(child.rank) + "] ";
          std::string out;
          for (std::size_t begin = 0; begin <= end;) {
            const auto next = stream.line.find('\n', begin) + 1;
            out += label + stream.line.substr(begin, next - begin);
            begin = next;
          }
          stream.line.erase(0, end + 1);
          for (std::size_t written = 0; written < out.size();) {
            const ssize_t m = write(stream.to, out.data() + written, out.size() - written);
            if (m < 0 && errno != EINTR) break;  // nobody reads any more
            if (m > 0) written += static_cast<std::size_t>(m);
          }
        }
      }
    }
  }

  void wait_for_end(std::chrono::milliseconds time) {
    const auto end = std::chrono::steady_clock::now() + time;
    while (any_running()) {
      for (Child& child : children_) {
        if (child.running && waitpid(child.pid, nullptr, WNOHANG) == child.pid) child.running = false;
      }
      pass_on();
      if (std::chrono::steady_clock::now() >= end) return;
      if (any_running()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  static Failure failure_of(const Child& child, int status) {
    Failure failure{.rank = child.rank, .pid = child.pid};
    if (WIFSIGNALED(status)) {
      failure.code = 128 + WTERMSIG(status);
      failure.reason =
          "was killed by signal " + std::to_string(WTERMSIG(status)) + " (" + strsignal(WTERMSIG(status)) + ")";
    } else {
      failure.code = WEXITSTATUS(status);
      failure.reason = "ended with exit code " + std::to_string(failure.code);
    }
    return failure;
  }

  std::mutex mutex_;  // of all below
  std::vector<Child> children_;
  bool preempted_ = false;
  std::thread watcher_;
};

}  // namespace fabric
