// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdlib>

#include <ATen/Parallel.h>

#include "fabric/connector/cores.hpp"

namespace fabric::detail {

/// Threads for each of `processes` that share this process's cores.
inline int threads_each(int processes) { return std::max(1, count_usable_cores() / std::max(1, processes)); }

/// Has somebody decided how many threads a process uses?
inline bool threads_are_chosen() { return std::getenv("OMP_NUM_THREADS") != nullptr; }

/// Processes that share cores share them evenly, unless somebody has divided them already.
inline void divide_threads(int processes) {
  if (processes < 2 || threads_are_chosen()) return;
  at::set_num_threads(threads_each(processes));
}

}  // namespace fabric::detail
