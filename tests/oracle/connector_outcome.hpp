// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "fabric/config.hpp"
#include "oracle/class_names.hpp"
#include "oracle/devices_row.hpp"
#include "oracle/row_host.hpp"

// Writes a Resolution as an outcome in the oracle's schema, whose class names are Lightning Fabric's.

namespace oracle {

/// Does the reference's message name nothing that the row could record?
inline bool nameless(fabric::Code code) {
  using fabric::Code;
  switch (code) {
    case Code::cpu_devices_not_positive_int:
    case Code::cpu_devices_odd_digit:
    case Code::gpus_none_available:
    case Code::gpu_ids_not_unique:
    case Code::gpu_devices_resolved_to_none:
    case Code::custom_devices_type:
    case Code::slurm_var_not_int:
    case Code::cli_flag_not_int: return true;
    default: return name_of(code).starts_with("lsf_") || name_of(code).starts_with("missing_");
  }
}

/// The names of a problem, in the reference's spelling.
inline Json names_of(const fabric::Problem& problem) {
  Json names = Json::array();
  if (nameless(problem.code)) return names;
  std::string text(problem.names.view());
  if (text.empty()) return names;
  for (std::size_t from = 0;;) {
    const auto end = text.find('\n', from);
    std::string name = text.substr(from, end - from);
    if (name.size() > 2 && name.front() == '<' && name.back() == '>') {
      name = "<" + std::string(class_of(std::string_view(name).substr(1, name.size() - 2))) + ">";
    }
    names.push_back(std::string(class_of(name)));
    if (end == std::string::npos) return names;
    from = end + 1;
  }
}

/// The Python exception that the reference raises for a code.
inline std::string error_type(fabric::Code code) {
  using fabric::Code;
  switch (code) {
    case Code::invalid_plugin_type:
    case Code::cpu_devices_not_positive_int:
    case Code::device_ids_type:
    case Code::gpu_devices_resolved_to_none:
    case Code::custom_devices_type:
    case Code::strategy_needs_device_arg:
    case Code::fsdp_precision_type:
    case Code::xla_precision_type:
    case Code::xla_fsdp_precision_type:
    case Code::xla_checkpoint_io_type:
    case Code::unexpected_kwarg: return "TypeError";
    case Code::no_gpu_backend:
    case Code::accelerator_unavailable:
    case Code::negative_device_index:
    case Code::slurm_ntasks_unsupported:
    case Code::bnb_needs_cuda:
    case Code::no_precision_set:
    case Code::bf16_autocast_unsupported:
    case Code::interactive_incompatible:
    case Code::xla_root_before_launch:
    case Code::mesh_before_launch: return "RuntimeError";
    case Code::missing_torch_xla:
    case Code::missing_bitsandbytes:
    case Code::missing_transformer_engine:
    case Code::missing_mpi4py: return "ModuleNotFoundError";
    case Code::missing_deepspeed: return "ImportError";
    case Code::gpus_none_available:
    case Code::gpu_ids_not_unique:
    case Code::gpu_not_on_machine: return "MisconfigurationException";
    case Code::lsf_rankfile_not_found: return "FileNotFoundError";
    case Code::lsf_rankfile_too_short:
    case Code::rank_out_of_devices: return "IndexError";
    case Code::lsf_host_not_in_rankfile:
    case Code::bnb_mode_unknown:
    case Code::env_var_missing: return "KeyError";
    case Code::checkpoint_io_not_supported:
    case Code::checkpoint_io_not_used:
    case Code::kubeflow_not_detectable:
    case Code::not_implemented: return "NotImplementedError";
    default: return "ValueError";
  }
}

inline Json error_of(fabric::Code code, std::string_view name = {}) {
  Json json{{"error", std::string(name_of(code))}};
  if (!name.empty()) json["names"] = Json::array({std::string(name)});
  return json;
}

inline Json rank_json(const fabric::Rank& rank) {
  if (rank.known()) return rank.value;
  return error_of(rank.code, rank.name);
}

inline std::string device_name(fabric::DeviceType type, int index) {
  constexpr const char* kinds[]{"cpu", "cuda", "mps", "xla"};
  if (type == fabric::DeviceType::cpu) return "cpu";
  return std::string(kinds[static_cast<int>(type)]) + ":" + std::to_string(index);
}

inline Json devices_json(const fabric::DeviceList& list) {
  if (list.count > 16 && list.type == fabric::DeviceType::cpu) return Json{{"repeat", "cpu"}, {"n", list.count}};
  Json json = Json::array();
  for (int i = 0; i < list.count; ++i) json.push_back(device_name(list.type, list[i]));
  return json;
}

inline Json devices_flag_json(const fabric::Selection& s, bool was_true) {
  const fabric::DeviceList& list = s.parsed_devices;
  if (was_true) return true;
  if (list.type == fabric::DeviceType::cpu || (list.type == fabric::DeviceType::xla && !list.listed)) return list.count;
  Json json = Json::array();
  for (int i = 0; i < list.count; ++i) json.push_back(list[i]);
  return json;
}

inline Json parameters_json(const fabric::Selection& s) {
  using fabric::Offload;
  using fabric::StrategyFamily;
  Json json = Json::object();
  const auto offload = [](Offload where) { return where == Offload::nvme ? "nvme" : "cpu"; };
  const auto size = [](int n) { return n == 0 ? Json("auto") : Json(n); };
  switch (s.strategy.family) {
    case StrategyFamily::ddp:
      if (s.strategy.find_unused_parameters) json["find_unused_parameters"] = true;
      if (s.options.static_graph) json["static_graph"] = true;
      if (s.options.bucket_cap_mb != 0) json["bucket_cap_mb"] = s.options.bucket_cap_mb;
      break;
    case StrategyFamily::deepspeed:
      json["stage"] = s.strategy.stage < 0 ? Json() : Json(s.strategy.stage);
      if (s.strategy.optimizer_offload != Offload::none)
        json["offload_optimizer"] = offload(s.strategy.optimizer_offload);
      if (s.strategy.parameter_offload != Offload::none) json["offload_param"] = offload(s.strategy.parameter_offload);
      if (s.strategy.parameter_offload == Offload::nvme) json["remote_device"] = "nvme";
      break;
    case StrategyFamily::fsdp:
      json["cpu_offload"] = s.strategy.parameter_offload != Offload::none;
      json["sharding_strategy"] = s.options.sharding == fabric::Sharding::none     ? "NO_SHARD"
                                  : s.options.sharding == fabric::Sharding::hybrid ? "HYBRID_SHARD"
                                                                                   : "FULL_SHARD";
      json["state_dict_type"] = s.options.full_state_dict ? "full" : "sharded";
      break;
    case StrategyFamily::model_parallel:
      json["data_parallel_size"] = size(s.options.data_parallel_size);
      json["tensor_parallel_size"] = size(s.options.tensor_parallel_size);
      break;
    default: break;
  }
  return json;
}

inline const char* scalar_name(fabric::Scalar scalar) {
  constexpr const char* names[]{"float16", "bfloat16", "float32", "float64"};
  return names[static_cast<int>(scalar)];
}

inline void write_precision(Json& out, const fabric::Selection& s, const fabric::Host& host) {
  using fabric::PrecisionEngine;
  out["precision"] = std::string(precision_class(s));
  const std::string value(precision_value(s));
  out["precision_value"] = value;
  const bool half = s.precision.kind == fabric::PrecisionKind::f16_mixed;
  if (s.precision_engine == PrecisionEngine::mixed) {
    constexpr const char* kinds[]{"cpu", "cuda", "mps", "xla"};
    out["precision_device"] = kinds[static_cast<int>(s.precision_device)];
    if (half) out["scaler"] = "GradScaler";
  }
  if (half && s.precision_engine == PrecisionEngine::fsdp) out["scaler"] = "ShardedGradScaler";
  fabric::PrecisionObject object{s.precision, s.precision_engine};
  object.device = s.precision_device;
  if (fabric::detail::scaler_is_idle(object, host)) out["scaler_enabled"] = false;
  if (s.precision_engine == PrecisionEngine::transformer_engine)
    out["weights_dtype"] = scalar_name(s.precision.parameters);
  if (s.precision_engine == PrecisionEngine::bitsandbytes) out["dtype"] = scalar_name(s.precision.compute);
  std::string input(s.precision_flag.view());
  if (s.sources.precision == fabric::Source::fallback) input = value;
  if (input != value) out["precision_input"] = input;
}

inline void write_notes(Json& out, const fabric::Selection& s, const fabric::Variables& variables) {
  Json warnings = Json::array(), infos = Json::array();
  for (const fabric::Note note : s.notes) {
    (is_warning(note) ? warnings : infos).push_back(std::string(name_of(note)));
  }
  if (fabric::rank_for_messages(variables) != 0) return;
  if (!warnings.empty()) out["warnings"] = warnings;
  if (!infos.empty()) out["infos"] = infos;
}

inline void write_ranks(Json& out, const fabric::Selection& s) {
  using fabric::StrategyFamily;
  const bool xla_parallel = s.strategy.family == StrategyFamily::xla || s.strategy.family == StrategyFamily::xla_fsdp;
  const bool single =
      s.strategy.family == StrategyFamily::single_device || s.strategy.family == StrategyFamily::single_device_xla;
  const bool ranked = is_parallel(s.strategy);
  if (xla_parallel) {
    out["root_device"] = error_of(fabric::Code::xla_root_before_launch);
  } else if (single) {
    out["root_device"] = device_name(s.single_device.type, s.single_device.index);
  } else if (s.strategy.family == StrategyFamily::data_parallel) {
    out["root_device"] = s.devices.count > 0 ? Json(device_name(s.devices.type, s.devices[0])) : Json();
  } else if (!s.local_rank.known()) {
    out["root_device"] = rank_json(s.local_rank);
  } else if (s.local_rank.value >= s.devices.count) {
    out["root_device"] = error_of(fabric::Code::rank_out_of_devices);
  } else {
    out["root_device"] = device_name(s.devices.type, s.devices[s.local_rank.value]);
  }
  out["num_nodes"] = s.num_nodes;
  if (ranked && s.strategy.family != StrategyFamily::data_parallel) out["num_processes"] = s.devices.count;
  out["world_size"] = rank_json(s.world_size);
  out["global_rank"] = rank_json(s.global_rank);
  out["local_rank"] = rank_json(s.local_rank);
  if (ranked) out["node_rank"] = rank_json(s.node_rank);
  if (!s.global_rank.known()) out["is_global_zero"] = rank_json(s.global_rank);

  if (s.strategy.family == StrategyFamily::data_parallel) {
    out["sampler"] = Json();
  } else if (s.strategy.family == StrategyFamily::model_parallel) {
    out["sampler"] = error_of(fabric::Code::mesh_before_launch);
  } else if (ranked && !s.sampler_replicas.known()) {
    out["sampler"] = rank_json(s.sampler_replicas);
  } else if (ranked && !xla_parallel && (!s.world_size.known() || s.sampler_replicas.value != s.world_size.value)) {
    out["sampler"] = Json{{"num_replicas", s.sampler_replicas.value}, {"rank", rank_json(s.global_rank)}};
  }
  if (ranked && !xla_parallel && s.strategy.family != StrategyFamily::data_parallel) {
    if (out["root_device"].is_object()) {
      out["backend"] = out["root_device"];
    } else if (out["root_device"] != "cpu" &&
               (s.devices.type != fabric::DeviceType::cuda || s.options.backend == "gloo")) {
      out["backend"] = "gloo";
    }
  }
  if (s.settings.code != fabric::Code::none) {
    Json check{{"error", std::string(name_of(s.settings.code))}};
    if (Json names = names_of(s.settings); !names.empty()) check["names"] = names;
    out["settings_check"] = check;
    out["settings_checked_at_launch"] = s.launcher == fabric::Launcher::subprocess;
  }
}

/// The variables that the reference has set by the time it stops, or is done.
inline void write_variables_set(Json& out, const fabric::Resolution& r, const fabric::Flags& flags,
                                const fabric::Host& host, const fabric::Variables& variables) {
  using fabric::EnvironmentKind;
  using fabric::PrecisionEngine;
  using fabric::PrecisionKind;
  if (!r.ok() && r.stage == fabric::Stage::user) return;
  Json set = Json::object();
  bool lsf = false;
  const auto constructed = [&](EnvironmentKind kind) { lsf |= kind == EnvironmentKind::lsf; };
  const auto computed = [&](PrecisionEngine engine, PrecisionKind kind) {
    if (engine != PrecisionEngine::xla) return;
    if (kind == PrecisionKind::bf16) set["XLA_USE_BF16"] = "1";
    if (kind == PrecisionKind::f16) set["XLA_USE_F16"] = "1";
  };
  bool environment_given = false;
  if (flags.strategy.is_object) {
    const fabric::StrategyObject& object = flags.strategy.object;
    constructed(object.environment.facts.kind);
    environment_given |= object.environment.given();
    if (object.has_precision) computed(object.precision.engine, object.precision.facts.kind);
  }
  for (const fabric::Plugin& plugin : flags.plugins) {
    if (plugin.kind == fabric::Plugin::Kind::environment) {
      constructed(plugin.environment.facts.kind);
      environment_given = true;
    }
    if (plugin.kind == fabric::Plugin::Kind::precision) computed(plugin.precision.engine, plugin.precision.facts.kind);
  }
  if (!environment_given && (r.ok() || r.stage > fabric::Stage::cluster_env)) {
    constructed(fabric::detect_environment(variables, host));
  }
  if (r.ok() || r.stage > fabric::Stage::precision) computed(r.precision_engine, r.precision.kind);
  if (lsf) {
    if (const auto made = fabric::construct_environment(EnvironmentKind::lsf, variables, host)) {
      set["MASTER_ADDR"] = std::string(made->main_address()->view());
      set["MASTER_PORT"] = std::to_string(*made->main_port());
    }
  }
  if (!set.empty()) out["env_set"] = set;
}

inline Json outcome_of(const fabric::Resolution& r, const fabric::Flags& flags, const fabric::Host& host,
                       const fabric::Variables& variables, const Json& devices) {
  using fabric::StrategyFamily;
  Json out = Json::object();
  out["ok"] = r.ok();
  if (!r.ok()) {
    const fabric::Problem& problem = r.problems.front();
    out["error_type"] = error_type(problem.code);
    out["code"] = std::string(name_of(problem.code));
    if (Json names = names_of(problem); !names.empty()) out["names"] = names;
    if (devices.is_object() && problem.code == fabric::Code::tpu_devices_invalid) {  // the reference shows a tuple
      const std::string list = out["names"][1];
      out["names"][1] = as_tuple(list);
    }
    out["stage"] = std::string(name_of(r.stage));
    write_notes(out, r, variables);
    write_variables_set(out, r, flags, host, variables);
    return out;
  }
  const auto text_or_null = [](std::string_view text) { return text.empty() ? Json() : Json(std::string(text)); };
  out["accelerator"] = std::string(class_of(r.accelerator.name));
  out["strategy"] = std::string(class_of(r.strategy.name));
  out["strategy_flag"] = text_or_null(r.strategy_flag);
  out["accelerator_flag"] = text_or_null(r.accelerator_flag);
  out["launcher"] = text_or_null(launcher_class(r));
  if (r.launcher != fabric::Launcher::none) out["start_method"] = std::string(start_method_name(r));
  write_precision(out, r, host);
  out["environment"] = std::string(environment_class(r));
  if (r.external_launch) out["external_launch"] = true;
  out["devices"] = devices_json(r.devices);
  out["devices_flag"] = devices_flag_json(r, devices == true);
  write_ranks(out, r);
  if (r.checkpoint == fabric::CheckpointKind::torch) out["checkpoint_io"] = "TorchCheckpointIO";
  if (r.checkpoint == fabric::CheckpointKind::xla) out["checkpoint_io"] = "XLACheckpointIO";
  const bool none_used =
      r.strategy.family == StrategyFamily::fsdp || r.strategy.family == StrategyFamily::model_parallel;
  if (none_used) {
    out["strategy_checkpoint_io"] = error_of(fabric::Code::checkpoint_io_not_used);
  } else if (is_xla(r.strategy) || r.checkpoint == fabric::CheckpointKind::xla) {
    out["strategy_checkpoint_io"] = "XLACheckpointIO";
  }
  if (Json parameters = parameters_json(r); !parameters.empty()) out["params"] = parameters;
  write_notes(out, r, variables);
  write_variables_set(out, r, flags, host, variables);
  return out;
}

}  // namespace oracle
