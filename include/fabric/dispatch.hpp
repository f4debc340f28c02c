// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <boost/hana/for_each.hpp>
#include <boost/hana/front.hpp>
#include <boost/hana/type.hpp>
#include <boost/hana/unpack.hpp>

#include "fabric/callback.hpp"
#include "fabric/connector/flags.hpp"
#include "fabric/connector/resolve_here.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/processes.hpp"
#include "fabric/loggers/logger.hpp"
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

/// `resolve_here` for a program that has only a menu: where the accelerator is left open, kinds of devices that are not
/// on the menu are not looked at, so that a program built for Cpu runs on a machine with GPUs without a flag.
template <class Menu>
[[nodiscard]] Selection resolve_for(const Flags& flags, const Registry& registry = built_in_registry) {
  return resolve_here(flags, registry, [&](Host& host) {
    if (flags.accelerator.is_object || flags.accelerator.text != "auto") return;
    const auto on_menu = [](DeviceType type) {
      bool found = false;
      boost::hana::for_each(Menu::entries, [&](auto entry) {
        found = found || PoliciesOf<typename decltype(entry)::type>::combination.accelerator.device == type;
      });
      return found;
    };
    if (!on_menu(DeviceType::cuda)) host.cuda_devices = 0;
    if (!on_menu(DeviceType::mps)) host.mps = false;
    if (!on_menu(DeviceType::xla)) host.tpu_devices = 0;
  });
}

/// Calls `visit(boost::hana::type<Fabric<...>>)` for the menu's entry that is selected and returns what it returns,
/// which is the same type for all entries. Throws fabric::Error that lists the menu when the selection is not on it.
template <class Menu, class Visit>
decltype(auto) visit_selected(const Selection& selection, Visit&& visit) {
  using First = std::remove_cvref_t<decltype(boost::hana::front(Menu::entries))>;
  using Result = std::invoke_result_t<Visit&, First>;
  return boost::hana::unpack(Menu::entries, [&](auto... entries) -> Result {
    static_assert((std::is_same_v<Result, std::invoke_result_t<Visit&, decltype(entries)>> && ...),
                  "fabric: the function that is dispatched returns the same type for each entry of the menu");
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

/// Calls `run(fabric)` with a `Fabric` of the menu's entry that is selected, and returns what it returns. Before that,
/// `adjust(options)` may change the entry's `Options`: a generic lambda that looks at what they have, such as
/// `if constexpr (requires { options.strategy.units; }) options.strategy.units = Units::by_type<Block>();`. An
/// exception that leaves `run` ends the job on all ranks.
template <class Menu, class Run, class Adjust>
requires(!std::is_convertible_v<Adjust, std::vector<std::shared_ptr<Logger>>>) decltype(auto)
    dispatch(const Selection& selection, Run&& run, Adjust&& adjust) {
  return visit_selected<Menu>(selection, [&](auto entry) -> decltype(auto) {
    using F = typename decltype(entry)::type;
    typename F::Options options;
    adjust(options);
    F fabric(selection, std::move(options));
    return detail::telling_failures([&]() -> decltype(auto) { return run(fabric); });
  });
}
/// The same with these loggers and callbacks.
template <class Menu, class Run>
decltype(auto) dispatch(const Selection& selection, Run&& run, const std::vector<std::shared_ptr<Logger>>& loggers = {},
                        const std::vector<std::shared_ptr<Callback>>& callbacks = {}) {
  return dispatch<Menu>(selection, std::forward<Run>(run), [&](auto& options) {
    options.loggers = loggers;
    options.callbacks = callbacks;
  });
}

/// Resolves flags and `LT_*` variables on this machine, then dispatches. Throws fabric::Error that names every problem.
template <class Menu, class Run>
decltype(auto) dispatch(const Flags& flags, Run&& run, const std::vector<std::shared_ptr<Logger>>& loggers = {},
                        const std::vector<std::shared_ptr<Callback>>& callbacks = {}) {
  return dispatch<Menu>(resolve_for<Menu>(flags), std::forward<Run>(run), loggers, callbacks);
}
template <class Menu, class Run, class Adjust>
requires(!std::is_convertible_v<Adjust, std::vector<std::shared_ptr<Logger>>>) decltype(auto)
    dispatch(const Flags& flags, Run&& run, Adjust&& adjust) {
  return dispatch<Menu>(resolve_for<Menu>(flags), std::forward<Run>(run), std::forward<Adjust>(adjust));
}

/// Adds `--accelerator`, `--strategy`, `--devices`, `--num-nodes`, `--precision`, `--environment` and `--log-dir` to a
/// command line parser with CLI11's `add_option_function`, which fill `flags` while it parses.
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
  app.template add_option_function<std::string>(
      "--environment",
      [&flags](Value value) {
        flags.environment = std::string_view(value);
        if (flags.environment.truncated)
          throw Error("fabric: --environment: '" + value + "' is no list of environments");
      },
      "torchelastic, slurm, lsf, mpi, kubeflow or local; -slurm turns one off; by default it is detected");
  app.template add_option_function<std::string>(
      "--log-dir", [](Value value) { setenv("FABRIC_LOG_DIR", value.c_str(), 1); },
      "a folder in which each rank writes what it prints to a file of its own");
}

}  // namespace fabric
