// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/hana/cartesian_product.hpp>
#include <boost/hana/filter.hpp>
#include <boost/hana/transform.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>
#include <boost/hana/unpack.hpp>

#include "fabric/policy/diagnose.hpp"
#include "fabric/policy/rules.hpp"

namespace fabric {

/// The accelerators of a menu.
template <AcceleratorPolicy... A>
struct Accelerators {};
/// The strategies of a menu.
template <StrategyPolicy... S>
struct Strategies {};
/// The precisions of a menu.
template <PrecisionPolicy... P>
struct Precisions {};

/// What a program can run on: every legal combination of its choices, as a Hana tuple `entries` of `type<Fabric<...>>`.
/// The rules filter out the others: `Menu<Accelerators<Cpu, Mps>, Strategies<SingleDevice, Ddp>, Precisions<F32>>` has
/// three entries.
template <class Accelerators, class Strategies, class Precisions>
struct Menu;

template <class... A, class... S, class... P>
struct Menu<Accelerators<A...>, Strategies<S...>, Precisions<P...>> {
 private:
  static constexpr auto choices = boost::hana::cartesian_product(
      boost::hana::make_tuple(boost::hana::tuple_t<A...>, boost::hana::tuple_t<S...>, boost::hana::tuple_t<P...>));

 public:
  static constexpr auto entries = boost::hana::transform(
      boost::hana::filter(
          choices,
          [](auto choice) {
            return boost::hana::unpack(choice, [](auto a, auto s, auto p) {
              return boost::hana::bool_c<
                  CompatibleWith<typename decltype(a)::type, typename decltype(s)::type, typename decltype(p)::type>>;
            });
          }),
      [](auto choice) {
        return boost::hana::unpack(choice, [](auto a, auto s, auto p) {
          return boost::hana::type_c<
              Fabric<typename decltype(a)::type, typename decltype(s)::type, typename decltype(p)::type>>;
        });
      });
};

/// The policies of a `Fabric<...>`, which may be incomplete.
template <class F>
struct PoliciesOf;
template <class A, class S, class P, class E>
struct PoliciesOf<Fabric<A, S, P, E>> {
  static constexpr Combination combination = combination_v<A, S, P, E>;
};

}  // namespace fabric
