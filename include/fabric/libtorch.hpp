// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything in which LibTorch 2.9 to 2.15 differ for this library stands here.

#include <memory>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <torch/types.h>
#include <torch/version.h>

static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 9,
              "fabric: LibTorch 2.9 or newer is needed; `make libtorch` installs one that is known to work");

namespace fabric::libtorch {

/// c10d's Reducer, which can be asked whether it waits for gradients.
class Reducer : public c10d::Reducer {
 public:
  using c10d::Reducer::Reducer;
  /// Between a forward that prepared it and the end of that backward: gradients that come now are averaged.
  [[nodiscard]] bool expects_gradients() const { return expect_autograd_hooks_; }
};

/// What `c10d::Reducer`'s constructor takes in each of these versions.
struct ReducerArguments {
  std::vector<at::Tensor> parameters;
  std::vector<std::vector<size_t>> buckets;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  int64_t bucket_bytes = 0;
  int64_t first_bucket_bytes = 0;
  bool find_unused_parameters = false;
  bool gradient_as_bucket_view = true;
  std::unordered_map<size_t, std::string> names;
};

/// Makes a Reducer for dense gradients.
[[nodiscard]] inline std::shared_ptr<Reducer> make_reducer(ReducerArguments arguments) {
  std::vector<bool> sparse(arguments.parameters.size(), false);
  constexpr bool skip_all_reduce_of_unused = false;
  constexpr bool python = false;
  return std::make_shared<Reducer>(
      std::move(arguments.parameters), std::move(arguments.buckets), std::move(arguments.group), std::move(sparse),
      arguments.bucket_bytes, arguments.find_unused_parameters, arguments.gradient_as_bucket_view,
      std::move(arguments.names), arguments.first_bucket_bytes, skip_all_reduce_of_unused, python
#if TORCH_VERSION_MINOR >= 11
      ,
      std::vector<int64_t>{}  // one capacity for all buckets
#endif
  );
}

/// Every rank's `own` in `whole`, one after another. 2.15 renamed what the group calls it.
template <class Group>
[[nodiscard]] c10::intrusive_ptr<c10d::Work> all_gather_into(Group& group, at::Tensor whole, at::Tensor own) {
  if constexpr (requires { group.all_gather_single(whole, own); }) {
    return group.all_gather_single(whole, own);
  } else {
    return group._allgather_base(whole, own);
  }
}
/// This rank's part of the sum of all ranks' `whole` in `own`.
template <class Group>
[[nodiscard]] c10::intrusive_ptr<c10d::Work> reduce_scatter_into(Group& group, at::Tensor own, at::Tensor whole) {
  if constexpr (requires { group.reduce_scatter_single(own, whole); }) {
    return group.reduce_scatter_single(own, whole);
  } else {
    return group._reduce_scatter_base(own, whole);
  }
}

/// Are the fused kernels of SGD and Adagrad for CPUs right in 16 bits? Before 2.15 they left most elements of a
/// parameter as they were (https://github.com/pytorch/pytorch/issues/191763).
inline constexpr bool fused_sgd_is_right_in_16_bits = TORCH_VERSION_MINOR >= 15;

/// A pointer to a node of the autograd graph: shared in 2.9, intrusive later.
using NodePointer = std::remove_cvref_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

/// A reference to a node that does not keep the graph behind it alive.
class WeakNode {
 public:
  WeakNode() = default;
  explicit WeakNode(const NodePointer& node) : node_(node) {}
  /// Null when the node is gone.
  [[nodiscard]] NodePointer lock() const { return node_.lock(); }

 private:
  template <class Node>
  static std::weak_ptr<Node> weak(const std::shared_ptr<Node>&);
  template <class Node>
  static c10::weak_intrusive_ptr<Node> weak(const c10::intrusive_ptr<Node>&);

  decltype(weak(std::declval<NodePointer>())) node_{NodePointer()};
};

}  // namespace fabric::libtorch
