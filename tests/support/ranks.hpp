// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <utility>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/process.hpp"

namespace fabric::tests {

/// What the tests of several ranks run on. Those that say `also: cuda` are compiled once more, for GPUs.
#ifdef FABRIC_TESTS_ON_CUDA
using Tested = Cuda;
#else
using Tested = Cpu;
#endif

/// On how many ranks this program's test cases run: 2, or what `again_on_ranks` says.
inline int ranks() {
  const char* number = std::getenv("FABRIC_TEST_RANKS");
  return number == nullptr ? 2 : std::atoi(number);
}

/// Are the ranks nodes of their own, with one device each? So they are where there are fewer GPUs than ranks.
inline bool apart() { return std::getenv("FABRIC_TESTS_APART") != nullptr; }

/// Runs `body(fabric)` on all ranks. The first call starts the others, which run this program's test cases from the
/// beginning like rank 0 does, and so come to this same call. A rank that fails takes the job down.
template <class P, class S = Ddp, class Body>
void on_ranks(typename Engine<Tested, S>::Options options, Body&& body) {
  at::set_num_threads(1);
  options.timeout = std::chrono::seconds(60);
  int rank = -1;
  try {
    Fabric<Tested, S, P> fabric(
        {.devices = apart() ? 1 : ranks(), .num_nodes = apart() ? ranks() : 1, .strategy = options});
    fabric.launch();
    rank = fabric.global_rank();
    REQUIRE(fabric.world_size() == ranks());
    body(fabric);
    fabric.barrier();
  } catch (const std::exception& error) {
    std::cout << "rank " << rank << " of " << ranks() << ": " << error.what() << std::endl;
    std::exit(1);
  } catch (...) {  // a failed REQUIRE, which Catch has reported
    std::cout << "rank " << rank << " of " << ranks() << " failed" << std::endl;
    std::exit(1);
  }
}
template <class P, class S = Ddp, class Body>
void on_ranks(Body&& body) {
  on_ranks<P, S>(typename Engine<Tested, S>::Options{}, std::forward<Body>(body));
}

/// Runs this program's test cases once more, on that many ranks. Called on all ranks; the first one does it.
inline void again_on_ranks(int number) {
  for (const char* variable : {"LOCAL_RANK", "NODE_RANK"}) {
    const char* rank = std::getenv(variable);
    if (rank != nullptr && std::string(rank) != "0") return;
  }
  if (std::getenv("FABRIC_TEST_RANKS") != nullptr) return;
  Process program({"/proc/self/exe"}, {{"FABRIC_TEST_RANKS", std::to_string(number)}});
  const int code = program.wait(150);
  INFO(program.output());
  REQUIRE(code == 0);
}

/// Is the tensor the same on all ranks, bit for bit?
inline bool same_on_all_ranks(const World& world, const at::Tensor& tensor) {
  const at::Tensor gathered = all_gather(world, tensor);
  for (int rank = 0; rank < world.size; ++rank) {
    if (!gathered[rank].equal(tensor)) return false;
  }
  return true;
}

}  // namespace fabric::tests
