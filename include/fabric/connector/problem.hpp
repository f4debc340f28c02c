// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fabric/policy/text.hpp"

namespace fabric {

/// What can be wrong with a set of flags, variables and host facts. `name_of` spells a code as it is spelled here;
/// `fabric/connector/message.hpp` makes a sentence of a problem.
enum class Code : std::uint8_t {
  none,
  cli_conflict,
  cli_flag_not_int,
  num_nodes_not_int,
  invalid_strategy_name,
  invalid_accelerator_name,
  mps_parallel_strategy,
  invalid_precision,
  invalid_plugin_type,
  duplicate_plugins,
  precision_flag_and_plugin,
  accelerator_flag_and_strategy,
  precision_plugin_and_strategy,
  checkpoint_io_plugin_and_strategy,
  cluster_env_plugin_and_strategy,
  cpu_devices_vs_accelerator,
  cuda_devices_vs_accelerator,
  invalid_num_nodes,
  zero_devices,
  no_gpu_backend,
  missing_torch_xla,
  accelerator_unavailable,
  cpu_devices_not_positive_int,
  device_ids_type,
  gpus_none_available,
  gpu_ids_not_unique,
  gpu_not_on_machine,
  devices_text_not_int,
  gpu_devices_resolved_to_none,
  cpu_devices_odd_digit,
  custom_devices_type,
  negative_device_index,
  tpu_devices_invalid,
  tpu_devices_text_invalid,
  slurm_ntasks_unsupported,
  lsf_rankfile_var_missing,
  lsf_rankfile_var_empty,
  lsf_rankfile_not_found,
  lsf_rankfile_too_short,
  lsf_host_not_in_rankfile,
  lsf_jobid_missing,
  lsf_port_not_int,
  slurm_var_not_int,
  fork_unsupported,
  fsdp_needs_gpu,
  missing_deepspeed,
  strategy_needs_device_arg,
  bnb_needs_cuda,
  missing_bitsandbytes,
  missing_transformer_engine,
  missing_mpi4py,
  xla_precision_unsupported,
  deepspeed_precision_unsupported,
  fsdp_precision_unsupported,
  model_parallel_precision_unsupported,
  no_precision_set,
  amp_precision_unsupported,
  amp_bf16_scaler,
  fsdp_scaler_refused,
  bnb_int8_dtype,
  bf16_autocast_unsupported,
  bnb_mode_unknown,
  fsdp_precision_type,
  xla_precision_type,
  xla_fsdp_precision_type,
  xla_checkpoint_io_type,
  checkpoint_io_not_supported,
  checkpoint_io_not_used,
  env_var_missing,
  env_var_not_int,
  lsf_world_size_missing,
  lsf_global_rank_missing,
  lsf_local_rank_missing,
  mpi_host_unknown,
  start_method_unavailable,
  interactive_incompatible,
  xla_needs_xla_strategy,
  torchelastic_world_size_mismatch,
  slurm_devices_mismatch,
  slurm_num_nodes_mismatch,
  kubeflow_not_detectable,
  xla_root_before_launch,
  mesh_before_launch,
  rank_out_of_devices,
  not_implemented,
  unexpected_kwarg,
  // Refused here, accepted by Lightning Fabric (docs/differences.md).
  xla_strategy_needs_xla,
  data_parallel_needs_gpus,
  strategy_needs_one_device,
  mps_has_no_64_bit_floats,
  mps_has_no_fp8,
  engine_not_built,
  mig_several,
  environment_half_set,
  hostlist_invalid,
  unknown_environment,
  invalid_devices,
  too_many_devices,
};

namespace detail {
inline constexpr std::array<std::string_view, static_cast<std::size_t>(Code::too_many_devices) + 1> code_names{
    "none",
    "cli_conflict",
    "cli_flag_not_int",
    "num_nodes_not_int",
    "invalid_strategy_name",
    "invalid_accelerator_name",
    "mps_parallel_strategy",
    "invalid_precision",
    "invalid_plugin_type",
    "duplicate_plugins",
    "precision_flag_and_plugin",
    "accelerator_flag_and_strategy",
    "precision_plugin_and_strategy",
    "checkpoint_io_plugin_and_strategy",
    "cluster_env_plugin_and_strategy",
    "cpu_devices_vs_accelerator",
    "cuda_devices_vs_accelerator",
    "invalid_num_nodes",
    "zero_devices",
    "no_gpu_backend",
    "missing_torch_xla",
    "accelerator_unavailable",
    "cpu_devices_not_positive_int",
    "device_ids_type",
    "gpus_none_available",
    "gpu_ids_not_unique",
    "gpu_not_on_machine",
    "devices_text_not_int",
    "gpu_devices_resolved_to_none",
    "cpu_devices_odd_digit",
    "custom_devices_type",
    "negative_device_index",
    "tpu_devices_invalid",
    "tpu_devices_text_invalid",
    "slurm_ntasks_unsupported",
    "lsf_rankfile_var_missing",
    "lsf_rankfile_var_empty",
    "lsf_rankfile_not_found",
    "lsf_rankfile_too_short",
    "lsf_host_not_in_rankfile",
    "lsf_jobid_missing",
    "lsf_port_not_int",
    "slurm_var_not_int",
    "fork_unsupported",
    "fsdp_needs_gpu",
    "missing_deepspeed",
    "strategy_needs_device_arg",
    "bnb_needs_cuda",
    "missing_bitsandbytes",
    "missing_transformer_engine",
    "missing_mpi4py",
    "xla_precision_unsupported",
    "deepspeed_precision_unsupported",
    "fsdp_precision_unsupported",
    "model_parallel_precision_unsupported",
    "no_precision_set",
    "amp_precision_unsupported",
    "amp_bf16_scaler",
    "fsdp_scaler_refused",
    "bnb_int8_dtype",
    "bf16_autocast_unsupported",
    "bnb_mode_unknown",
    "fsdp_precision_type",
    "xla_precision_type",
    "xla_fsdp_precision_type",
    "xla_checkpoint_io_type",
    "checkpoint_io_not_supported",
    "checkpoint_io_not_used",
    "env_var_missing",
    "env_var_not_int",
    "lsf_world_size_missing",
    "lsf_global_rank_missing",
    "lsf_local_rank_missing",
    "mpi_host_unknown",
    "start_method_unavailable",
    "interactive_incompatible",
    "xla_needs_xla_strategy",
    "torchelastic_world_size_mismatch",
    "slurm_devices_mismatch",
    "slurm_num_nodes_mismatch",
    "kubeflow_not_detectable",
    "xla_root_before_launch",
    "mesh_before_launch",
    "rank_out_of_devices",
    "not_implemented",
    "unexpected_kwarg",
    "xla_strategy_needs_xla",
    "data_parallel_needs_gpus",
    "strategy_needs_one_device",
    "mps_has_no_64_bit_floats",
    "mps_has_no_fp8",
    "engine_not_built",
    "mig_several",
    "environment_half_set",
    "hostlist_invalid",
    "unknown_environment",
    "invalid_devices",
    "too_many_devices",
};
}  // namespace detail

/// The code's spelling.
[[nodiscard]] constexpr std::string_view name_of(Code code) {
  return detail::code_names[static_cast<std::size_t>(code)];
}

/// One thing that is wrong: a literal, structural value. Texts in `names` are in quotes where the user gave a text, so
/// that 16 and '16' read differently.
struct Problem {
  Code code = Code::none;
  Text<24> flag;     ///< The flag or variable that the user would change: "devices", "SLURM_NTASKS".
  Text<112> names;   ///< What the sentence names (the given value first), one a line.
  Text<112> detail;  ///< More of the same: all variables that are missing, what is legal.
  Name nearest;      ///< The legal value nearest to the given one, if one is near.

  constexpr Problem() = default;
  constexpr Problem(Code what, std::string_view whose) : code(what), flag(whose) {}
  constexpr Problem(Code what, std::string_view whose, std::string_view name) : code(what), flag(whose), names(name) {}

  /// Adds a line to `names`.
  constexpr Problem& name(std::string_view text) {
    if (!names.empty()) names.append("\n");
    names.append(text);
    return *this;
  }
  /// Adds a number as a line to `names`.
  constexpr Problem& name(long long number) {
    if (!names.empty()) names.append("\n");
    names.append(number);
    return *this;
  }

  friend constexpr bool operator==(const Problem&, const Problem&) = default;
};

/// A value, or the problem that kept it from being.
template <class T>
struct Expected {
  T value{};
  Problem problem{};

  constexpr Expected() = default;
  constexpr Expected(const T& good) : value(good) {}        // NOLINT(google-explicit-constructor): reads as T
  constexpr Expected(const Problem& bad) : problem(bad) {}  // NOLINT(google-explicit-constructor)

  constexpr explicit operator bool() const { return problem.code == Code::none; }
  constexpr const T& operator*() const { return value; }
  constexpr const T* operator->() const { return &value; }
};

}  // namespace fabric
