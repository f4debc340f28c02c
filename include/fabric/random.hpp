// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>

#include <torch/types.h>
#include <torch/utils.h>

namespace fabric {

/// Seeds LibTorch's generators on all devices and C's `rand`, and returns the seed. Call it with the same seed on every
/// rank, so that all make equal modules.
inline std::uint64_t seed_everything(std::uint64_t seed = 0) {
  torch::manual_seed(seed);
  std::srand(static_cast<unsigned>(seed));
  return seed;
}

/// Operators that have a deterministic implementation use it; those that have none throw.
inline void use_deterministic_algorithms(bool on = true) {
  at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
  at::globalContext().setDeterministicCuDNN(on);
  if (on) {
    at::globalContext().setBenchmarkCuDNN(false);
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8",
           /*overwrite=*/0);  // cuBLAS is deterministic only with a fixed workspace
  }
}

}  // namespace fabric
