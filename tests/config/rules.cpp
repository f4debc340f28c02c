// SPDX-License-Identifier: Apache-2.0
// The rules table, the types and the connector say the same of every combination of the library's policies.
#include <boost/hana/for_each.hpp>

#include "fabric/config.hpp"
#include "support/catch.hpp"

using namespace fabric;
namespace hana = boost::hana;

namespace {

constexpr Host host_of(DeviceType device) {
  return {.cuda_devices = device == DeviceType::cuda ? 1 : 0,
          .mps = device == DeviceType::mps,
          .tpu_devices = device == DeviceType::xla ? 1 : 0};
}

}  // namespace

TEST_CASE("table, concept and connector agree on every combination", "[issue-4.accept]") {
  int legal = 0, refused = 0;
  hana::for_each(built_in_accelerators<>, [&](auto accelerator) {
    hana::for_each(built_in_strategies<>, [&](auto strategy) {
      hana::for_each(built_in_precisions<>, [&](auto precision) {
        using A = typename decltype(accelerator)::type;
        using S = typename decltype(strategy)::type;
        using P = typename decltype(precision)::type;
        constexpr bool compatible = CompatibleWith<A, S, P>;
        const Resolution r = resolve(flags_for<A, S, P>(), {}, host_of(A::facts.device));
        const bool same = r.ok() && r.accelerator == A::facts && r.strategy == S::facts && r.precision == P::facts;
        INFO(A::facts.name.view() << " " << S::facts.name.view() << " " << P::facts.name.view() << ": "
                                  << name_of(r.code()));
        CHECK(compatible == same);
        CHECK(compatible == (first_refusal(combination_v<A, S, P>) == RuleId::none));
        ++(compatible ? legal : refused);
      });
    });
  });
  CHECK(legal + refused == 4 * 23 * 14);
  CHECK(legal > 200);
  CHECK(refused > 500);
}
