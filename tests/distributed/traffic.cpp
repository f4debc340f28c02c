// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// ranks: 8
//
// What gloo's collectives send, counted at the socket, is what fabric/shard/traffic.hpp says, on 2, 4 and 8 processes.
#include <cstdint>
#include <string>
#include <vector>

#include "fabric/shard/traffic.hpp"
#include "support/ranks.hpp"
#include "support/socket_count.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;

/// What `run()` sends from this rank. The kernel agrees to the byte.
template <class Run>
Traffic sent_by(Run&& run) {
  const tests::SocketCount before = tests::socket_count();
  const std::int64_t kernel_before = tests::bytes_in_kernel();
  run();
  const tests::SocketCount sent = tests::socket_count() - before;
  const std::int64_t kernel = tests::bytes_in_kernel() - kernel_before;
  if (kernel_before >= 0) REQUIRE(static_cast<std::uint64_t>(kernel) == sent.bytes());
  return {sent.payload, sent.messages};
}

/// Elements of each rank: fewer than ranks and segments, odd, and more than one segment of a mebibyte.
constexpr std::int64_t parts[] = {1, 3, 1000, 99999, 300001};

}  // namespace

TEST_CASE("[issue-8.accept] the bytes and messages of gloo's collectives are those of the formulae, on each rank") {
  on_ranks<F32>([](auto& fabric) {
    const auto backend = fabric.world().group->getBackend(at::kCPU);
    const auto ranks = static_cast<std::uint64_t>(fabric.world_size());
    const auto rank = static_cast<std::uint64_t>(fabric.global_rank());
    at::Tensor greeting = torch::ones({fabric.world_size()});
    at::Tensor greetings = torch::empty_like(greeting);
    std::vector<std::int64_t> equal;
    backend->alltoall_base(greetings, greeting, equal, equal)->wait();  // all sockets are known then
    fabric.barrier();
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
      for (const std::int64_t elements : parts) {
        INFO("rank " << rank << " of " << ranks << ", " << elements << " elements of " << at::toString(dtype));
        at::Tensor part = torch::ones({elements}, dtype);
        at::Tensor all = torch::ones({fabric.world_size() * elements}, dtype);
        at::Tensor all_too = torch::ones_like(all);
        const std::uint64_t bytes = part.nbytes();
        REQUIRE(sent_by([&] { backend->_allgather_base(all, part)->wait(); }) ==
                gloo_traffic::all_gather(bytes, ranks));
        REQUIRE(sent_by([&] { backend->alltoall_base(all_too, all, equal, equal)->wait(); }) ==
                gloo_traffic::all_to_all(bytes, ranks));
        const Traffic reduced = gloo_traffic::all_reduce(all.nbytes(), part.element_size(), ranks, rank);
        std::vector<at::Tensor> tensors{all};
        REQUIRE(sent_by([&] { backend->allreduce(tensors)->wait(); }) == reduced);
        tensors = {part};
        REQUIRE(sent_by([&] { backend->allreduce(tensors)->wait(); }) ==
                gloo_traffic::all_reduce(bytes, part.element_size(), ranks, rank));
        for (const int root : {0, fabric.world_size() - 1}) {
          c10d::BroadcastOptions options;
          options.rootRank = root;
          REQUIRE(sent_by([&] { backend->broadcast(tensors, options)->wait(); }) ==
                  gloo_traffic::broadcast(bytes, ranks, rank, static_cast<std::uint64_t>(root)));
        }
        // The reason why gradients are reduce-scattered by all_to_all: this one does not send less than all_reduce.
        REQUIRE(sent_by([&] { backend->_reduce_scatter_base(part, all)->wait(); }) == reduced);
      }
    }
    REQUIRE(sent_by([&] { backend->barrier()->wait(); }) == gloo_traffic::barrier(ranks));
    fabric.barrier();
  });
}

TEST_CASE("[issue-8.accept] all_reduce sends 2 (N - 1) / N of the bytes, all_gather and all_to_all half of it") {
  constexpr std::uint64_t bytes = 1U << 30U;
  for (std::uint64_t ranks = 2; ranks <= 4096; ranks *= 2) {
    const std::uint64_t part = bytes / ranks;
    STATIC_REQUIRE(gloo_traffic::all_reduce(bytes, 4, 64, 5).bytes == 2 * 63 * bytes / 64);
    REQUIRE(gloo_traffic::all_reduce(bytes, 4, ranks, ranks / 3).bytes == 2 * (ranks - 1) * part);
    REQUIRE(gloo_traffic::all_gather(part, ranks).bytes == (ranks - 1) * part);
    REQUIRE(gloo_traffic::all_to_all(part, ranks).bytes == (ranks - 1) * part);
  }
}

TEST_CASE("[issue-8.accept] all of this on four ranks") { tests::again_on_ranks(4); }
TEST_CASE("[issue-8.accept] all of this on eight ranks") { tests::again_on_ranks(8); }
