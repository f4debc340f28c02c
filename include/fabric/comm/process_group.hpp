// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupWrapper.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/types.h>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "fabric/comm/world.hpp"
#include "fabric/policy/accelerator.hpp"

namespace fabric {

/// Can processes on GPUs talk to each other in this program? True when it is compiled against a CUDA LibTorch.
#ifdef USE_C10D_NCCL
inline constexpr bool built_with_nccl = true;
#else
inline constexpr bool built_with_nccl = false;
#endif

/// What a process group is made of, besides its ranks.
struct GroupOptions {
  c10::intrusive_ptr<c10d::Store> store{};  ///< In which the ranks find each other; the group's keys get its name.
  std::string name{};                       ///< The same on all ranks, and another one for each group.
  std::string device{};  ///< Gloo: the address of this host at which the others reach it, or an interface.
  bool device_is_interface = false;
  /// Gloo: what to reach the others by instead, where another group of this process has it already.
  std::vector<std::shared_ptr<::gloo::transport::Device>> transports{};
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};  ///< Of each collective.
  /// Compare each collective with those of the other ranks before it runs. Costs more than the collectives themselves.
  bool detect_desync = false;
};

namespace detail {

/// Has another rank gone without a word? Then no group is closed in a way that waits for it.
inline std::atomic<bool>& somebody_is_gone() {
  static std::atomic<bool> gone{false};
  return gone;
}

#ifdef USE_C10D_NCCL
/// A group that nobody closed is closed with its last owner, as LibTorch's own wants to be before it ends.
class Nccl final : public c10d::ProcessGroupNCCL {
 public:
  using ProcessGroupNCCL::ProcessGroupNCCL;
  ~Nccl() override {
    if (closed_) return;
    if (std::uncaught_exceptions() > 0) {  // where others may wait for this rank
      terminateProcessGroup_.store(true);  // so that LibTorch does not ask for what would wait for them
      return;
    }
    try {
      somebody_is_gone() ? Nccl::abort() : Nccl::shutdown();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "fabric: warning: a process group could not be closed: %s\n", error.what());
    }
  }
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  void shutdown() override {
    if (!std::exchange(closed_, true)) ProcessGroupNCCL::shutdown();
  }
  void abort() override {
    closed_ = true;
    ProcessGroupNCCL::abort();
  }

 private:
  bool closed_ = false;
};
#endif

/// Gloo serves Cpu always; Cuda needs a program built with NCCL.
template <class A>
inline constexpr bool has_collectives = std::same_as<A, Cpu> || (std::same_as<A, Cuda> && built_with_nccl);

inline c10::intrusive_ptr<c10d::ProcessGroupGloo> make_gloo(const World& world, const GroupOptions& options,
                                                            const c10::intrusive_ptr<c10d::Store>& store) {
  auto gloo = c10d::ProcessGroupGloo::Options::create(options.timeout);
  gloo->devices = options.transports;
  if (gloo->devices.empty()) {
    gloo->devices.push_back(options.device_is_interface
                                ? c10d::ProcessGroupGloo::createDeviceForInterface(options.device)
                                : c10d::ProcessGroupGloo::createDeviceForHostname(options.device));
  }
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, world.global_rank, world.size, std::move(gloo));
}

}  // namespace detail

/// Makes a process group of `world`, whose ranks all call this in the same order: gloo for tensors on `cpu`, NCCL on
/// `cuda`. Throws `c10::Error` when the others do not come within the timeout.
[[nodiscard]] inline c10::intrusive_ptr<c10d::ProcessGroup> make_process_group(const World& world, at::Device device,
                                                                               const GroupOptions& options) {
  const auto store = c10::make_intrusive<c10d::PrefixStore>(options.name, options.store);
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, world.global_rank, world.size);
  auto type = c10d::ProcessGroup::BackendType::GLOO;
  c10::intrusive_ptr<c10d::Backend> backend;
  if (device.is_cuda()) {
#ifdef USE_C10D_NCCL
    type = c10d::ProcessGroup::BackendType::NCCL;
    auto nccl = c10d::ProcessGroupNCCL::Options::create();
    nccl->timeout = options.timeout;
    backend = c10::make_intrusive<detail::Nccl>(store, world.global_rank, world.size, nccl);
#else
    TORCH_CHECK(false, "fabric: this program was built without NCCL");
#endif
  } else {
    backend = detail::make_gloo(world, options, store);
  }
  if (options.detect_desync && world.size > 1) {
    const auto apart = c10::make_intrusive<c10d::PrefixStore>("desync", store);
    backend = c10::make_intrusive<c10d::ProcessGroupWrapper>(backend, detail::make_gloo(world, options, apart));
  }
  group->setBackend(device.type(), type, backend);
  group->setDefaultBackend(type);
  group->setGroupName(options.name);
  return group;
}

}  // namespace fabric
