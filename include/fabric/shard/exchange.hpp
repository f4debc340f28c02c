// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/libtorch.hpp"

namespace fabric {

/// The processes among which a module is sharded, and those that hold the same shards.
struct ShardGroups {
  World world{};      ///< All of them: those whose gradients are averaged.
  World shard{};      ///< Among whom each unit is divided; without a group where that is nobody else.
  World prefetch{};   ///< The same ranks, for what is gathered while gradients are reduced.
  World replicate{};  ///< The ranks that hold the same part in other shard groups.
  World tensor{};     ///< The ranks that hold slices of the same layers (tensor parallelism), who see the same data.
};

namespace detail {

/// Moves parts of flat buffers between the ranks of a shard group. What it starts runs in the background; buffers must
/// live until `finish`.
///
/// On gloo each part is one message, sent from where it lies to where it belongs: gloo's own all-gather makes a copy of
/// the whole, and its reduce-scatter moves as many bytes as an all-reduce.
class Exchange {
 public:
  using Pending = std::vector<c10::intrusive_ptr<c10d::Work>>;

  explicit Exchange(ShardGroups groups) : groups_(std::move(groups)) {}

  [[nodiscard]] std::int64_t shards() const { return groups_.shard.size; }
  [[nodiscard]] std::int64_t shard_rank() const { return groups_.shard.global_rank; }
  [[nodiscard]] std::int64_t replicas() const { return groups_.replicate.size; }
  [[nodiscard]] const ShardGroups& groups() const { return groups_; }

  /// The part of a buffer that a rank of the shard group owns.
  [[nodiscard]] at::Tensor part(const at::Tensor& buffer, std::int64_t rank) const {
    const std::int64_t size = buffer.numel() / shards();
    return buffer.narrow(0, rank * size, size);
  }
  [[nodiscard]] at::Tensor own_part(const at::Tensor& buffer) const { return part(buffer, shard_rank()); }

  /// Begins to fill a buffer with all ranks' parts, of which this rank's own is in its place. `number` is the unit's.
  [[nodiscard]] Pending gather(const at::Tensor& buffer, int number) const {
    Pending pending;
    if (shards() == 1) return pending;
    auto& group = *groups_.prefetch.group;
    at::Tensor own = own_part(buffer);
    if (buffer.is_cuda()) {
      pending.push_back(libtorch::all_gather_into(group, buffer, own));
      return pending;
    }
    for_each_other([&](int rank) {
      std::vector<at::Tensor> there{part(buffer, rank)};
      pending.push_back(group.recv(there, rank, 2 * number));
    });
    for_each_other([&](int rank) {
      std::vector<at::Tensor> here{own};
      pending.push_back(group.send(here, rank, 2 * number));
    });
    return pending;
  }

  /// Begins to give each rank its part of all ranks' buckets: on gloo, `received` (shards - 1, part) gets those of the
  /// others, else (part) their sum. Where nothing is divided, the bucket becomes the sum.
  [[nodiscard]] Pending scatter(const at::Tensor& bucket, const at::Tensor& received, int number) const {
    Pending pending;
    if (shards() == 1) {
      std::vector<at::Tensor> in_place{bucket};
      if (replicas() > 1) pending.push_back(groups_.replicate.group->allreduce(in_place));
      return pending;
    }
    auto& group = *groups_.shard.group;
    if (bucket.is_cuda()) {
      pending.push_back(libtorch::reduce_scatter_into(group, received, bucket));
      return pending;
    }
    std::int64_t row = 0;
    for_each_other([&](int rank) {
      std::vector<at::Tensor> there{received[row++]};
      pending.push_back(group.recv(there, rank, 2 * number + 1));
    });
    for_each_other([&](int rank) {
      std::vector<at::Tensor> here{part(bucket, rank)};
      pending.push_back(group.send(here, rank, 2 * number + 1));
    });
    return pending;
  }
  /// Puts the sum of this rank's part over the shard group, after `scatter`, into `total` (part), of any dtype.
  void sum(const at::Tensor& bucket, const at::Tensor& received, at::Tensor& total) const {
    if (shards() > 1 && bucket.is_cuda()) {
      total.copy_(received);
      return;
    }
    total.copy_(own_part(bucket));
    for (std::int64_t row = 0; row + 1 < shards(); ++row) total.add_(received[row]);
  }
  /// Adds what the replicas have, after `sum`.
  void sum_over_replicas(at::Tensor& total) const {
    if (shards() > 1 && replicas() > 1) total = all_reduce(groups_.replicate, std::move(total), ReduceOp::sum);
  }

  /// Waits for what was started.
  void finish(Pending& pending, const char* name) const {
    for (const auto& work : std::exchange(pending, {})) detail::finish(groups_.shard, work, name);
  }

 private:
  /// Each rank begins with its neighbour, so that not all send to one.
  template <class Visit>
  void for_each_other(Visit&& visit) const {
    for (int step = 1; step < groups_.shard.size; ++step) {
      visit((groups_.shard.global_rank + step) % groups_.shard.size);
    }
  }

  ShardGroups groups_;
};

}  // namespace detail
}  // namespace fabric
