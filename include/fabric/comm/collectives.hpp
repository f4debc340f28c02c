// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/types.h>

#include "fabric/comm/reason.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/tree.hpp"

namespace fabric {

/// How the values of the ranks become one.
enum class ReduceOp : std::uint8_t { sum, mean, min, max, product };

namespace detail {

inline c10d::ReduceOp c10d_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::min: return c10d::ReduceOp::MIN;
    case ReduceOp::max: return c10d::ReduceOp::MAX;
    case ReduceOp::product: return c10d::ReduceOp::PRODUCT;
    case ReduceOp::sum:
    case ReduceOp::mean: break;
  }
  return c10d::ReduceOp::SUM;
}

inline void check_mean(const at::Tensor& tensor, ReduceOp op) {
  if (op != ReduceOp::mean || tensor.is_floating_point() || tensor.is_complex()) return;
  throw Error(std::string("fabric: the mean of ") + at::toString(tensor.scalar_type()) +
              " tensors is no such number: use ReduceOp::sum, or convert to a floating-point type first");
}

[[noreturn]] inline void refuse_collective(const World& world, const char* name, std::uint64_t number,
                                           const at::Tensor& tensor, const std::string& reason) {
  std::ostringstream text;
  text << "fabric: " << name << " failed on rank " << world.global_rank << " of " << world.size
       << ", as collective number " << number << " of its group";
  if (tensor.defined()) text << ", with " << at::toString(tensor.scalar_type()) << ' ' << tensor.sizes();
  throw Error(text.str() + ": " + reason);
}

/// Waits for a collective. One that fails, for want of time above all, says which it was.
inline void finish(const World& world, const c10::intrusive_ptr<c10d::Work>& work, const char* name,
                   const at::Tensor& tensor = {}) {
  try {
    work->wait();
  } catch (const std::exception& error) {
    refuse_collective(world, name, work->getSequencenumber(), tensor, reason_of(error));
  }
}

/// Throws the current exception again, of a backward: if a collective is its reason, one that says so, with the number
/// that the last collective had. A template for fabric/separate.hpp.
template <class = void>
[[noreturn]] void rethrow_naming_collective(const World& world) {
  try {
    throw;
  } catch (const Error&) {
    throw;  // says it already
  } catch (const std::exception& error) {
    const std::string reason = reason_of(error);
    const auto says = [&](const char* word) { return reason.find(word) != std::string::npos; };
    if (!world.group || !(says("gloo") || says("NCCL") || says("onnection") || says("Timed out"))) throw;
    refuse_collective(world, "the all_reduce of gradients in backward", world.group->getSequenceNumberForGroup(), {},
                      reason);
  }
}

/// Gives all ranks rank 0's values of tensors on the group's device, a few messages for all of them.
inline void broadcast_in_place(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                               const std::vector<at::Tensor>& tensors) {
  constexpr std::size_t bytes_at_once = 250UL * 1024 * 1024;
  if (!group || tensors.empty()) return;
  try {
    c10d::broadcast_coalesced(group, tensors, bytes_at_once);
  } catch (const std::exception& error) {
    refuse_collective({.size = group->getSize(), .global_rank = group->getRank()}, "the broadcast of rank 0's values",
                      group->getSequenceNumberForGroup(), tensors.front(), reason_of(error));
  }
}

/// The contiguous copy, on the group's device, that a collective may write to.
inline std::vector<at::Tensor> own_copy(const World& world, const at::Tensor& tensor) {
  return {tensor.detach().to(world.device).clone(at::MemoryFormat::Contiguous)};
}

}  // namespace detail

/// Waits until all ranks have come here.
inline void barrier(const World& world) {
  if (!world.group) return;
  c10d::BarrierOptions options;
  if (world.device.has_index()) options.device_ids = {world.device.index()};
  detail::finish(world, world.group->barrier(options), "barrier");
}

/// Each tensor of the tree combined over the ranks, on all of them. Shapes and dtypes are the same on each rank. The
/// input is left as it is; numbers inside the tree are not reduced. Throws fabric::Error for the mean of integers.
template <class T>
requires(!std::is_arithmetic_v<tree::Bare<T>>)
    [[nodiscard]] tree::Bare<T> all_reduce(const World& world, T&& value, ReduceOp op = ReduceOp::mean) {
  return tree::map(std::forward<T>(value), [&](const at::Tensor& tensor) {
    detail::check_mean(tensor, op);
    if (!world.group) return tensor;
    auto reduced = detail::own_copy(world, tensor);
    c10d::AllreduceOptions options;
    options.reduceOp = detail::c10d_op(op);
    detail::finish(world, world.group->allreduce(reduced, options), "all_reduce", tensor);
    if (op == ReduceOp::mean) reduced[0].div_(world.size);
    return reduced[0].to(tensor.device());
  });
}

/// A number combined over the ranks, as a 64-bit float or integer.
template <class T>
requires std::is_arithmetic_v<T>
[[nodiscard]] T all_reduce(const World& world, T number, ReduceOp op = ReduceOp::mean) {
  using Wide = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;
  const at::Tensor wide = at::scalar_tensor(static_cast<Wide>(number), c10::CppTypeToScalarType<Wide>::value);
  return static_cast<T>(all_reduce(world, wide, op).template item<Wide>());
}

/// Like `all_reduce`, but only rank `root` gets the result; the others get their own tensors back.
template <class T>
requires(!std::is_arithmetic_v<tree::Bare<T>>)
    [[nodiscard]] tree::Bare<T> reduce(const World& world, T&& value, ReduceOp op = ReduceOp::mean, int root = 0) {
  return tree::map(std::forward<T>(value), [&](const at::Tensor& tensor) {
    detail::check_mean(tensor, op);
    if (!world.group) return tensor;
    auto reduced = detail::own_copy(world, tensor);
    c10d::ReduceOptions options;
    options.reduceOp = detail::c10d_op(op);
    options.rootRank = root;
    detail::finish(world, world.group->reduce(reduced, options), "reduce", tensor);
    if (world.global_rank != root) return tensor;
    if (op == ReduceOp::mean) reduced[0].div_(world.size);
    return reduced[0].to(tensor.device());
  });
}

/// Each tensor of the tree from all ranks, stacked along a new first dimension: (world size, *shape). Where the
/// strategy has no process group, as `SingleDevice`, the tree comes back as it is, without that dimension, as in
/// Lightning Fabric.
template <class T>
requires(!std::is_arithmetic_v<tree::Bare<T>>) [[nodiscard]] tree::Bare<T> all_gather(const World& world, T&& value) {
  return tree::map(std::forward<T>(value), [&](const at::Tensor& tensor) {
    if (!world.group) return tensor;
    auto input = detail::own_copy(world, tensor);
    std::vector<int64_t> shape{world.size};
    shape.insert(shape.end(), tensor.sizes().begin(), tensor.sizes().end());
    auto gathered = at::empty(shape, input[0].options());
    std::vector<std::vector<at::Tensor>> outputs{gathered.unbind(0)};
    detail::finish(world, world.group->allgather(outputs, input), "all_gather", tensor);
    return gathered.to(tensor.device());
  });
}

/// The tensors of rank `root`, on all ranks. The others give tensors of the same shapes and dtypes.
template <class T>
requires(!std::is_arithmetic_v<tree::Bare<T>> && !std::is_same_v<tree::Bare<T>, std::string>)
    [[nodiscard]] tree::Bare<T> broadcast(const World& world, T&& value, int root = 0) {
  return tree::map(std::forward<T>(value), [&](const at::Tensor& tensor) {
    if (!world.group) return tensor;
    auto sent = detail::own_copy(world, tensor);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    detail::finish(world, world.group->broadcast(sent, options), "broadcast", tensor);
    return sent[0].to(tensor.device());
  });
}

/// Rank `root`'s text, on all ranks, of any length.
[[nodiscard]] inline std::string broadcast(const World& world, std::string text, int root = 0) {
  if (!world.group) return text;
  auto length = broadcast(world, torch::tensor(static_cast<int64_t>(text.size())), root);
  text.resize(static_cast<std::size_t>(length.item<int64_t>()));
  auto bytes = at::from_blob(text.data(), {static_cast<int64_t>(text.size())}, at::kByte);
  bytes = broadcast(world, bytes, root);
  return {static_cast<const char*>(bytes.data_ptr()), text.size()};
}

/// Rank `root`'s number, on all ranks, bit for bit.
template <class T>
requires std::is_arithmetic_v<T>
[[nodiscard]] T broadcast(const World& world, T number, int root = 0) {
  if (!world.group) return number;
  auto bytes = at::from_blob(&number, {static_cast<int64_t>(sizeof number)}, at::kByte);
  bytes = broadcast(world, bytes, root);
  std::memcpy(&number, bytes.data_ptr(), sizeof number);
  return number;
}

}  // namespace fabric
