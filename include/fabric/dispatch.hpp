// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include <boost/hana/for_each.hpp>
#include <boost/hana/front.hpp>
#include <boost/hana/type.hpp>
#include <boost/hana/unpack.hpp>

#include "fabric/connector/flags.hpp"
#include "fabric/connector/resolve_here.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"
#include "fabric/policy/menu.hpp"

namespace fabric {

namespace detail {

/// The names of all entries of a menu.
template <class Menu>
std::string names_of_menu() {
  std::string names;
  boost::hana::for_each(Menu::entries, [&](auto entry) {
    names.append(names.empty() ? "" : ", ").append(name_of(PoliciesOf<typename decltype(entry)::type>::combination));
  });
  return names;
}

}  // namespace detail

/// Calls `visit(boost::hana::type<Fabric<...>>)` for the menu's entry that is selected and returns what it returns, which
/// is the same type for all entries. Throws fabric::Error that lists the menu when the selection is not on it.
template <class Menu, class Visit>
decltype(auto) visit_selected(const Selection& selection, Visit&& visit) {
  using First = std::remove_cvref_t<decltype(boost::hana::front(Menu::entries))>;
  using Result = std::invoke_result_t<Visit&, First>;
  return boost::hana::unpack(Menu::entries, [&](auto... entries) -> Result {
    struct Row {
      Combination combination;
      Result (*run)(Visit&);
    };
    const Row table[] = {{PoliciesOf<typename decltype(entries)::type>::combination,
                          [](Visit& function) -> Result { return function(decltype(entries){}); }}...};
    for (const Row& row : table) {
      if (selects(selection, row.combination)) return row.run(visit);
    }
    throw Error("fabric: this program was not built for " +
                name_of({selection.accelerator, selection.strategy, selection.precision}) +
                ". It was built for: " + detail::names_of_menu<Menu>());
  });
}

/// Calls `run(fabric)` with a `Fabric` of the menu's entry that is selected, and returns what it returns.
template <class Menu, class Run>
decltype(auto) dispatch(const Selection& selection, Run&& run) {
  return visit_selected<Menu>(selection, [&](auto entry) -> decltype(auto) {
    typename decltype(entry)::type fabric(selection);
    return run(fabric);
  });
}

/// Resolves flags and `LT_*` variables on this machine, then dispatches. Throws fabric::Error that names every problem.
template <class Menu, class Run>
decltype(auto) dispatch(const Flags& flags, Run&& run) {
  return dispatch<Menu>(resolve_here(flags), std::forward<Run>(run));
}

/// Adds `--accelerator`, `--strategy`, `--devices`, `--num-nodes` and `--precision` to a command line parser with CLI11's
/// `add_option_function`, which fill `flags` while it parses.
template <class App>
void add_flags(App& app, Flags& flags) {
  using Value = const std::string&;
  app.template add_option_function<std::string>(
      "--accelerator", [&flags](Value value) { flags.accelerator = std::string_view(value); },
      "cpu, gpu, cuda, mps, tpu or auto (default)");
  app.template add_option_function<std::string>(
      "--strategy", [&flags](Value value) { flags.strategy = std::string_view(value); },
      "ddp, fsdp, deepspeed, ... or auto (default)");
  app.template add_option_function<std::string>(
      "--devices", [&flags](Value value) { flags.devices = std::string_view(value); },
      "a count, indices such as 0,2, -1 for all, or auto (default)");
  app.template add_option_function<std::string>(
      "--num-nodes", [&flags](Value value) { flags.num_nodes = std::string_view(value); }, "how many hosts take part");
  app.template add_option_function<std::string>(
      "--precision", [&flags](Value value) { flags.precision = std::string_view(value); },
      "32-true (default), 64-true, bf16-true, bf16-mixed, ...");
}

}  // namespace fabric
