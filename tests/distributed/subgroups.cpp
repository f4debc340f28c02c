// SPDX-License-Identifier: Apache-2.0
//
// Process groups of some ranks, and the mesh of data x tensor, on 2 and 4 processes.
// ranks: 4
#include <chrono>
#include <vector>

#include "fabric/comm/device_mesh.hpp"
#include "support/ranks.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;

int sum_of_ranks(const World& world, int global_rank) { return all_reduce(world, global_rank, ReduceOp::sum); }

}  // namespace

TEST_CASE("[issue-8.1] a subgroup's collectives stay among its ranks, and its ranks are places in the list") {
  on_ranks<F32>([](auto& fabric) {
    const World& world = fabric.world();
    const int last = world.size - 1;
    const auto group = make_subgroup(world, {last, 0}, "ends");
    const bool within = world.global_rank == 0 || world.global_rank == last;
    REQUIRE(static_cast<bool>(group) == within);
    if (!within) return;
    REQUIRE(group->getSize() == 2);
    REQUIRE(group->getRank() == (world.global_rank == last ? 0 : 1));
    const World ends = world_of(world, group);
    REQUIRE(sum_of_ranks(ends, world.global_rank) == last);
    REQUIRE(broadcast(ends, world.global_rank, 0) == last);
  });
}

TEST_CASE("[issue-8.1] several groups with one name, or with the same ranks, are apart") {
  on_ranks<F32>([](auto& fabric) {
    const World& world = fabric.world();
    const World first = world_of(world, make_subgroup(world, {0, 1}, "pair"));
    const World second = world_of(world, make_subgroup(world, {0, 1}, "pair"));
    const World alone = world_of(world, make_subgroup(world, {world.global_rank}, "pair"));
    REQUIRE(alone.group->getSize() == 1);
    REQUIRE(sum_of_ranks(alone, world.global_rank) == world.global_rank);
    if (!first.group) return;
    REQUIRE(first.group->getGroupName() != second.group->getGroupName());
    // Both are under way at once, and are waited for in the order in which they were not begun.
    std::vector<at::Tensor> a{torch::ones({1000})};
    std::vector<at::Tensor> b{torch::full({1000}, world.global_rank)};
    const auto work_a = first.group->allreduce(a);
    const auto work_b = second.group->allreduce(b);
    work_b->wait();
    work_a->wait();
    REQUIRE(a[0].eq(2).all().item<bool>());
    REQUIRE(b[0].eq(1).all().item<bool>());
  });
}

TEST_CASE("[issue-8.1] a subgroup inherits the world's timeout and desync detection") {
  on_ranks<F32>({.detect_desync = true}, [](auto& fabric) {
    const World& world = fabric.world();
    const auto group = make_subgroup(world, {0, 1}, "watched");
    if (!group) return;
    const auto backend = group->getBackend(at::kCPU);
    const auto wrapper = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroupWrapper>(backend);
    REQUIRE(wrapper);
    const auto gloo = c10::dynamic_intrusive_pointer_cast<c10d::ProcessGroupGloo>(wrapper->getWrappedPg());
    REQUIRE(gloo->getOptions()->timeout == std::chrono::seconds(60));
    const World pair = world_of(world, group);
    REQUIRE(sum_of_ranks(pair, world.global_rank) == 1);
  });
}

TEST_CASE("[issue-8.1] a rank that does not come is named, within the time") {
  on_ranks<F32>([](auto& fabric) {
    const World& world = fabric.world();
    if (world.global_rank == 0) {
      REQUIRE_THROWS_WITH(
          make_subgroup(world, {0, 1}, "late", std::chrono::milliseconds(200)),
          ContainsSubstring("fabric: make_subgroup 'late': not all of its ranks came within 200 ms; missing: 1."));
    }
    fabric.barrier();
    REQUIRE_THROWS_WITH(make_subgroup(world, {0, 0}, "twice"),
                        ContainsSubstring("[0, 0]") && ContainsSubstring("each at most once"));
    REQUIRE_THROWS_WITH(make_subgroup(world, {}, "none"), ContainsSubstring("one or more of 0 to"));
    REQUIRE_THROWS_AS(make_subgroup(world, {world.size}, "beyond"), Error);
  });
}

TEST_CASE("[issue-8.1] a mesh is a grid whose tensor groups are neighbours") {
  on_ranks<F32>([](auto& fabric) {
    const World& world = fabric.world();
    const int rank = world.global_rank;
    const DeviceMesh mesh = make_mesh(world, 2);
    REQUIRE(mesh.tensor.size == 2);
    REQUIRE(mesh.data.size == world.size / 2);
    REQUIRE(mesh.tensor.global_rank == rank % 2);
    REQUIRE(mesh.data.global_rank == rank / 2);
    const at::Tensor neighbours = all_gather(mesh.tensor, torch::tensor(rank));
    REQUIRE(neighbours.equal(torch::tensor({rank / 2 * 2, rank / 2 * 2 + 1})));
    const at::Tensor replicas = all_gather(mesh.data, torch::tensor(rank));
    REQUIRE(replicas.equal(torch::arange(rank % 2, world.size, 2, torch::kInt)));
    REQUIRE_THROWS_WITH(make_mesh(world, 3),
                        ContainsSubstring("do not divide the world of") && ContainsSubstring("legal are 1, 2"));
  });
}

TEST_CASE("[issue-8.1] a world of one process has a mesh too") {
  const DeviceMesh mesh = make_mesh(World{}, 1);
  REQUIRE_FALSE(mesh.tensor.group);
  REQUIRE(mesh.data.size == 1);
  REQUIRE(all_reduce(mesh.data, 3, ReduceOp::sum) == 3);
}

TEST_CASE("[issue-8.1] subgroups on four ranks") { tests::again_on_ranks(4); }
