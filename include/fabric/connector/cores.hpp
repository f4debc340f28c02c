// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <thread>

#include <sched.h>

namespace fabric::detail {

/// The processor cores that this process may use, as a text that is equal for processes which share all of them.
inline std::string usable_cores() {
  std::string cores;
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) cores += std::to_string(core) + ",";
    }
  }
#endif
  return cores;
}

/// How many cores this process may use.
inline int count_usable_cores() {
  const std::string cores = usable_cores();
  const auto count = static_cast<int>(std::count(cores.begin(), cores.end(), ','));
  return count > 0 ? count : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace fabric::detail
