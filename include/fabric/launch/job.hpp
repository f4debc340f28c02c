// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/types.h>
#include <unistd.h>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "fabric/comm/reason.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/children.hpp"
#include "fabric/launch/hub.hpp"
#include "fabric/launch/link.hpp"

namespace fabric {

namespace detail {

/// What the exception that is being handled says, without a stack trace.
inline std::string current_reason() {
  try {
    throw;
  } catch (const std::exception& error) {
    return reason_of(error);
  } catch (...) {
    return "an exception that is no std::exception";
  }
}

/// This process's membership in its job. Once it has joined, the job lives and dies as a whole: if a rank fails, by an
/// exception, an exit code or a signal, all end within seconds and with a non-zero exit code, whatever their main
/// threads wait for, and the reason is printed once. A thread that sleeps on a connection to rank 0 sees to that.
class Job {
 public:
  static Job& of_this_process() {
    static auto* job = new Job;  // never destroyed: its thread uses it to the very end
    return *job;
  }

  /// Rank 0 begins to serve `listener`. The others can be started now.
  void serve(int listener, HubOptions options) {
    auto* hub = new Hub(listener, std::move(options));  // likewise
    link_ = hub->own_link();
    serves_ = true;
    without_signals([hub] { std::thread([hub] { hub->run(); }).detach(); });
  }
  [[nodiscard]] bool serves() const { return serves_; }

  /// The other ranks bring a connection to rank 0.
  void connect(Link link) {
    const std::lock_guard lock(mutex_);
    link_ = std::move(link);
  }

  /// Says who this process is and waits until all ranks have come; returns the hub's welcome. Throws fabric::Error when
  /// they do not, or when this one is refused.
  Message join(const Hello& hello, int local_rank, bool greeted) {
    rank_ = hello.rank;
    local_rank_ = local_rank;
    size_ = hello.size;
    if (!greeted) link_.send({.kind = Message::hello, .text = hello.text()});
    for (;;) {
      auto message = link_.wait(Clock::time_point::max());  // the hub minds the time
      if (!message) {
        throw Error("fabric: rank " + std::to_string(rank_) + " lost its connection to rank 0 before all had come");
      }
      if (message->kind == Message::refused) throw Error("fabric: launch: " + message->text);
      if (message->kind == Message::verdict) end(*message);
      if (message->kind != Message::welcome) continue;
      pid_ = getpid();
      without_signals([this] { std::thread([this] { watch(); }).detach(); });
      handle_ends();
      return std::move(*message);
    }
  }

  /// Where the ranks keep what they tell each other once.
  c10::intrusive_ptr<c10d::Store> store{};

  /// This process writes what it prints to a file of its own.
  void has_own_log() { has_own_log_ = true; }

  /// The address of this host by which rank 0 is reached.
  [[nodiscard]] std::string own_address() const { return address_of(link_.fd()); }

  [[nodiscard]] bool joined() const { return pid_ == getpid(); }
  [[nodiscard]] int size() const { return size_; }

  /// Tells the job that this rank fails, or that `about` has. Returns true once the job is known to end because of it;
  /// never returns if the job ends because of another rank, whose failure this one's may only follow from; false if
  /// there is nobody to tell.
  bool fail(const std::string& reason, int code, int about = -1) {
    if (!joined() && about < 0) return false;
    std::unique_lock lock(mutex_);
    if (!link_.open()) return false;
    if (about >= 0 || !std::exchange(failed_, true)) {
      constexpr std::size_t enough = 1U << 16U;
      const Message message{Message::failed, about < 0 ? rank_ : about, code, reason.substr(0, enough)};
      if (!link_.send(message)) return false;
    }
    changed_.wait_for(lock, std::chrono::seconds(5), [this] { return condemned_; });
    return condemned_;
  }
  /// The same for the exception that is being handled.
  bool fail() { return fail(current_reason(), 1); }

  /// This rank will do nothing more that others need. Rank 0 waits for all to say so, since they may need it.
  void say_goodbye() {
    std::unique_lock lock(mutex_);
    if (std::exchange(left_, true)) return;
    link_.send({.kind = Message::goodbye});
    if (serves_) changed_.wait(lock, [this] { return finished_; });
  }

  [[nodiscard]] bool has_left() {
    const std::lock_guard lock(mutex_);
    return left_;
  }

  /// Have the ranks agreed to stop after this step? `wanted`: this rank would like to. Costs next to nothing until
  /// somebody does. Then each says how far it is, and they stop one step after the one who is furthest, which nobody
  /// passes before it is known.
  bool should_stop(bool wanted) {
    const int step = step_.load(std::memory_order_relaxed) + 1;
    step_.store(step);  // before looking: see `hear`
    if (!wanted && !holding_.load()) return false;
    std::unique_lock lock(mutex_);
    if (!holding_.load()) link_.send({.kind = Message::hold});
    changed_.wait(lock, [this] { return stop_at_ >= 0; });
    return step >= stop_at_;
  }

  /// Ends children, if there are any, and the process.
  [[noreturn]] static void leave(int code) {
    constexpr auto patience = std::chrono::seconds(2);  // they know, and one may still have something to say
    Children::of_this_process().end_all(patience);
    // What this process has printed, unless its main thread is inside the stream, perhaps for ever.
    if (ftrylockfile(stdout) == 0) fflush_unlocked(stdout);
    std::_Exit(code);
  }

 private:
  Job() = default;

  /// Runs `start` so that threads it starts leave all signals to the main thread.
  template <class Start>
  static void without_signals(Start&& start) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    start();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void watch() {
    for (;;) {
      constexpr int milliseconds = 60'000;
      if (!readable(link_.fd(), milliseconds)) continue;
      const bool alive = link_.read();
      while (const auto message = link_.next()) hear(*message);
      if (alive) continue;
      if (const std::lock_guard lock(mutex_); left_) return;
      const std::string text = "fabric: rank 0 of " + std::to_string(size_) +
                               " ended without a word: it was killed, it crashed, or its host is gone\n"
                               "fabric: ending the other processes of this job\n";
      // Nobody is left to say who prints this: one process a node does.
      if (local_rank_ == 0 || rank_ == 1) (void)!write(STDERR_FILENO, text.data(), text.size());
      leave(128 + SIGKILL);
    }
  }

  void hear(const Message& message) {
    const std::unique_lock lock(mutex_);
    switch (message.kind) {
      case Message::verdict: return end(message);
      case Message::finished: finished_ = true; break;
      case Message::hold:
        holding_.store(true);  // before asking how far it is: it waits at its next step, or has told of it already
        link_.send({.kind = Message::at_step, .number = step_.load()});
        break;
      case Message::stop_at: stop_at_ = message.number; break;
      default: return;
    }
    changed_.notify_all();
  }

  /// The job ends. The rank that failed may still have something to say; the others end at once.
  void end(const Message& verdict) {
    if (verdict.rank != rank_ || !failed_) {
      if (has_own_log_) (void)!write(STDERR_FILENO, verdict.text.data(), verdict.text.size());
      leave(verdict.number);
    }
    condemned_ = true;
    changed_.notify_all();
    std::thread([code = verdict.number] {
      std::this_thread::sleep_for(std::chrono::seconds(4));
      leave(code);
    }).detach();
  }

  /// From now on, an exception that nobody catches and an exit code that is not zero are told to the job, and a good
  /// end waits for what others need of this process.
  void handle_ends() {
    previous_terminate_ = std::set_terminate([] {
      Job& job = of_this_process();
      if (job.joined() && std::current_exception() != nullptr && job.fail(current_reason(), 128 + SIGABRT)) {
        Children::of_this_process().end_all(std::chrono::seconds(2));
        std::abort();  // the reason is printed already
      }
      job.previous_terminate_();
      std::abort();
    });
#ifdef __GLIBC__
    on_exit([](int status, void*) { of_this_process().at_exit(status); }, nullptr);
#else
    std::atexit([] { of_this_process().at_exit(0); });
#endif
  }

  void at_exit(int status) {
    if (!joined()) return;  // a process that was forked off
    if (status == 0 || status == preempted_exit_code) {
      say_goodbye();
      Children::of_this_process().wait();
    } else {
      fail("ended with exit code " + std::to_string(status), status);
      std::fflush(nullptr);
      leave(status);
    }
  }

  Link link_;
  bool serves_ = false;
  pid_t pid_ = -1;  ///< Of the process that has joined; another one has only been forked off from it.
  int rank_ = 0;
  int local_rank_ = 0;
  int size_ = 1;
  std::atomic<int> step_ = 0;
  bool has_own_log_ = false;
  std::terminate_handler previous_terminate_ = nullptr;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool failed_ = false;     ///< This rank has said that it fails,
  bool condemned_ = false;  ///< and that is why the job ends.
  bool left_ = false;
  bool finished_ = false;
  std::atomic<bool> holding_ = false;
  int stop_at_ = -1;
};

}  // namespace detail
}  // namespace fabric
