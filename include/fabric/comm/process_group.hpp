// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/torch.h>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "fabric/comm/world.hpp"

namespace fabric {

/// Can processes on GPUs talk to each other in this program? True when it is compiled against a CUDA LibTorch.
#ifdef USE_C10D_NCCL
inline constexpr bool built_with_nccl = true;
#else
inline constexpr bool built_with_nccl = false;
#endif

/// Where the processes meet: a key-value store that one of them serves.
struct Rendezvous {
  std::string address;
  int port = 0;        ///< 0: the server picks a free one.
  bool serve = false;  ///< This process is the server.
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};
};

namespace detail {

inline bool is_loopback(const std::string& address) { return address == "localhost" || address.starts_with("127."); }

/// One connection a process for each meeting point: a second Fabric in the same process meets the same peers there. It
/// is kept until the process ends, since a server that left early would take late comers' keys with it.
inline c10::intrusive_ptr<c10d::TCPStore> shared_store(Rendezvous& where) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, c10::intrusive_ptr<c10d::TCPStore>> stores;
  const std::lock_guard lock(mutex);
  if (where.port != 0) {
    if (const auto found = stores.find({where.address, where.port}); found != stores.end()) return found->second;
  }
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(where.port);
  options.isServer = where.serve;
  options.waitWorkers = false;
  options.timeout = where.timeout;
  auto store = c10::make_intrusive<c10d::TCPStore>(where.address, options);
  where.port = store->getPort();
  stores.emplace(std::pair(where.address, where.port), store);
  return store;
}

inline std::shared_ptr<::gloo::transport::Device> gloo_device(const std::string& main_address) {
  if (const char* interface = std::getenv("GLOO_SOCKET_IFNAME")) {
    return c10d::ProcessGroupGloo::createDeviceForInterface(interface);
  }
  // Looking up the host's own name can fail or be slow, and a job of one node need not do it.
  if (is_loopback(main_address)) return c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1");
  return c10d::ProcessGroupGloo::createDefaultDevice();
}

}  // namespace detail

/// Makes the process group of `world`, whose ranks all call this in the same order: gloo for tensors on `cpu`, NCCL on
/// `cuda`. Sets `where.port` to the server's. Throws `c10::Error` when the others do not come within the timeout.
[[nodiscard]] inline c10::intrusive_ptr<c10d::ProcessGroup> make_process_group(const World& world, at::Device device,
                                                                               Rendezvous& where) {
  static int groups = 0;  // ranks make their groups in the same order, so that equal numbers meet
  // An elastic agent's store outlives the processes that it starts again.
  const char* attempt = std::getenv("TORCHELASTIC_RESTART_COUNT");
  const std::string prefix =
      std::string("fabric/") + (attempt != nullptr ? attempt : "0") + "/" + std::to_string(groups++);
  auto store = c10::make_intrusive<c10d::PrefixStore>(prefix, detail::shared_store(where));
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, world.global_rank, world.size);
  if (device.is_cuda()) {
#ifdef USE_C10D_NCCL
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = where.timeout;
    group->setBackend(at::kCUDA, c10d::ProcessGroup::BackendType::NCCL,
                      c10::make_intrusive<c10d::ProcessGroupNCCL>(store, world.global_rank, world.size, options));
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::NCCL);
#else
    TORCH_CHECK(false, "fabric: this program was built without NCCL");
#endif
  } else {
    auto options = c10d::ProcessGroupGloo::Options::create(where.timeout);
    options->devices.push_back(detail::gloo_device(where.address));
    group->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                      c10::make_intrusive<c10d::ProcessGroupGloo>(store, world.global_rank, world.size, options));
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
  }
  group->setGroupName(prefix);
  return group;
}

}  // namespace fabric
