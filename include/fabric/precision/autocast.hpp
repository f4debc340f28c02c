// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/types.h>

namespace fabric {

/// While alive, operators on `device` run in `dtype` where that is safe. May be nested; the outermost guard drops the
/// cache of cast weights. That cache does not know dtypes, nor in LibTorch 2.9 whether gradients are recorded: so a
/// nested guard empties it when it changes the dtype, and turns it off where weights would be cast without a history.
class AutocastGuard {
 public:
  AutocastGuard(at::DeviceType device, at::ScalarType dtype)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)),
        previous_dtype_(at::autocast::get_autocast_dtype(device)),
        used_cache_(at::autocast::is_autocast_cache_enabled()),
        changes_dtype_(was_enabled_ && previous_dtype_ != dtype) {
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::set_autocast_dtype(device_, dtype);
    const bool nested = at::autocast::increment_nesting() > 1;
    if (nested && !at::GradMode::is_enabled()) at::autocast::set_autocast_cache_enabled(false);
    if (changes_dtype_) at::autocast::clear_cache();
  }
  ~AutocastGuard() {
    if (at::autocast::decrement_nesting() == 0 || changes_dtype_) at::autocast::clear_cache();
    at::autocast::set_autocast_cache_enabled(used_cache_);
    at::autocast::set_autocast_enabled(device_, was_enabled_);
    at::autocast::set_autocast_dtype(device_, previous_dtype_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  at::DeviceType device_;
  bool was_enabled_;
  at::ScalarType previous_dtype_;
  bool used_cache_;
  bool changes_dtype_;
};

/// While alive, new floating-point tensors are of `dtype` unless they say otherwise.
class DefaultDtypeGuard {
 public:
  explicit DefaultDtypeGuard(at::ScalarType dtype) : previous_(c10::get_default_dtype()) {
    c10::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
  }
  ~DefaultDtypeGuard() { c10::set_default_dtype(previous_); }
  DefaultDtypeGuard(const DefaultDtypeGuard&) = delete;
  DefaultDtypeGuard& operator=(const DefaultDtypeGuard&) = delete;

 private:
  caffe2::TypeMeta previous_;
};

}  // namespace fabric
