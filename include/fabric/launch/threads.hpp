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

/// Processes that share cores share them evenly, unless somebody has divided them already. A program that has asked for
/// fewer threads before (`at::set_num_threads`) gets no more of them.
inline void divide_threads(int processes) {
  if (processes < 2 || threads_are_chosen()) return;
  const int each = threads_each(processes);
  if (at::get_num_threads() > each) at::set_num_threads(each);
}

}  // namespace fabric::detail
