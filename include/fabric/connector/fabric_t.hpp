// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include <boost/hana/at.hpp>
#include <boost/hana/bool.hpp>
#include <boost/hana/concat.hpp>
#include <boost/hana/filter.hpp>
#include <boost/hana/integral_constant.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>
#include <boost/hana/unpack.hpp>

#include "fabric/connector/nearest.hpp"
#include "fabric/connector/resolve.hpp"
#include "fabric/policy/diagnose.hpp"
#include "fabric/policy/registry.hpp"

namespace fabric {

// What a compiler's message shows of a name that is wrong. Characters, because not every compiler prints texts among
// template arguments.

/// The name that was given.
template <char... characters>
struct given;
/// The legal name nearest to it; empty when none is near.
template <char... characters>
struct did_you_mean;
/// The policies that have a name.
template <class... Policies>
struct legal;

/// Never defined: naming one makes the compiler print, in one line, what was given, what was probably meant and what is
/// legal.
template <class Given, class Nearest, class Legal>
struct unknown_accelerator;
template <class Given, class Nearest, class Legal>
struct unknown_strategy;
template <class Given, class Nearest, class Legal>
struct unknown_precision;

namespace detail {

inline constexpr std::size_t nowhere = static_cast<std::size_t>(-1);

/// The library's policies of one kind with those of the extra policies that are of that kind, too.
template <class... Extra>
constexpr auto with_extra(auto built_in, auto is_one) {
  if constexpr (sizeof...(Extra) == 0) {
    return built_in;
  } else {
    return boost::hana::concat(built_in, boost::hana::filter(boost::hana::tuple_t<Extra...>, is_one));
  }
}
// Function objects, since g++ 12 miscompiles aliases with lambdas inside.
struct IsAccelerator {
  template <class P>
  constexpr auto operator()(P) const -> boost::hana::bool_<AcceleratorPolicy<typename P::type>> {
    return {};
  }
};
struct IsStrategy {
  template <class P>
  constexpr auto operator()(P) const -> boost::hana::bool_<StrategyPolicy<typename P::type>> {
    return {};
  }
};
struct ToLegal {
  template <class... P>
  constexpr auto operator()(P...) const -> boost::hana::type<legal<typename P::type...>> {
    return {};
  }
};
template <class... Extra>
using AllAccelerators = decltype(with_extra<Extra...>(built_in_accelerators<>, IsAccelerator{}));
template <class... Extra>
using AllStrategies = decltype(with_extra<Extra...>(built_in_strategies<>, IsStrategy{}));
template <class... Extra>
using AllPrecisions = std::remove_const_t<decltype(built_in_precisions<>)>;
template <class Policies>
using Legal = typename decltype(boost::hana::unpack(Policies{}, ToLegal{}))::type;

/// The place in the list of the one with these facts.
template <class Policies>
constexpr std::size_t place_of(const auto& facts) {
  constexpr auto& all = facts_of<Policies>;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i] == facts) return i;
  }
  return nowhere;
}

template <class Policies, std::size_t place>
struct PolicyAt {
  using type = typename decltype(+boost::hana::at_c<place>(Policies{}))::type;
};
template <class Policies>
struct PolicyAt<Policies, nowhere> {
  static_assert(sizeof(Policies) == 0, "fabric: the selection's policy is not among those passed to fabric_of");
};

/// `Shown` with the characters of a text.
template <template <char...> class Shown, Name text, class = std::make_index_sequence<text.length>>
struct Characters;
template <template <char...> class Shown, Name text, std::size_t... i>
struct Characters<Shown, text, std::index_sequence<i...>> {
  using type = Shown<text.bytes[i]...>;
};

constexpr Name nearest_accelerator(const Name& given, const Registry& registry) {
  if (given == "gpu") return Cuda::facts.flag;  // a type is about one kind of GPU
  Nearest nearest(given);
  for (std::size_t i = 0; i < registry.accelerator_count; ++i) nearest.consider(registry.accelerators[i].flag);
  return nearest.best;
}
constexpr Name nearest_strategy(const Name& given, const Registry& registry) {
  Nearest nearest(given);
  for (std::size_t i = 0; i < registry.strategy_count; ++i) nearest.consider(registry.strategies[i].flag);
  return nearest.best;
}
constexpr Name nearest_precision(const Name& given) {
  Nearest nearest(given);
  for (const PrecisionEntry& entry : precision_entries) nearest.consider(entry.flag);
  return nearest.best;
}
constexpr std::size_t find_precision(std::string_view flag) {
  std::size_t i = 0;
  while (i < precision_entries.size() && precision_entries[i].flag != flag) ++i;
  return i;
}

/// A machine that has this accelerator: types are not about the machine that compiles them.
constexpr Host host_with(DeviceType device) {
  return Host{.cuda_devices = device == DeviceType::cuda ? 1 : 0,
              .mps = device == DeviceType::mps,
              .tpu_devices = device == DeviceType::xla ? 1 : 0};
}

}  // namespace detail

/// The type that a constexpr selection names: `constexpr Selection s = resolve({...}, env, host); fabric_of<s>`.
/// Policies from outside the library go behind it.
template <Selection selection, class... Extra>
using fabric_of =
    Fabric<typename detail::PolicyAt<detail::AllAccelerators<Extra...>,
                                     detail::place_of<detail::AllAccelerators<Extra...>>(selection.accelerator)>::type,
           typename detail::PolicyAt<detail::AllStrategies<Extra...>,
                                     detail::place_of<detail::AllStrategies<Extra...>>(selection.strategy)>::type,
           typename detail::PolicyAt<detail::AllPrecisions<Extra...>,
                                     detail::place_of<detail::AllPrecisions<Extra...>>(selection.precision)>::type>;

namespace detail {

/// The first of the names that no policy has.
enum class Unknown : std::uint8_t { nothing, accelerator, strategy, precision };

template <Name accelerator, Name strategy, Name precision, class... Extra>
inline constexpr Unknown unknown_name = !registry_with<Extra...>.has_accelerator(accelerator)   ? Unknown::accelerator
                                        : !registry_with<Extra...>.has_strategy(strategy)       ? Unknown::strategy
                                        : find_precision(precision) == precision_entries.size() ? Unknown::precision
                                                                                                : Unknown::nothing;

template <Unknown unknown, Name accelerator, Name strategy, Name precision, class... Extra>
struct FabricFromFlags {
  static constexpr const Registry& registry = registry_with<Extra...>;
  static constexpr auto find_type() {
    constexpr std::size_t a = place_of<AllAccelerators<Extra...>>(registry.accelerator(accelerator));
    constexpr std::size_t s = place_of<AllStrategies<Extra...>>(registry.strategy(strategy));
    constexpr std::size_t p = place_of<AllPrecisions<>>(*precision_entries[find_precision(precision)].facts);
    if constexpr (diagnose<typename PolicyAt<AllAccelerators<Extra...>, a>::type,
                           typename PolicyAt<AllStrategies<Extra...>, s>::type,
                           typename PolicyAt<AllPrecisions<>, p>::type>()) {
      constexpr Selection selection =
          resolve({.accelerator = accelerator.view(), .strategy = strategy.view(), .precision = precision.view()}, {},
                  host_with(registry.accelerator(accelerator).device), registry);
      return boost::hana::type_c<fabric_of<selection, Extra...>>;
    }
  }
  using type = typename decltype(find_type())::type;
};

template <Name accelerator, Name strategy, Name precision, class... Extra>
struct FabricFromFlags<Unknown::accelerator, accelerator, strategy, precision, Extra...> {
  static constexpr Name nearest = nearest_accelerator(accelerator, registry_with<Extra...>);
  using type = typename unknown_accelerator<typename Characters<given, accelerator>::type,
                                            typename Characters<did_you_mean, nearest>::type,
                                            Legal<AllAccelerators<Extra...>>>::type;
};
template <Name accelerator, Name strategy, Name precision, class... Extra>
struct FabricFromFlags<Unknown::strategy, accelerator, strategy, precision, Extra...> {
  static constexpr Name nearest = nearest_strategy(strategy, registry_with<Extra...>);
  using type =
      typename unknown_strategy<typename Characters<given, strategy>::type,
                                typename Characters<did_you_mean, nearest>::type, Legal<AllStrategies<Extra...>>>::type;
};
template <Name accelerator, Name strategy, Name precision, class... Extra>
struct FabricFromFlags<Unknown::precision, accelerator, strategy, precision, Extra...> {
  static constexpr Name nearest = nearest_precision(precision);
  using type =
      typename unknown_precision<typename Characters<given, precision>::type,
                                 typename Characters<did_you_mean, nearest>::type, Legal<AllPrecisions<>>>::type;
};

}  // namespace detail

/// The type that flags name: `fabric_t<"cuda", "ddp", "bf16-mixed">` is `Fabric<Cuda, Ddp, BF16Mixed>`. The accelerator
/// is taken to be there. A name that does not exist, and a combination that the rules refuse, do not compile, and the
/// message says what would. Policies from outside the library go behind the names.
template <Name accelerator, Name strategy, Name precision, class... Extra>
using fabric_t = typename detail::FabricFromFlags<detail::unknown_name<accelerator, strategy, precision, Extra...>,
                                                  accelerator, strategy, precision, Extra...>::type;

}  // namespace fabric
