// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <utility>

#include <boost/hana/at_key.hpp>
#include <boost/hana/map.hpp>
#include <boost/hana/pair.hpp>
#include <boost/hana/string.hpp>
#include <boost/hana/type.hpp>

#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/strategy.hpp"

// The registries as maps from strings to types. A header of its own, since Hana's maps cost compile time and `resolve`
// and `fabric_t` need none.

namespace fabric {

namespace detail {

template <class Policy, std::size_t... i>
constexpr auto flag_string(std::index_sequence<i...>) {
  return boost::hana::string_c<Policy::facts.flag.bytes[i]...>;
}

template <class Policy>
constexpr auto by_flag(boost::hana::basic_type<Policy> policy) {
  return boost::hana::make_pair(flag_string<Policy>(std::make_index_sequence<Policy::facts.flag.length>{}), policy);
}

/// A policy under another name than its own.
template <Name name, class Policy, std::size_t... i>
constexpr auto by_name(std::index_sequence<i...>) {
  return boost::hana::make_pair(boost::hana::string_c<name.bytes[i]...>, boost::hana::type_c<Policy>);
}
template <Name name, class Policy>
constexpr auto by_name() {
  return by_name<name, Policy>(std::make_index_sequence<name.length>{});
}

}  // namespace detail

/// Policies by their own flag, as a Boost.Hana map from strings to types:
/// `by_flag<Ddp, Fsdp>[BOOST_HANA_STRING("ddp")]` is `hana::type_c<Ddp>`.
template <class... Policies>
inline constexpr auto by_flag = boost::hana::make_map(detail::by_flag(boost::hana::type_c<Policies>)...);

/// All accelerators by flag, the program's own behind the library's. Instantiated only where it is used, since a large
/// map costs compile time; at run time and in `resolve`, `Registry` says the same.
template <class... Extra>
inline constexpr auto accelerators_by_flag = by_flag<Cpu, Cuda, Mps, Xla, Extra...>;

/// All strategies by flag, likewise. `deepspeed`, `single_tpu` and those in `_false` are other names.
template <class... Extra>
inline constexpr auto strategies_by_flag = boost::hana::make_map(
    detail::by_name<"deepspeed", DeepSpeed<>>(), detail::by_name<"single_tpu", SingleDeviceXla>(),
    detail::by_name<"ddp_find_unused_parameters_false", Ddp>(),
    detail::by_name<"ddp_spawn_find_unused_parameters_false", DdpSpawn>(),
    detail::by_name<"ddp_fork_find_unused_parameters_false", DdpFork>(),
    detail::by_name<"ddp_notebook_find_unused_parameters_false", DdpNotebook>(),
    detail::by_flag(boost::hana::type_c<DdpSpawnFindUnusedParameters>),
    detail::by_flag(boost::hana::type_c<DdpForkFindUnusedParameters>),
    detail::by_flag(boost::hana::type_c<DdpNotebookFindUnusedParameters>), detail::by_flag(boost::hana::type_c<Ddp>),
    detail::by_flag(boost::hana::type_c<DdpSpawn>), detail::by_flag(boost::hana::type_c<DdpFork>),
    detail::by_flag(boost::hana::type_c<DdpNotebook>), detail::by_flag(boost::hana::type_c<DdpFindUnusedParameters>),
    detail::by_flag(boost::hana::type_c<DataParallel>), detail::by_flag(boost::hana::type_c<DeepSpeed<1>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<1, Offload::cpu>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<2>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<2, Offload::cpu>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<3>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<3, Offload::cpu>>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<3, Offload::nvme>>), detail::by_flag(boost::hana::type_c<Fsdp>),
    detail::by_flag(boost::hana::type_c<FsdpCpuOffload>), detail::by_flag(boost::hana::type_c<SingleDevice>),
    detail::by_flag(boost::hana::type_c<SingleDeviceXla>), detail::by_flag(boost::hana::type_c<XlaFsdp>),
    detail::by_flag(boost::hana::type_c<XlaDdp>), detail::by_flag(boost::hana::type_c<Extra>)...);

}  // namespace fabric
