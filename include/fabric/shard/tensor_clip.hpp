// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <utility>

#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/module/clip_gradients.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/tensor_slice.hpp"

namespace fabric {

/// `clip_gradients` for a module that `parallelize_module` divided, or its optimizer: the norm is the undivided
/// module's, each slice counted on its rank, and what is whole on all ranks counted once. All ranks of the tensor group
/// call this. Returns the norm from before; throws as `clip_gradients` does.
template <class Owner>
at::Tensor clip_sliced_gradients(const Owner& owner, const ClipNorm& clip, const World& tensor) {
  detail::check_clip(clip);
  const at::NoGradGuard no_grad;
  NamedParameters sliced;
  NamedParameters whole;
  for (const auto& named : parameters_of(owner)) (tensor_slice_of(named.second) ? sliced : whole).push_back(named);
  const auto parts = detail::by_device_and_dtype(gradients_of(sliced));
  const auto rest = detail::by_device_and_dtype(gradients_of(whole));
  const auto norm_of = [&](const auto& lists) {
    return lists.empty() ? at::zeros({}, tensor.device) : detail::total_norm(lists, clip.norm_type);
  };
  const auto over_ranks = [&](const at::Tensor& own) {
    return all_reduce(tensor, own, std::isinf(clip.norm_type) ? ReduceOp::max : ReduceOp::sum);
  };
  const at::Tensor norms =
      at::stack({detail::combined_norm(norm_of(parts), clip.norm_type, over_ranks), norm_of(rest)});
  at::Tensor norm = at::linalg_vector_norm(norms, clip.norm_type);
  detail::check_finite(owner, clip, norm);
  detail::scale_to(parts, norm, clip.max_norm);
  detail::scale_to(rest, norm, clip.max_norm);
  return norm;
}

}  // namespace fabric
