// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

namespace fabric {

/// What one rank sends to the others.
struct Traffic {
  std::uint64_t bytes = 0;     ///< Of tensors; a transport adds a header to each message.
  std::uint64_t messages = 0;  ///< In how many pieces; gloo sends empty ones too.

  friend constexpr Traffic operator+(const Traffic& a, const Traffic& b) {
    return {a.bytes + b.bytes, a.messages + b.messages};
  }
  friend constexpr Traffic operator*(std::uint64_t times, const Traffic& a) {
    return {times * a.bytes, times * a.messages};
  }
  friend constexpr bool operator==(const Traffic&, const Traffic&) = default;
};

/// What gloo's collectives send, exactly: gloo/allgather.cc, alltoall.cc, allreduce.cc, broadcast.cc and barrier.cc of
/// LibTorch 2.15, and counted at the socket by tests/distributed/traffic.cpp.
namespace gloo_traffic {

/// Of `part` bytes from each rank, on all ranks: each part travels around the ring in two halves.
[[nodiscard]] constexpr Traffic all_gather(std::uint64_t part, std::uint64_t ranks) {
  if (part == 0) return {};
  return {(ranks - 1) * part, 2 * (ranks - 1)};
}

/// Of `part` bytes from each rank for each other one, directly.
[[nodiscard]] constexpr Traffic all_to_all(std::uint64_t part, std::uint64_t ranks) {
  return {(ranks - 1) * part, ranks - 1};
}

/// Of `bytes` in elements of `element` bytes: a reduce-scatter and an all-gather around the ring, in segments of at
/// most a mebibyte. About 2 (ranks - 1) / ranks of the bytes; exactly, it depends on the rank, as segments at the end
/// may be short or empty. `_reduce_scatter_base` is this too, whose result is thrown away but for one part.
[[nodiscard]] constexpr Traffic all_reduce(std::uint64_t bytes, std::uint64_t element, std::uint64_t ranks,
                                           std::uint64_t rank) {
  if (bytes == 0 || ranks == 1) return {};
  const auto divided = [](std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; };  // rounded up
  const std::uint64_t longest = std::max<std::uint64_t>(1, (1U << 20U) / element) * element;
  const std::uint64_t segments = divided(std::max(divided(bytes, longest), 2 * ranks), ranks) * ranks;
  const std::uint64_t segment = divided(divided(bytes, segments), element) * element;
  const std::uint64_t chunk = segments / ranks * segment;  // one for each rank, of several segments
  const auto of_chunk = [&](std::uint64_t index) {
    const std::uint64_t begin = std::min(index * chunk, bytes);
    const std::uint64_t size = std::min(begin + chunk, bytes) - begin;
    return Traffic{size, divided(size, segment)};
  };
  // All chunks twice, but for the one that ends here and the one that comes whole.
  const Traffic own = of_chunk(rank);
  const Traffic next = of_chunk((rank + ranks - 1) % ranks);
  return {2 * bytes - own.bytes - next.bytes, 2 * divided(bytes, segment) - own.messages - next.messages};
}

/// Of `bytes` from rank `root`, down a binomial tree: the root sends most.
[[nodiscard]] constexpr Traffic broadcast(std::uint64_t bytes, std::uint64_t ranks, std::uint64_t rank,
                                          std::uint64_t root = 0) {
  const std::uint64_t own = (rank + ranks - root) % ranks;
  Traffic sent;
  for (std::uint64_t distance = 1; distance < ranks; distance *= 2) {
    if (own < distance && own + distance < ranks) sent = sent + Traffic{bytes, 1};
  }
  return sent;
}

/// Empty messages to ranks 1, 2, 4, ... further on.
[[nodiscard]] constexpr Traffic barrier(std::uint64_t ranks) {
  Traffic sent;
  for (std::uint64_t distance = 1; distance < ranks; distance *= 2) ++sent.messages;
  return sent;
}

}  // namespace gloo_traffic

/// One step of a unit under ZeRO (Rajbhandari et al., SC 2020) on `ranks` ranks that share it: gradients go to their
/// owners; in stages 1 and 2 the new parameters come back, in stage 3 they are gathered for forward and for backward
/// instead. `parameters` and `gradients` are the unit's bytes in the dtypes in which they travel, padded for the ranks.
/// A unit whose backward does not read its parameters (an embedding alone, a first layer alone) is gathered once.
[[nodiscard]] constexpr Traffic sharded_step(int stage, std::uint64_t parameters, std::uint64_t gradients,
                                             std::uint64_t ranks) {
  const std::uint64_t gathered = stage == 3 ? 2 : 1;
  return gathered * gloo_traffic::all_to_all(parameters / ranks, ranks) +
         gloo_traffic::all_to_all(gradients / ranks, ranks);
}

}  // namespace fabric
