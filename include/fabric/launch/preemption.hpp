// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <csignal>

#include "fabric/launch/job.hpp"

namespace fabric {

/// Has this process been sent SIGTERM or SIGUSR1? From the first call on, these signals set a flag and do nothing else;
/// before it they end the process, as ever.
[[nodiscard]] inline bool stop_was_requested() {
  static std::atomic<bool> requested = false;  // lock-free, as a signal handler needs it
  static const bool installed = [] {
    struct sigaction remember {};
    remember.sa_handler = [](int) { requested.store(true, std::memory_order_relaxed); };
    remember.sa_flags = SA_RESTART;
    for (const int signal : {SIGTERM, SIGUSR1}) sigaction(signal, &remember, nullptr);
    return true;
  }();
  return installed && requested.load(std::memory_order_relaxed);
}

namespace detail {

/// The same for all ranks of the job: true on all of them at the same step, once one was asked.
inline bool should_stop() {
  Job& job = Job::of_this_process();
  const bool wanted = stop_was_requested();
  return job.joined() && job.size() > 1 ? job.should_stop(wanted) : wanted;
}

}  // namespace detail
}  // namespace fabric
