// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fabric::detail {

/// While alive, the gradients of a module stay local. `Module` says so in `sync_gradients`.
template <class Module>
class SyncGuard {
 public:
  SyncGuard(Module& module, bool enabled) : module_(module), before_(module.sync_gradients) {
    if (enabled) module_.sync_gradients = false;
  }
  ~SyncGuard() { module_.sync_gradients = before_; }
  SyncGuard(const SyncGuard&) = delete;
  SyncGuard& operator=(const SyncGuard&) = delete;

 private:
  Module& module_;
  bool before_;
};

}  // namespace fabric::detail
