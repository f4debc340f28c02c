// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fabric/error.hpp"
#include "fabric/launch/children.hpp"
#include "fabric/launch/fork_safety.hpp"
#include "fabric/launch/job.hpp"
#include "fabric/launch/result.hpp"

namespace fabric::detail {

/// A file without a name, for bytes of any number between a parent and its children.
class Parcel {
 public:
  Parcel() : fd_(memfd_create("fabric", MFD_CLOEXEC)) {}
  explicit Parcel(int fd) : fd_(fd) {}
  [[nodiscard]] int fd() const { return fd_; }
  void put(std::string_view bytes) const {
    while (!bytes.empty()) {
      const ssize_t n = write(fd_, bytes.data(), bytes.size());
      if (n <= 0) throw Error("fabric: launch: rank 0's result could not be written");
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
  }
  /// All that was put.
  [[nodiscard]] std::string get() const {
    std::string bytes;
    char buffer[1 << 16];
    off_t at = 0;
    for (ssize_t n = 0; (n = pread(fd_, buffer, sizeof buffer, at)) > 0; at += n) {
      bytes.append(buffer, static_cast<std::size_t>(n));
    }
    return bytes;
  }
  void close() { ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

/// What a rank has from the parent that supervises it. All -1 in any other process.
struct Upbringing {
  int call = -1;      ///< Which of the program's launches with a function it is for.
  int listener = -1;  ///< Rank 0: where the others will come.
  int result = -1;    ///< Parcels: for rank 0's result,
  int reason = -1;    ///< for why the job failed,
  int earlier = -1;   ///< with the results of earlier launches.

  static Upbringing& of_this_process() {
    static Upbringing upbringing = from_variable();
    return upbringing;
  }
  static Upbringing from_variable() {
    Upbringing read;
    const char* text = std::getenv("FABRIC_UPBRINGING");
    if (text == nullptr) return read;
    std::istringstream in(text);
    in >> read.call >> read.listener >> read.result >> read.reason >> read.earlier;
    unsetenv("FABRIC_UPBRINGING");  // for programs that this one starts
    for (const int fd : {read.listener, read.result, read.reason, read.earlier}) {
      if (fd >= 0) fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    return read;
  }
  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    out << call << ' ' << listener << ' ' << result << ' ' << reason << ' ' << earlier;
    return out.str();
  }
};

/// The results of this program's launches with a function, in order.
struct PastResults {
  std::vector<std::string> bytes{};
  static PastResults& of_this_process() {
    static PastResults results = [] {
      PastResults read;
      const Upbringing& mine = Upbringing::of_this_process();
      if (mine.earlier < 0) return read;
      const std::string all = Parcel(mine.earlier).get();
      std::string_view rest = all;
      while (!rest.empty()) read.bytes.push_back(Travel<std::string>::get(rest));
      return read;
    }();
    return results;
  }
};

/// SIGTERM and SIGUSR1 go to the children while this lives: they decide what to do.
class SignalsForChildren {
 public:
  explicit SignalsForChildren(std::vector<pid_t> children) {
    ids() = std::move(children);
    struct sigaction forward {};
    forward.sa_handler = [](int signal) {
      for (const pid_t id : ids()) kill(id, signal);
    };
    forward.sa_flags = SA_RESTART;
    for (std::size_t i = 0; i < 2; ++i) sigaction(forwarded[i], &forward, &before_[i]);
  }
  ~SignalsForChildren() {
    for (std::size_t i = 0; i < 2; ++i) sigaction(forwarded[i], &before_[i], nullptr);
  }
  SignalsForChildren(const SignalsForChildren&) = delete;
  SignalsForChildren& operator=(const SignalsForChildren&) = delete;

 private:
  static constexpr int forwarded[2] = {SIGTERM, SIGUSR1};
  static std::vector<pid_t>& ids() {
    static std::vector<pid_t> ids;
    return ids;
  }
  struct sigaction before_[2];
};

/// How a supervised job went, in the parent; in a forked rank only that it is one.
struct Supervised {
  bool in_rank = false;
  int code = 0;           ///< The job's exit code.
  std::string failure{};  ///< Why it is not 0.
  std::string result{};   ///< Rank 0's.
};

/// Starts all these ranks, fresh or as forks, and waits for their end.
inline Supervised supervise(std::vector<Children::Plan> plans, bool forks, int listener) {
  if (forks) prepare_to_fork();
  const Parcel result;
  const Parcel reason;
  const Parcel earlier;
  const auto& past = PastResults::of_this_process().bytes;
  for (const std::string& each : past) {
    std::string bytes;
    Travel<std::string>::put(bytes, each);
    earlier.put(bytes);
  }
  for (Children::Plan& plan : plans) {
    const Upbringing upbringing{.call = static_cast<int>(past.size()),
                                .listener = plan.rank == 0 ? listener : -1,
                                .result = result.fd(),
                                .reason = reason.fd(),
                                .earlier = earlier.fd()};
    plan.settings.emplace_back("FABRIC_UPBRINGING", upbringing.text());
    plan.keep = {upbringing.result, upbringing.reason, upbringing.earlier};
    if (upbringing.listener >= 0) plan.keep.push_back(listener);
  }
  Children& children = Children::of_this_process();
  if (forks) {
    if (children.fork_all(plans)) {
      Upbringing::of_this_process() = Upbringing::from_variable();
      return {.in_rank = true};
    }
  } else {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    children.execute(plans, mask);
  }
  if (listener >= 0) close(listener);

  Supervised outcome;
  {
    const SignalsForChildren forwarded(children.ids());
    constexpr auto patience = std::chrono::seconds(3);  // they tell each other why
    const auto failed = children.watch(patience);
    children.end_all();
    if (failed) {
      outcome.code = failed->code;
      outcome.failure = reason.get();
      if (outcome.failure.empty()) {
        outcome.failure = "fabric: rank " + std::to_string(failed->rank) + " (process " + std::to_string(failed->pid) +
                          ") " + failed->reason + "\n";
      }
    } else if (children.preempted()) {
      outcome.code = preempted_exit_code;
    }
  }
  children.forget();
  outcome.result = result.get();
  for (Parcel parcel : {result, reason, earlier}) parcel.close();
  return outcome;
}

/// Runs a supervised rank's function and ends the process; rank 0's result goes to the parent.
template <class Result, class Run>
[[noreturn]] void run_as_rank(bool forked, Run&& run) {
  const Upbringing mine = Upbringing::of_this_process();
  Job& job = Job::of_this_process();
  int code = 0;
  try {
    if constexpr (std::is_void_v<Result>) {
      run();
    } else {
      const Result result = run();
      if (job.serves()) {
        std::string bytes;
        Travel<Result>::put(bytes, result);
        Parcel(mine.result).put(bytes);
      }
    }
  } catch (...) {
    code = 1;
    const std::string why = current_reason();
    if (!job.fail(why, code)) Parcel(mine.reason).put(why + "\n");
  }
  if (!forked) std::exit(code);
  if (code == 0) job.say_goodbye();
  std::fflush(nullptr);
  _exit(code);  // what is to be done at the parent's end is not this process's to do
}

}  // namespace fabric::detail
