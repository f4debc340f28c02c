// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/record_function.h>

/// Counts the convolutions and matrix products of this thread while it lives, by the operators that carry them out.
class Kernels {
 public:
  Kernels() {
    counts().clear();
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(begin, end).scopes({at::RecordScope::FUNCTION}));
  }
  ~Kernels() { at::removeCallback(handle_); }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  /// "2 addmm, 3 mm"
  [[nodiscard]] std::string text() const {
    std::string all;
    for (const auto& [name, count] : counts()) all += (all.empty() ? "" : ", ") + std::to_string(count) + " " + name;
    return all;
  }

 private:
  static std::map<std::string, int>& counts() {
    thread_local std::map<std::string, int> counts;
    return counts;
  }
  /// For each operator that runs now, the innermost last: did it call another one that multiplies?
  static std::vector<bool>& running() {
    thread_local std::vector<bool> running;
    return running;
  }
  static bool multiplies(const std::string& name) {
    return name.find("convol") != std::string::npos || name.find("conv2d") != std::string::npos ||
           name.find("mm") != std::string::npos;
  }
  static std::string name_of(const at::RecordFunction& function) {
    const std::string name = function.name();
    return name.substr(0, 6) == "aten::" ? name.substr(6) : name;
  }
  static std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& function) {
    if (multiplies(name_of(function))) running().assign(running().size(), true);
    running().push_back(false);
    return nullptr;
  }
  static void end(const at::RecordFunction& function, at::ObserverContext* /*context*/) {
    const bool is_shell = running().back();
    running().pop_back();
    const std::string name = name_of(function);
    if (!is_shell && multiplies(name)) ++counts()[name];
  }

  at::CallbackHandle handle_;
};
