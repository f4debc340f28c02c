// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <utility>

#include "fabric/connector/selection.hpp"

// Lightning Fabric's class names for this library's policies, which the rows are written in.

namespace oracle {

/// A class of the reference for each policy of the library; other names stand for themselves.
constexpr std::string_view class_of(std::string_view policy) {
  constexpr std::pair<std::string_view, std::string_view> classes[]{
      {"Cpu", "CPUAccelerator"},
      {"Cuda", "CUDAAccelerator"},
      {"Mps", "MPSAccelerator"},
      {"SingleDeviceXla", "SingleDeviceXLAStrategy"},
      {"SingleDevice", "SingleDeviceStrategy"},
      {"DataParallel", "DataParallelStrategy"},
      {"DeepSpeed", "DeepSpeedStrategy"},
      {"ModelParallel", "ModelParallelStrategy"},
      {"XlaDdp", "XLAStrategy"},
      {"XlaFsdp", "XLAFSDPStrategy"},
      {"Xla", "XLAAccelerator"},
      {"DdpFindUnusedParameters", "DDPStrategy"},
      {"DdpSpawnFindUnusedParameters", "DDPStrategy"},
      {"DdpForkFindUnusedParameters", "DDPStrategy"},
      {"DdpNotebookFindUnusedParameters", "DDPStrategy"},
      {"DdpSpawn", "DDPStrategy"},
      {"DdpFork", "DDPStrategy"},
      {"DdpNotebook", "DDPStrategy"},
      {"Ddp", "DDPStrategy"},
      {"FsdpCpuOffload", "FSDPStrategy"},
      {"Fsdp", "FSDPStrategy"},
  };
  for (const auto& [name, theirs] : classes) {
    if (policy == name) return theirs;
  }
  return policy;
}

constexpr std::string_view launcher_class(const fabric::Selection& s) {
  constexpr std::string_view names[]{"", "_SubprocessScriptLauncher", "_MultiProcessingLauncher", "_XLALauncher"};
  return names[static_cast<int>(s.launcher)];
}

constexpr std::string_view start_method_name(const fabric::Selection& s) {
  constexpr std::string_view names[]{"", "popen", "spawn", "fork", "forkserver"};
  return names[static_cast<int>(s.start_method)];
}

constexpr std::string_view precision_class(const fabric::Selection& s) {
  constexpr std::string_view names[]{"Precision",
                                     "DoublePrecision",
                                     "HalfPrecision",
                                     "MixedPrecision",
                                     "TransformerEnginePrecision",
                                     "BitsandbytesPrecision",
                                     "DeepSpeedPrecision",
                                     "FSDPPrecision",
                                     "XLAPrecision"};
  return s.precision.name.view().ends_with("Subclass") ? s.precision.name.view()
                                                       : names[static_cast<int>(s.precision_engine)];
}

/// Two classes report another precision than their own.
constexpr std::string_view precision_value(const fabric::Selection& s) {
  if (s.precision_engine == fabric::PrecisionEngine::transformer_engine) return "transformer-engine";
  if (s.precision_engine == fabric::PrecisionEngine::bitsandbytes) return "32-true";
  return s.precision.flag.view();
}

constexpr std::string_view environment_class(const fabric::Selection& s) {
  constexpr std::string_view names[]{"",
                                     "TorchElasticEnvironment",
                                     "SLURMEnvironment",
                                     "LSFEnvironment",
                                     "MPIEnvironment",
                                     "KubeflowEnvironment",
                                     "LightningEnvironment",
                                     "XLAEnvironment"};
  return s.environment.kind == fabric::EnvironmentKind::custom ? s.environment.name.view()
                                                               : names[static_cast<int>(s.environment.kind)];
}

}  // namespace oracle
