// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "fabric/policy/text.hpp"

namespace fabric {

/// How a strategy spreads the work. Variants of one family share rules and most of an engine.
enum class StrategyFamily : std::uint8_t {
  single_device,
  data_parallel,
  ddp,
  fsdp,
  deepspeed,
  model_parallel,
  single_device_xla,
  xla,
  xla_fsdp,
  custom,
};

/// How the processes of the other local ranks begin. `none`: the strategy runs in one process.
enum class StartMethod : std::uint8_t { none, popen, spawn, fork, forkserver };

/// Where a sharded strategy keeps the state that the device does not need right now.
enum class Offload : std::uint8_t { none, cpu, nvme };

/// What is known of a strategy without LibTorch. Fields that a family does not have keep their defaults.
struct StrategyFacts {
  Name name;  ///< The policy's own name, for messages: "Ddp".
  Name flag;  ///< The value of `--strategy` that means it; empty if only code can ask for it.
  StrategyFamily family = StrategyFamily::custom;
  StartMethod start_method = StartMethod::none;
  bool find_unused_parameters = false;        ///< Ddp: look for parameters that took no part in the loss.
  int stage = 0;                              ///< DeepSpeed: ZeRO stage 1, 2 or 3; 0 shards nothing.
  Offload optimizer_offload = Offload::none;  ///< DeepSpeed.
  Offload parameter_offload = Offload::none;  ///< DeepSpeed and Fsdp.
  bool built_in = true;                       ///< False for a strategy from outside the library.

  friend constexpr bool operator==(const StrategyFacts&, const StrategyFacts&) = default;
};

/// Does the strategy use several devices (each in a process of its own, except for DataParallel)?
[[nodiscard]] constexpr bool is_parallel(const StrategyFacts& s) {
  return s.start_method != StartMethod::none || s.family == StrategyFamily::data_parallel;
}

/// Does the strategy run in one process on one device?
[[nodiscard]] constexpr bool runs_on_one_device(const StrategyFacts& s) {
  return s.family == StrategyFamily::single_device || s.family == StrategyFamily::single_device_xla;
}

/// Is the strategy one of those that drive XLA devices?
[[nodiscard]] constexpr bool is_xla(const StrategyFacts& s) {
  return s.family == StrategyFamily::single_device_xla || s.family == StrategyFamily::xla ||
         s.family == StrategyFamily::xla_fsdp;
}

/// Does the strategy shard parameters, gradients or optimizer state over processes?
[[nodiscard]] constexpr bool is_sharded(const StrategyFacts& s) {
  return s.family == StrategyFamily::fsdp || s.family == StrategyFamily::deepspeed ||
         s.family == StrategyFamily::model_parallel;
}

/// A strategy policy is an empty type with `static constexpr StrategyFacts facts`.
template <class S>
concept StrategyPolicy = std::is_empty_v<S> && requires {
  { S::facts } -> std::convertible_to<StrategyFacts>;
};

/// One process, one device.
struct SingleDevice {
  static constexpr StrategyFacts facts{
      .name = "SingleDevice", .flag = "single_device", .family = StrategyFamily::single_device};
};

/// One process, one replica of the module per GPU for each forward.
struct DataParallel {
  static constexpr StrategyFacts facts{.name = "DataParallel", .flag = "dp", .family = StrategyFamily::data_parallel};
};

/// One process per device, a replica in each, gradients averaged in buckets while backward runs
/// (Li et al., "PyTorch Distributed", VLDB 2020).
struct Ddp {
  static constexpr StrategyFacts facts{
      .name = "Ddp", .flag = "ddp", .family = StrategyFamily::ddp, .start_method = StartMethod::popen};
};

/// `Ddp` that tolerates parameters which took no part in the loss; it searches the graph in each step.
struct DdpFindUnusedParameters {
  static constexpr StrategyFacts facts{.name = "DdpFindUnusedParameters",
                                       .flag = "ddp_find_unused_parameters_true",
                                       .family = StrategyFamily::ddp,
                                       .start_method = StartMethod::popen,
                                       .find_unused_parameters = true};
};

/// `Ddp` whose processes are spawned for one function rather than for the whole program.
struct DdpSpawn {
  static constexpr StrategyFacts facts{
      .name = "DdpSpawn", .flag = "ddp_spawn", .family = StrategyFamily::ddp, .start_method = StartMethod::spawn};
};

/// `DdpSpawn` that tolerates parameters which took no part in the loss.
struct DdpSpawnFindUnusedParameters {
  static constexpr StrategyFacts facts{.name = "DdpSpawnFindUnusedParameters",
                                       .flag = "ddp_spawn_find_unused_parameters_true",
                                       .family = StrategyFamily::ddp,
                                       .start_method = StartMethod::spawn,
                                       .find_unused_parameters = true};
};

/// `Ddp` whose processes are forked for one function.
struct DdpFork {
  static constexpr StrategyFacts facts{
      .name = "DdpFork", .flag = "ddp_fork", .family = StrategyFamily::ddp, .start_method = StartMethod::fork};
};

/// `DdpFork` that tolerates parameters which took no part in the loss.
struct DdpForkFindUnusedParameters {
  static constexpr StrategyFacts facts{.name = "DdpForkFindUnusedParameters",
                                       .flag = "ddp_fork_find_unused_parameters_true",
                                       .family = StrategyFamily::ddp,
                                       .start_method = StartMethod::fork,
                                       .find_unused_parameters = true};
};

/// `DdpFork` under the name that notebooks use.
struct DdpNotebook {
  static constexpr StrategyFacts facts{
      .name = "DdpNotebook", .flag = "ddp_notebook", .family = StrategyFamily::ddp, .start_method = StartMethod::fork};
};

/// `DdpNotebook` that tolerates parameters which took no part in the loss.
struct DdpNotebookFindUnusedParameters {
  static constexpr StrategyFacts facts{.name = "DdpNotebookFindUnusedParameters",
                                       .flag = "ddp_notebook_find_unused_parameters_true",
                                       .family = StrategyFamily::ddp,
                                       .start_method = StartMethod::fork,
                                       .find_unused_parameters = true};
};

/// Fully sharded data parallel (Zhao et al., "PyTorch FSDP", VLDB 2023).
struct Fsdp {
  static constexpr StrategyFacts facts{
      .name = "Fsdp", .flag = "fsdp", .family = StrategyFamily::fsdp, .start_method = StartMethod::popen};
};

/// `Fsdp` whose parameters, gradients and optimizer's state are in the host's memory.
struct FsdpCpuOffload {
  static constexpr StrategyFacts facts{.name = "FsdpCpuOffload",
                                       .flag = "fsdp_cpu_offload",
                                       .family = StrategyFamily::fsdp,
                                       .start_method = StartMethod::popen,
                                       .optimizer_offload = Offload::cpu,
                                       .parameter_offload = Offload::cpu};
};

namespace detail {
constexpr Name deepspeed_flag(int stage, Offload offload) {
  Name flag("deepspeed_stage_");
  flag.append(static_cast<long long>(stage));
  if (offload != Offload::none) flag.append("_offload");
  if (offload == Offload::nvme) flag.append("_nvme");
  return flag;
}
}  // namespace detail

/// ZeRO (Rajbhandari et al., SC 2020): stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too.
/// Plain `deepspeed` is stage 2. `offload` moves the optimizer's state, and in stage 3 the parameters, off the device.
template <int stage = 2, Offload offload = Offload::none>
struct DeepSpeed {
  static_assert(stage >= 1 && stage <= 3, "fabric: DeepSpeed has the stages 1, 2 and 3");
  static_assert(offload != Offload::nvme || stage == 3, "fabric: only DeepSpeed<3> offloads to NVMe; use Offload::cpu");
  static constexpr StrategyFacts facts{.name = "DeepSpeed",
                                       .flag = detail::deepspeed_flag(stage, offload),
                                       .family = StrategyFamily::deepspeed,
                                       .start_method = StartMethod::popen,
                                       .stage = stage,
                                       .optimizer_offload = offload,
                                       .parameter_offload = stage == 3 ? offload : Offload::none};
};

/// Tensor and fully sharded data parallelism on a two-dimensional device mesh.
struct ModelParallel {
  static constexpr StrategyFacts facts{.name = "ModelParallel",
                                       .flag = "",
                                       .family = StrategyFamily::model_parallel,
                                       .start_method = StartMethod::popen};
};

/// One process, one XLA device.
struct SingleDeviceXla {
  static constexpr StrategyFacts facts{
      .name = "SingleDeviceXla", .flag = "single_xla", .family = StrategyFamily::single_device_xla};
};

/// `Ddp` for XLA devices.
struct XlaDdp {
  static constexpr StrategyFacts facts{
      .name = "XlaDdp", .flag = "xla", .family = StrategyFamily::xla, .start_method = StartMethod::fork};
};

/// `Fsdp` for XLA devices.
struct XlaFsdp {
  static constexpr StrategyFacts facts{
      .name = "XlaFsdp", .flag = "xla_fsdp", .family = StrategyFamily::xla_fsdp, .start_method = StartMethod::fork};
};

static_assert(StrategyPolicy<SingleDevice> && StrategyPolicy<Ddp> && StrategyPolicy<DeepSpeed<3, Offload::nvme>>);

}  // namespace fabric
