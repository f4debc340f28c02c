// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include <torch/nn/module.h>

#include "fabric/error.hpp"

// What class Fabric must know of fabric/module/deferred_init.hpp, which only programs include that use it.

namespace fabric {

/// How `init_module` makes a module.
struct InitOptions {
  /// The module has no memory until `setup`, which makes its values, on the device, sharded where the strategy shards.
  bool empty = false;
};

namespace detail {

template <class Make>
struct DeferredInitialisation;  // defined there
template <class Make>
inline constexpr bool has_deferred_init = requires {
  sizeof(DeferredInitialisation<Make>);
};

/// Materialises a module; null until something was deferred.
inline std::atomic<void (*)(torch::nn::Module& module, at::Device device)> materialise_deferred = nullptr;

/// Gives a module its memory that was made by `deferred_init`. Throws fabric::Error for other modules without memory.
inline void require_memory(torch::nn::Module& module, at::Device device) {
  const auto has_none = [](const at::Tensor& tensor) { return tensor.defined() && tensor.is_meta(); };
  const auto parameters = module.parameters();
  const auto buffers = module.buffers();
  if (std::none_of(parameters.begin(), parameters.end(), has_none) &&
      std::none_of(buffers.begin(), buffers.end(), has_none)) {
    return;
  }
  const auto materialise = materialise_deferred.load();
  if (materialise == nullptr) {
    throw Error("fabric: setup: " + module.name() +
                " has parameters or buffers on the meta device, and nothing is known of how they are made. Make it by "
                "`init_module(make, {.empty = true})`");
  }
  materialise(module, device);
}

}  // namespace detail
}  // namespace fabric
