// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/nn/module.h>

#include "fabric/error.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/options.hpp"

namespace fabric::detail {

/// The name of the module that has this parameter: "fc" of "fc.weight".
inline std::string module_name_of(const std::string& parameter) {
  const auto dot = parameter.rfind('.');
  return dot == std::string::npos ? std::string() : parameter.substr(0, dot);
}

/// The parameters of a module in the units that `units` says, in the order of their registration. Those of one unit are
/// all of one dtype, and all trained or all frozen. Throws fabric::Error if no module is what the predicate asks for.
[[nodiscard]] inline std::vector<NamedParameters> group_parameters(const torch::nn::Module& module,
                                                                   const Units& units) {
  // The innermost module that forms a unit, by the name of a module.
  std::unordered_map<std::string, std::string> unit_of;
  bool any = false;
  if (units.predicate()) {
    for (const auto& item : module.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
      const bool forms_one = units.predicate()(item.key(), *item.value());
      any = any || forms_one;
      const auto outer = unit_of.find(module_name_of(item.key()));
      unit_of[item.key()] = forms_one ? item.key() : outer == unit_of.end() ? "" : outer->second;
    }
    if (!any) {
      throw Error(
          "fabric: setup: no module forms a unit as the option `units` says: it names types or names that this module "
          "does not have. Use Units::by_size(elements), or one of its own");
    }
  }
  std::vector<NamedParameters> groups;
  struct Open {
    std::string unit;
    std::string module;
    bool trained;
    at::ScalarType dtype;
    std::size_t group;
    std::int64_t elements;
  };
  std::int64_t all = 0;
  for (const auto& [name, parameter] : parameters_of(module)) all += parameter.numel();
  const std::int64_t limit = units.elements_of(all);
  std::vector<Open> open;  // of one unit, as long as its parameters come one after another
  std::string current;
  for (const auto& [name, parameter] : parameters_of(module)) {
    const std::string owner = module_name_of(name);
    const auto found = unit_of.find(owner);
    const std::string unit = found == unit_of.end() ? "" : found->second;
    if (unit != current) {
      std::erase_if(open, [](const Open& each) { return each.unit.empty(); });
      current = unit;
    }
    Open* own = nullptr;
    for (Open& each : open) {
      if (each.unit == unit && each.trained == parameter.requires_grad() && each.dtype == parameter.scalar_type()) {
        own = &each;
      }
    }
    // A layer's parameters stay together.
    const bool is_full =
        own != nullptr && unit.empty() && own->module != owner && own->elements + parameter.numel() > limit;
    if (own == nullptr) {
      open.push_back({unit, owner, parameter.requires_grad(), parameter.scalar_type(), groups.size(), 0});
      own = &open.back();
      groups.emplace_back();
    } else if (is_full) {
      own->group = groups.size();
      own->elements = 0;
      groups.emplace_back();
    }
    own->module = owner;
    own->elements += parameter.numel();
    groups[own->group].emplace_back(name, parameter);
  }
  return groups;
}

}  // namespace fabric::detail
