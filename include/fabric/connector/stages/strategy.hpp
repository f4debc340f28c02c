// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/connector/stages/objects.hpp"
#include "fabric/connector/stages/state.hpp"

namespace fabric::detail {

/// What `auto` means as a strategy: one process for one device; on several, or on several nodes, one each.
constexpr void choose_strategy(State& state) {
  Selection& out = state.out;
  const DeviceType device = out.accelerator.device;
  state.strategy = {};
  if (device == DeviceType::xla && out.accelerator.built_in) {
    if (out.devices.count > 1) {
      state.strategy = XlaDdp::facts.flag;
      out.strategy = XlaDdp::facts;
    } else {
      out.strategy = SingleDeviceXla::facts;
      out.single_device = {DeviceType::xla, out.devices[0]};
    }
  } else if (out.num_nodes == 1 && out.devices.count <= 1) {
    out.strategy = SingleDevice::facts;
    const bool gpu = device == DeviceType::cuda || device == DeviceType::mps;
    out.single_device = gpu ? Device{device, out.devices[0]} : Device{};
  } else {
    const bool notebook = out.num_nodes == 1 && state.host.interactive;
    out.strategy = notebook ? DdpFork::facts : Ddp::facts;
    state.strategy = notebook ? DdpFork::facts.flag : Ddp::facts.flag;
  }
}

/// Stage choose_strategy and fallback: some texts mean another strategy here, some are refused.
constexpr void settle_strategy(State& state) {
  Selection& out = state.out;
  if (!state.strategy_object && state.strategy == "auto") choose_strategy(state);
  if (state.strategy == "fsdp" && state.accelerator == "tpu") {
    state.strategy = XlaFsdp::facts.flag;
    out.strategy = XlaFsdp::facts;
    out.sources.strategy = Source::fallback;
  }
  if (state.strategy == "dp" && out.accelerator.device == DeviceType::cpu) {
    state.strategy = Ddp::facts.flag;
    out.strategy = Ddp::facts;
    out.sources.strategy = Source::fallback;
    state.note(Note::dp_on_cpu_to_ddp);
  }
  if (!state.strategy_object && out.strategy.family == StrategyFamily::ddp &&
      out.strategy.start_method == StartMethod::fork && !state.host.fork) {
    state.refuse(Problem(Code::fork_unsupported, "strategy", state.strategy));
  }
  if (state.refused_by(RuleId::fsdp_needs_gpus)) state.refuse(Problem(Code::fsdp_needs_gpu, "strategy"));
}

/// Stage init_strategy: its engine must be here.
constexpr void init_strategy(State& state) {
  Selection& out = state.out;
  out.strategy_flag = state.strategy;
  if (state.strategy_object) {
    if (state.strategy_object->has_devices) out.single_device = state.strategy_object->device;
  } else {
    if (const Code code = missing_engine(out.strategy, state.host); code != Code::none) {
      return state.refuse(Problem(code, "strategy"));
    }
    const bool single = runs_on_one_device(out.strategy);
    if (single && !state.strategy.empty()) {
      if (out.sources.devices == Source::automatic) {
        out.devices = {.type = out.devices.type, .count = 1};
      } else if (out.devices.count != 1) {
        Problem problem(Code::strategy_needs_one_device, "devices", shown(*state.devices));
        problem.name(state.strategy);
        return state.refuse(problem);
      }
      if (state.strategy == "single_tpu") state.note(Note::single_tpu_deprecated);
    }
    if (single)
      out.single_device = {out.accelerator.device, out.accelerator.device == DeviceType::cpu ? 0 : out.devices[0]};
  }
}

}  // namespace fabric::detail
