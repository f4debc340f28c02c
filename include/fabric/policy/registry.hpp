// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>

#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/precision.hpp"
#include "fabric/policy/strategy.hpp"

namespace fabric {

/// Every policy of the library, as Hana tuples of types, in the order in which messages list them:
/// `built_in_strategies<>`. Templates, because a tuple of that length costs compile time and few programs ask for it.
template <class = void>
inline constexpr auto built_in_accelerators = boost::hana::tuple_t<Cpu, Cuda, Mps, Xla>;
template <class = void>
inline constexpr auto built_in_strategies =
    boost::hana::tuple_t<SingleDevice, Ddp, DdpFindUnusedParameters, DdpSpawn, DdpSpawnFindUnusedParameters, DdpFork,
                         DdpForkFindUnusedParameters, DdpNotebook, DdpNotebookFindUnusedParameters, DataParallel, Fsdp,
                         FsdpCpuOffload, DeepSpeed<1>, DeepSpeed<1, Offload::cpu>, DeepSpeed<2>,
                         DeepSpeed<2, Offload::cpu>, DeepSpeed<3>, DeepSpeed<3, Offload::cpu>,
                         DeepSpeed<3, Offload::nvme>, ModelParallel, SingleDeviceXla, XlaDdp, XlaFsdp>;
template <class = void>
inline constexpr auto built_in_precisions =
    boost::hana::tuple_t<F32, F64, F16, BF16, F16Mixed, BF16Mixed, TransformerEngine<BF16>, TransformerEngine<F16>,
                         Bitsandbytes<BitsandbytesMode::nf4>, Bitsandbytes<BitsandbytesMode::nf4_dq>,
                         Bitsandbytes<BitsandbytesMode::fp4>, Bitsandbytes<BitsandbytesMode::fp4_dq>,
                         Bitsandbytes<BitsandbytesMode::int8>, Bitsandbytes<BitsandbytesMode::int8_training>>;

/// A strategy under a value of `--strategy`.
struct StrategyEntry {
  std::string_view flag;
  const StrategyFacts* facts;
};

/// An accelerator under a value of `--accelerator`.
struct AcceleratorEntry {
  std::string_view flag;
  const AcceleratorFacts* facts;
};

/// What the flags' texts mean: the library's policies, then those of the program.
struct Registry {
  const StrategyEntry* strategies;
  std::size_t strategy_count;
  const AcceleratorEntry* accelerators;
  std::size_t accelerator_count;

  /// The place of the strategy of that name; `strategy_count` when there is none.
  [[nodiscard]] constexpr std::size_t find_strategy(std::string_view flag) const {
    std::size_t i = 0;
    while (i < strategy_count && strategies[i].flag != flag) ++i;
    return i;
  }
  /// The place of the accelerator of that name; `accelerator_count` when there is none.
  [[nodiscard]] constexpr std::size_t find_accelerator(std::string_view flag) const {
    std::size_t i = 0;
    while (i < accelerator_count && accelerators[i].flag != flag) ++i;
    return i;
  }
  // Whether there is one is no comparison of a pointer with null, which g++ 12 takes for no constant expression when it
  // instruments for undefined behaviour.
  [[nodiscard]] constexpr bool has_strategy(std::string_view flag) const {
    return find_strategy(flag) < strategy_count;
  }
  [[nodiscard]] constexpr bool has_accelerator(std::string_view flag) const {
    return find_accelerator(flag) < accelerator_count;
  }
  /// The strategy of that name, which there is.
  [[nodiscard]] constexpr const StrategyFacts& strategy(std::string_view flag) const {
    return *strategies[find_strategy(flag)].facts;
  }
  /// The accelerator of that name, which there is.
  [[nodiscard]] constexpr const AcceleratorFacts& accelerator(std::string_view flag) const {
    return *accelerators[find_accelerator(flag)].facts;
  }
};

namespace detail {

inline constexpr std::array<AcceleratorEntry, 4> accelerator_entries{{{Cpu::facts.flag, &Cpu::facts},
                                                                      {Cuda::facts.flag, &Cuda::facts},
                                                                      {Mps::facts.flag, &Mps::facts},
                                                                      {Xla::facts.flag, &Xla::facts}}};

inline constexpr std::array<StrategyEntry, 28> strategy_entries{{
    {"ddp", &Ddp::facts},
    {"ddp_spawn", &DdpSpawn::facts},
    {"ddp_fork", &DdpFork::facts},
    {"ddp_notebook", &DdpNotebook::facts},
    {"ddp_find_unused_parameters_true", &DdpFindUnusedParameters::facts},
    {"dp", &DataParallel::facts},
    {"deepspeed", &DeepSpeed<>::facts},
    {"deepspeed_stage_1", &DeepSpeed<1>::facts},
    {"deepspeed_stage_1_offload", &DeepSpeed<1, Offload::cpu>::facts},
    {"deepspeed_stage_2", &DeepSpeed<2>::facts},
    {"deepspeed_stage_2_offload", &DeepSpeed<2, Offload::cpu>::facts},
    {"deepspeed_stage_3", &DeepSpeed<3>::facts},
    {"deepspeed_stage_3_offload", &DeepSpeed<3, Offload::cpu>::facts},
    {"deepspeed_stage_3_offload_nvme", &DeepSpeed<3, Offload::nvme>::facts},
    {"fsdp", &Fsdp::facts},
    {"fsdp_cpu_offload", &FsdpCpuOffload::facts},
    {"single_device", &SingleDevice::facts},
    {"single_xla", &SingleDeviceXla::facts},
    {"xla_fsdp", &XlaFsdp::facts},
    {"xla", &XlaDdp::facts},
    {"single_tpu", &SingleDeviceXla::facts},
    {"ddp_find_unused_parameters_false", &Ddp::facts},
    {"ddp_spawn_find_unused_parameters_true", &DdpSpawnFindUnusedParameters::facts},
    {"ddp_spawn_find_unused_parameters_false", &DdpSpawn::facts},
    {"ddp_fork_find_unused_parameters_true", &DdpForkFindUnusedParameters::facts},
    {"ddp_fork_find_unused_parameters_false", &DdpFork::facts},
    {"ddp_notebook_find_unused_parameters_true", &DdpNotebookFindUnusedParameters::facts},
    {"ddp_notebook_find_unused_parameters_false", &DdpNotebook::facts},
}};

/// The library's entries with the program's behind them.
template <class... Extra>
struct ExtendedRegistry {
  static constexpr std::size_t strategy_extras = (std::size_t{StrategyPolicy<Extra>} + ... + 0);
  static constexpr std::size_t accelerator_extras = (std::size_t{AcceleratorPolicy<Extra>} + ... + 0);

  static constexpr auto strategies = [] {
    std::array<StrategyEntry, strategy_entries.size() + strategy_extras> all{};
    std::size_t n = 0;
    for (const StrategyEntry& entry : strategy_entries) all[n++] = entry;
    (
        [&] {
          if constexpr (StrategyPolicy<Extra>) all[n++] = {Extra::facts.flag, &Extra::facts};
        }(),
        ...);
    return all;
  }();
  static constexpr auto accelerators = [] {
    std::array<AcceleratorEntry, accelerator_entries.size() + accelerator_extras> all{};
    std::size_t n = 0;
    for (const AcceleratorEntry& entry : accelerator_entries) all[n++] = entry;
    (
        [&] {
          if constexpr (AcceleratorPolicy<Extra>) all[n++] = {Extra::facts.flag, &Extra::facts};
        }(),
        ...);
    return all;
  }();
};

}  // namespace detail

/// The library's registry.
inline constexpr Registry built_in_registry{detail::strategy_entries.data(), detail::strategy_entries.size(),
                                            detail::accelerator_entries.data(), detail::accelerator_entries.size()};

/// The library's registry and the program's own strategies and accelerators: `resolve(flags, env, host,
/// registry_with<Gossip>)` knows the flag that `Gossip::facts` names.
template <class... Policies>
inline constexpr Registry registry_with{detail::ExtendedRegistry<Policies...>::strategies.data(),
                                        detail::ExtendedRegistry<Policies...>::strategies.size(),
                                        detail::ExtendedRegistry<Policies...>::accelerators.data(),
                                        detail::ExtendedRegistry<Policies...>::accelerators.size()};

}  // namespace fabric
