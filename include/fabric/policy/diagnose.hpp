// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#include <boost/hana/at.hpp>
#include <boost/hana/size.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>
#include <boost/hana/unpack.hpp>

#include "fabric/policy/registry.hpp"
#include "fabric/policy/rules.hpp"

namespace fabric {

/// A trainer's view of what it runs on. Declared here so that a type can be named and checked without LibTorch; defined
/// in `fabric/core.hpp`.
template <class Accelerator, class Strategy, class Precision, class Environment = Detected>
class Fabric;

/// Stands in a compiler's message before the nearest legal combination.
template <class F>
struct use_instead;

/// Never defined: naming it makes the compiler print, in one line, what was `Given`, the rule that refuses it and a
/// legal neighbour.
template <class Given, RuleId because, class Instead>
struct refused;

namespace detail {

struct Neighbour {
  std::size_t accelerator, strategy, precision;
};

template <class List>
inline constexpr auto facts_of = boost::hana::unpack(List{}, [](auto... type) {
  return std::array{decltype(type)::type::facts...};
});

/// How far `to` is from `from`, where `change` is the choice that the refusing rule says to change: changing that one
/// is cheap, and a replacement of the same nature (parallel or not, mixed or not) is cheaper than one of another.
constexpr int distance(const Combination& from, const Combination& to, Axis change) {
  int cost = 0;
  if (to.accelerator != from.accelerator) cost += change == Axis::accelerator ? 2 : 9;
  if (to.strategy != from.strategy) {
    cost += change == Axis::strategy ? 2 : 6;
    cost += is_parallel(to.strategy) != is_parallel(from.strategy) ? 1 : 0;
  }
  if (to.precision != from.precision) {
    cost += change == Axis::precision ? 2 : 6;
    cost += is_mixed(to.precision) != is_mixed(from.precision) ? 1 : 0;
  }
  return cost;
}

/// The nearest legal combination of the library's own policies. Every accelerator has one, so the search cannot fail.
template <class A, class S, class P, class E>
class NearestLegal {
  static constexpr Neighbour search() {
    constexpr auto accelerators = facts_of<std::remove_const_t<decltype(built_in_accelerators<>)>>;
    constexpr auto strategies = facts_of<std::remove_const_t<decltype(built_in_strategies<>)>>;
    constexpr auto precisions = facts_of<std::remove_const_t<decltype(built_in_precisions<>)>>;
    constexpr Combination given = combination_v<A, S, P, E>;
    constexpr Axis change = rule_of(first_refusal(given)).change;
    Neighbour nearest{0, 0, 0};
    int least = -1;
    for (std::size_t a = 0; a < accelerators.size(); ++a) {
      for (std::size_t s = 0; s < strategies.size(); ++s) {
        for (std::size_t p = 0; p < precisions.size(); ++p) {
          const Combination other{accelerators[a], strategies[s], precisions[p], given.environment};
          const int cost = distance(given, other, change);
          if ((least < 0 || cost < least) && first_refusal(other) == RuleId::none) {
            nearest = {a, s, p};
            least = cost;
          }
        }
      }
    }
    return nearest;
  }
  static constexpr Neighbour index = search();

 public:
  using type = Fabric<typename decltype(+boost::hana::at_c<index.accelerator>(built_in_accelerators<>))::type,
                      typename decltype(+boost::hana::at_c<index.strategy>(built_in_strategies<>))::type,
                      typename decltype(+boost::hana::at_c<index.precision>(built_in_precisions<>))::type, E>;
};

}  // namespace detail

/// True for a legal combination. For another one the compiler stops at `refused<...>`, whose arguments say what was
/// given, why it is refused and what to use instead.
template <class A, class S, class P, class E = Detected>
constexpr bool diagnose() {
  constexpr RuleId because = first_refusal(combination_v<A, S, P, E>);
  if constexpr (because != RuleId::none) {
    using Instead = use_instead<typename detail::NearestLegal<A, S, P, E>::type>;
    return sizeof(refused<Fabric<A, S, P, E>, because, Instead>) != 0;
  }
  return true;
}

}  // namespace fabric
