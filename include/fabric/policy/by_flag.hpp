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

}  // namespace detail

/// Policies by their own flag, as a Boost.Hana map from strings to types:
/// `by_flag<Ddp, Fsdp>[BOOST_HANA_STRING("ddp")]` is `hana::type_c<Ddp>`.
template <class... Policies>
inline constexpr auto by_flag = boost::hana::make_map(detail::by_flag(boost::hana::type_c<Policies>)...);

/// All accelerators by flag, the program's own behind the library's. Instantiated only where it is used, since a large
/// map costs compile time; at run time and in `resolve`, `Registry` says the same.
template <class... Extra>
inline constexpr auto accelerators_by_flag = by_flag<Cpu, Cuda, Mps, Xla, Extra...>;

/// All strategies by flag, likewise. `deepspeed` and `single_tpu` are other names of `deepspeed_stage_2` and
/// `single_xla`.
template <class... Extra>
inline constexpr auto strategies_by_flag = boost::hana::make_map(
    boost::hana::make_pair(boost::hana::string_c<'d', 'e', 'e', 'p', 's', 'p', 'e', 'e', 'd'>,
                           boost::hana::type_c<DeepSpeed<>>),
    boost::hana::make_pair(boost::hana::string_c<'s', 'i', 'n', 'g', 'l', 'e', '_', 't', 'p', 'u'>,
                           boost::hana::type_c<SingleDeviceXla>),
    detail::by_flag(boost::hana::type_c<Ddp>), detail::by_flag(boost::hana::type_c<DdpSpawn>),
    detail::by_flag(boost::hana::type_c<DdpFork>), detail::by_flag(boost::hana::type_c<DdpNotebook>),
    detail::by_flag(boost::hana::type_c<DdpFindUnusedParameters>), detail::by_flag(boost::hana::type_c<DataParallel>),
    detail::by_flag(boost::hana::type_c<DeepSpeed<1>>),
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
