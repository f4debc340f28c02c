// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/module/clip_gradients.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/sharded_module.hpp"

namespace fabric::detail {

/// `clip_gradients` for the masters of sharded modules, or an optimizer that has them: the norm is that of the whole
/// modules. All ranks call this. `owner`'s parameters are masters of `states`, which are sharded alike.
template <class Owner>
at::Tensor clip_sharded_gradients(const std::vector<std::shared_ptr<ShardedModule>>& states, const Owner& owner,
                                  const ClipNorm& clip) {
  check_clip(clip);
  if (states.empty()) return fabric::clip_gradients(owner, clip);
  const at::NoGradGuard no_grad;
  const auto is_sliced = [&](const at::Tensor& master) {
    return std::any_of(states.begin(), states.end(), [&](const auto& state) { return state->is_sliced(master); });
  };
  NamedParameters sliced;  // on this rank of the tensor group alone
  NamedParameters whole;
  for (const auto& named : parameters_of(owner)) (is_sliced(named.second) ? sliced : whole).push_back(named);
  const auto parts = by_device_and_dtype(gradients_of(sliced));
  const auto rest = by_device_and_dtype(gradients_of(whole));
  const auto norm_over = [&](const auto& lists, const World& ranks, const at::Tensor& known) {
    const at::Tensor own = known.defined() ? known : lists.empty() ? at::zeros({}) : total_norm(lists, clip.norm_type);
    const auto combine = [&](const at::Tensor& value) {
      return all_reduce(ranks, value.to(ranks.device), std::isinf(clip.norm_type) ? ReduceOp::max : ReduceOp::sum);
    };
    return combined_norm(own, clip.norm_type, combine);
  };
  const ShardGroups& groups = states.front()->groups();
  at::Tensor norm = norm_over(rest, groups.shard, {});
  if (groups.tensor.size > 1) {
    const at::Tensor of_slices = norm_over(parts, groups.tensor, norm_over(parts, groups.shard, {}));
    norm = at::linalg_vector_norm(at::stack({norm, of_slices.to(norm.scalar_type())}), clip.norm_type);
  }
  check_finite(owner, clip, norm);
  scale_to(rest, norm, clip.max_norm);
  scale_to(parts, norm, clip.max_norm);
  return norm;
}

}  // namespace fabric::detail
