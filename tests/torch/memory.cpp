// SPDX-License-Identifier: Apache-2.0
//
// What a Fabric on a CPU does about memory that steps free and take again.
#include <cstdlib>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33)

namespace {

/// Bytes that the heap keeps after 20 MB at its end were freed.
std::size_t kept_after_freeing() {
  constexpr std::size_t size = 20U << 20U;
  void* block = std::malloc(size);
  REQUIRE(block != nullptr);
  static_cast<volatile char*>(block)[0] = 1;
  std::free(block);
  return mallinfo2().keepcost;
}

}  // namespace

TEST_CASE("[issue-5.3] a Fabric on a CPU keeps the memory that a step frees for the next one") {
  for (const char* own : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}) {
    if (std::getenv(own) != nullptr) return;  // what the user set stays
  }
  const fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::F32> on_a_cpu;
  CHECK(kept_after_freeing() >= 20U << 20U);
}

#endif
