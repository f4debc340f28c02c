// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/types.h>

#include "fabric/module/activation_checkpointing.hpp"
#include "fabric/precision/autocast.hpp"

namespace fabric::detail {

/// What a computation depends on beside its operands: random numbers, autocast, the default dtype, and what else is
/// switched on by dispatch keys of this thread.
class Surroundings {
  struct Device {
    at::Device device;
    at::Tensor generator_state;              // undefined where there is none
    std::optional<at::ScalarType> autocast;  // its dtype, where it is on
  };

 public:
  /// As they are now. `devices` are those whose random numbers and autocast matter; the CPU's always do.
  explicit Surroundings(const std::vector<at::Device>& devices)
      : keys_(c10::impl::tls_local_dispatch_key_set()),
        dtype_(c10::typeMetaToScalarType(c10::get_default_dtype())),
        caches_casts_(at::autocast::is_autocast_cache_enabled()),
        checkpointing_(activation_checkpointing()) {
    add(at::Device(at::kCPU));
    for (const at::Device& device : devices) add(device);
  }

  /// While alive, they are those, and gradients are recorded.
  class Restored {
   public:
    explicit Restored(const Surroundings& then)
        : keys_(then.keys_), dtype_(then.dtype_), checkpointing_(then.checkpointing_) {
      for (const Device& device : then.devices_) {
        if (device.generator_state.defined()) generators_.emplace_back(device);
        if (device.autocast) autocasts_.emplace_back(device.device.type(), *device.autocast);
      }
      at::autocast::set_autocast_cache_enabled(then.caches_casts_);
      ++recomputations();
    }
    ~Restored() {
      --recomputations();
      at::autocast::set_autocast_cache_enabled(caches_casts_);
    }
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;

   private:
    class Generator {
     public:
      explicit Generator(const Device& device)
          : generator_(generator_of(device.device)), state_(exchange(generator_, device.generator_state)) {}
      ~Generator() { exchange(generator_, state_); }
      Generator(const Generator&) = delete;
      Generator& operator=(const Generator&) = delete;

     private:
      at::Generator generator_;
      at::Tensor state_;
    };

    bool caches_casts_ = at::autocast::is_autocast_cache_enabled();
    c10::impl::ForceDispatchKeyGuard keys_;
    at::AutoGradMode gradients_{true};
    DefaultDtypeGuard dtype_;
    ActivationCheckpointingGuard checkpointing_;
    std::list<Generator> generators_;
    std::list<AutocastGuard> autocasts_;
  };

 private:
  void add(at::Device device) {
    const bool is_known =
        std::any_of(devices_.begin(), devices_.end(), [&](const Device& d) { return d.device == device; });
    if (is_known || !(device.is_cpu() || device.is_cuda() || device.is_mps())) return;
    at::Generator generator = generator_of(device);
    const std::scoped_lock lock(generator.mutex());
    devices_.push_back({device, generator.get_state(),
                        at::autocast::is_autocast_enabled(device.type())
                            ? std::optional(at::autocast::get_autocast_dtype(device.type()))
                            : std::nullopt});
  }
  static at::Generator generator_of(at::Device device) { return at::globalContext().defaultGenerator(device); }
  static at::Tensor exchange(at::Generator& generator, const at::Tensor& state) {
    const std::scoped_lock lock(generator.mutex());
    at::Tensor before = generator.get_state();
    generator.set_state(state);
    return before;
  }

  c10::impl::LocalDispatchKeySet keys_;
  at::ScalarType dtype_;
  bool caches_casts_;
  ActivationCheckpointing checkpointing_;
  std::vector<Device> devices_;
};

}  // namespace fabric::detail
