// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include <torch/types.h>

#include "fabric/side_stream.hpp"

namespace fabric::detail {

/// How a unit is kept.
struct UnitOptions {
  at::ScalarType compute = at::kFloat;  ///< Of the whole parameters.
  at::ScalarType master = at::kFloat;   ///< Of what the optimizer changes.
  at::ScalarType reduce = at::kFloat;   ///< Of gradients on their way.
  at::Device device = at::kCPU;         ///< Where the parameters are used.
  at::Device master_device = at::kCPU;  ///< Where `master` and its gradient are.
  at::Device own_device = at::kCPU;     ///< Where this rank's part of the parameters waits while they are not whole.
  std::string folder{};                 ///< Where `master` and that part are files; empty: in memory.
  bool past_cache = false;              ///< Those files are read and written past the kernel's cache.
  SideStream* copies = nullptr;         ///< By which what the host has goes to a device and back; null: none does.
  bool frees_parameters = true;         ///< They are whole only while they are needed.
  bool frees_buckets = true;            ///< Likewise the memory in which gradients are sent.
};

}  // namespace fabric::detail
