// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/devices.hpp"
#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

constexpr bool is_available(const AcceleratorFacts& accelerator, const Host& host) {
  if (!accelerator.available) return false;
  switch (accelerator.device) {
    case DeviceType::cuda: return host.cuda_devices > 0;
    case DeviceType::mps: return host.mps;
    case DeviceType::xla: return host.xla_engine && host.tpu_devices > 0;
    case DeviceType::cpu: break;
  }
  return true;
}

/// Stage choose_accelerator: what `auto` and `gpu` mean here.
constexpr void choose_accelerator(State& state) {
  Selection& out = state.out;
  if (state.accelerator_object) {
    out.accelerator = *state.accelerator_object;
    return;
  }
  const bool automatic = state.accelerator == "auto";
  if (automatic && is_available(Xla::facts, state.host)) {
    state.accelerator = Xla::facts.flag;
  } else if (automatic || state.accelerator == "gpu") {
    if (state.host.mps) {
      state.accelerator = Mps::facts.flag;
    } else if (state.host.cuda_devices > 0) {
      state.accelerator = Cuda::facts.flag;
    } else if (automatic) {
      state.accelerator = Cpu::facts.flag;
    } else {
      return state.refuse(Problem(Code::no_gpu_backend, "accelerator"));
    }
  }
  out.accelerator_flag = state.accelerator;
  out.accelerator = state.registry.accelerator(state.accelerator);
}

/// The devices of an accelerator that counts its own: a number, or digits.
constexpr Expected<DeviceList> parse_own_devices(const DevicesFlag& flag, const AcceleratorFacts& accelerator) {
  DeviceList list{.type = accelerator.device, .count = accelerator.own_devices};
  if (flag.automatic()) return list;
  const Integer digits = flag.form == DevicesFlag::Form::text ? parse_integer(flag.text) : Integer{};
  bool only_digits = digits.valid;
  for (const char c : flag.text.view()) only_digits &= c >= '0' && c <= '9';
  if (flag.form != DevicesFlag::Form::integer && !only_digits) {
    Problem problem(Code::custom_devices_type, "devices");
    problem.detail.append("a number of devices");
    return problem;
  }
  list.count = flag.form == DevicesFlag::Form::integer ? flag.number : to_int(digits.value);
  return list;
}

/// Stage init_accelerator: is it here, and which devices does the flag mean?
constexpr void init_accelerator(State& state) {
  Selection& out = state.out;
  const Host& host = state.host;
  if (!state.accelerator_object && out.accelerator.device == DeviceType::xla && !host.xla_engine) {
    return state.refuse(Problem(Code::missing_torch_xla, "accelerator"));
  }
  if (!is_available(out.accelerator, host)) {
    return state.refuse(Problem(Code::accelerator_unavailable, "accelerator", out.accelerator.name));
  }
  const bool automatic = state.devices->automatic();
  if (automatic && host.interactive && out.accelerator.device == DeviceType::cuda && host.cuda_devices > 1) {
    out.parsed_devices = {.type = DeviceType::cuda, .count = 1};
    state.note(Note::interactive_one_gpu);
  } else {
    const auto parsed = out.accelerator.own_devices > 0
                            ? parse_own_devices(*state.devices, out.accelerator)
                            : parse_devices(*state.devices, out.accelerator.device, host, state.variables);
    if (!parsed) return state.refuse(parsed.problem);
    out.parsed_devices = *parsed;
  }
  if (state.strategy_object && state.strategy_object->devices.count > 0) {
    out.devices = state.strategy_object->devices;
    out.sources.devices = Source::strategy;
  } else {
    out.devices = out.parsed_devices;
  }
}

}  // namespace fabric::detail
