// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/nn/module.h>
#include <torch/types.h>

#include "fabric/comm/collectives.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"
#include "fabric/module/deferred_init.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/flat_unit.hpp"
#include "fabric/shard/tensor_slice.hpp"

namespace fabric::detail {

/// Throws fabric::Error if parameters are slices that the tensor group knows nothing of: those of other ranks would be
/// taken for the same.
inline void refuse_foreign_slices(const torch::nn::Module& module, const World& tensor) {
  for (const auto& [name, parameter] : parameters_of(module)) {
    if (tensor.size > 1 || !tensor_slice_of(parameter)) continue;
    throw Error("fabric: setup: the parameter " + name +
                " is a slice (parallelize_module), of which these ranks do not all have the same: give the plan to "
                "ModelParallel, by its option tensor_parallel");
  }
}

/// Gives the units the module's values, those of rank 0, as soon as all of one unit's are there: a module that was made
/// without memory gets them one by one, so that no more than a unit or two are whole at a time.
inline void fill_units(torch::nn::Module& module, const std::vector<std::unique_ptr<FlatUnit>>& units,
                       const World& world) {
  struct Place {
    FlatUnit* unit;
    std::size_t slot;
  };
  std::unordered_map<const c10::TensorImpl*, Place> places;
  std::unordered_map<const FlatUnit*, std::vector<at::Tensor>> values;
  const auto fill_if_complete = [&](FlatUnit& unit) {
    const auto& own = values.at(&unit);
    if (!std::all_of(own.begin(), own.end(), [](const at::Tensor& value) { return value.defined(); })) return;
    unit.fill(own, [&](const at::Tensor& exact) { broadcast_in_place(world.group, {exact}); });
    values.erase(&unit);
  };
  for (const auto& unit : units) {
    auto& own = values[unit.get()];
    for (const auto& slot : unit->slots()) {
      const at::Tensor& parameter = slot.shard.parameter;
      places.emplace(parameter.unsafeGetTensorImpl(), Place{unit.get(), own.size()});
      own.push_back(parameter.is_meta() ? at::Tensor() : parameter.detach());
    }
    fill_if_complete(*unit);
  }
  const Materialise options{.device = world.device};
  materialise(module, options, [&](const std::string& /*name*/, const at::Tensor& slot, const at::Tensor& real) {
    const auto place = places.find(slot.unsafeGetTensorImpl());
    if (place == places.end()) return become(slot, real);  // a buffer
    values.at(place->second.unit)[place->second.slot] = real;
    fill_if_complete(*place->second.unit);
  });
}

}  // namespace fabric::detail
