// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "fabric/connector/problem.hpp"

namespace fabric::detail {

/// What is wrong and how to mend it. {0}, {1} and {2} stand for the problem's names.
struct Sentence {
  Code code;
  std::string_view text;
};

inline constexpr Sentence sentences[]{
    // Objects that the program made.
    {Code::amp_precision_unsupported, "autocast has the precisions 16-mixed and bf16-mixed, not {0}"},
    {Code::fsdp_precision_unsupported,
     "Fsdp has no precision {0}: use 32-true, 16-true, bf16-true, 16-mixed or bf16-mixed"},
    {Code::deepspeed_precision_unsupported,
     "DeepSpeed has no precision {0}: use 32-true, 16-true, bf16-true, 16-mixed or bf16-mixed"},
    {Code::xla_precision_unsupported, "XLA strategies have no precision {0}: use 32-true, 16-true or bf16-true"},
    {Code::model_parallel_precision_unsupported,
     "ModelParallel has no precision {0}: use 32-true, 16-true, bf16-true or bf16-mixed"},
    {Code::bnb_int8_dtype, "the quantisation {0} computes in 16-bit floats (float16), not in another type"},
    {Code::bnb_needs_cuda, "quantised weights need CUDA: use --accelerator cuda, or drop the Bitsandbytes plugin"},
    {Code::missing_torch_xla, "XLA was asked for, but its engine was not found here"},
    {Code::missing_deepspeed, "DeepSpeed was asked for, but its engine was not built: use fsdp or ddp"},
    {Code::missing_bitsandbytes, "Bitsandbytes was asked for, but its engine was not built"},
    {Code::missing_transformer_engine,
     "transformer-engine was asked for, but its engine was not built: use bf16-mixed"},
    {Code::missing_mpi4py,
     "the MPI environment was asked for, but nothing says that MPI started this program: use mpirun"},
    {Code::unexpected_kwarg, "this strategy object takes no {0}"},
    {Code::fsdp_precision_type, "Fsdp carries precision out itself: give --precision instead of a precision plugin"},
    {Code::xla_precision_type, "XLA strategies carry precision out themselves: give --precision instead of a plugin"},
    {Code::xla_fsdp_precision_type, "XlaFsdp carries precision out itself: give --precision instead of a plugin"},
    // Merging with variables.
    {Code::cli_conflict, "the program says {0}={1}, but the command line says {2}: drop one of them"},
    {Code::cli_flag_not_int, "LT_CLI_USED is no whole number"},
    {Code::num_nodes_not_int, "{0} is no number of nodes"},
    // Names, values and conflicts.
    {Code::invalid_strategy_name, "there is no strategy {0}"},
    {Code::invalid_accelerator_name, "there is no accelerator {0}"},
    {Code::invalid_precision, "there is no precision {0}"},
    {Code::mps_parallel_strategy,
     "the Apple GPU is a single device, which {0} cannot share: drop --strategy, or use --accelerator cpu"},
    {Code::duplicate_plugins, "more than one plugin of a kind: {0}; keep one of each"},
    {Code::precision_flag_and_plugin, "precision is given by --precision {0} and by a plugin: drop one of them"},
    {Code::accelerator_flag_and_strategy,
     "the accelerator is given by --accelerator and by the strategy object: drop one"},
    {Code::precision_plugin_and_strategy, "the precision is given by a plugin and by the strategy object: drop one"},
    {Code::checkpoint_io_plugin_and_strategy,
     "the checkpoint IO is given by a plugin and by the strategy object: drop one"},
    {Code::cluster_env_plugin_and_strategy,
     "the cluster environment is given by a plugin and by the strategy object: drop one"},
    {Code::cpu_devices_vs_accelerator, "the {0} object lists CPUs, but --accelerator says otherwise: use auto or cpu"},
    {Code::cuda_devices_vs_accelerator,
     "the {0} object lists CUDA devices, but --accelerator says otherwise: use auto or cuda"},
    {Code::invalid_num_nodes, "there are no {0} nodes: give at least 1"},
    {Code::zero_devices, "{0} means no devices at all (accelerator {1}): give a count above 0, indices, or auto"},
    // The machine.
    {Code::no_gpu_backend, "neither an NVIDIA nor an Apple GPU was found: use --accelerator cpu or auto"},
    {Code::accelerator_unavailable, "{0} is not available on this machine: use --accelerator auto or cpu"},
    {Code::cpu_devices_not_positive_int, "{0} is no number of processes"},
    {Code::cpu_devices_odd_digit, "{0} is no number of processes: write it in the digits 0 to 9"},
    {Code::custom_devices_type, "this accelerator takes a number of devices"},
    {Code::device_ids_type, "{0} is no devices value"},
    {Code::gpus_none_available, "{0} means no GPU at all"},
    {Code::gpu_ids_not_unique, "{0} names a GPU twice"},
    {Code::gpu_not_on_machine, "the GPUs {0} are not all on this machine"},
    {Code::gpu_devices_resolved_to_none, "{0} means no GPU at all"},
    {Code::devices_text_not_int, "{0} is neither a count nor indices"},
    {Code::tpu_devices_invalid, "{1} are no devices to choose of {0}"},
    {Code::tpu_devices_text_invalid, "{0} is neither a count nor an index"},
    {Code::too_many_devices, "too many devices are listed one by one"},
    {Code::mig_several, "one process cannot use several MIG devices: give it one"},
    // The cluster.
    {Code::slurm_ntasks_unsupported,
     "SLURM_NTASKS={0} without SLURM_NTASKS_PER_NODE: give srun or sbatch --ntasks-per-node instead of --ntasks"},
    {Code::slurm_var_not_int, "a variable of Slurm is no whole number"},
    {Code::lsf_rankfile_var_missing, "LSF's rank file is not named"},
    {Code::lsf_rankfile_var_empty, "LSB_DJOB_RANKFILE is empty"},
    {Code::lsf_rankfile_not_found, "LSF's rank file cannot be read"},
    {Code::lsf_rankfile_too_short, "LSF's rank file names no host to compute on"},
    {Code::lsf_host_not_in_rankfile, "LSF's hosts do not contain this one"},
    {Code::lsf_jobid_missing, "LSF's job has no number to derive a port from: set MASTER_PORT"},
    {Code::lsf_port_not_int, "the port for LSF's job is no whole number"},
    {Code::lsf_world_size_missing, "jsrun did not set JSM_NAMESPACE_SIZE: was the program started by jsrun?"},
    {Code::lsf_global_rank_missing, "jsrun did not set JSM_NAMESPACE_RANK: was the program started by jsrun?"},
    {Code::lsf_local_rank_missing, "jsrun did not set JSM_NAMESPACE_LOCAL_RANK: was the program started by jsrun?"},
    {Code::env_var_missing, "the variable {0} is not set, although the launcher should have set it"},
    {Code::env_var_not_int, "{0} is no whole number"},
    {Code::mpi_host_unknown, "this host is not among those of the MPI job"},
    {Code::environment_half_set, "the launcher's variables contradict each other: {0}"},
    {Code::unknown_environment, "{0} names no cluster environment"},
    {Code::hostlist_invalid, "this is no list of hosts"},
    {Code::torchelastic_world_size_mismatch,
     "{0} devices on {1} nodes are asked for, but torchrun started {2} processes: make --nproc-per-node equal to "
     "--devices"},
    {Code::slurm_devices_mismatch, "{0} devices are asked for, but Slurm started {1} tasks on a node: make them equal"},
    {Code::slurm_num_nodes_mismatch, "{0} nodes are asked for, but Slurm's job has {1}: make them equal"},
    // Strategy, launcher and rules.
    {Code::fork_unsupported, "{0} forks, which this machine cannot: use ddp_spawn or ddp"},
    {Code::fsdp_needs_gpu, "Fsdp shards over CUDA GPUs: use --accelerator cuda, or ddp"},
    {Code::strategy_needs_one_device, "{1} runs on one device, but {0} are asked for: use ddp, or --devices 1"},
    {Code::checkpoint_io_not_supported, "{0} writes its checkpoints itself: drop the checkpoint plugin"},
    {Code::xla_checkpoint_io_type, "XLA strategies need XLA's checkpoint IO: drop the checkpoint plugin"},
    {Code::start_method_unavailable, "this machine cannot start processes by {0}: use spawn or popen"},
    {Code::interactive_incompatible,
     "{0} starts the program again, which a notebook cannot: use ddp_notebook, or run a script"},
    {Code::xla_needs_xla_strategy, "TPUs are driven by the strategies single_xla, xla and xla_fsdp, not by {0}"},
    {Code::xla_strategy_needs_xla, "{0} drives TPUs, not {1}: use ddp or fsdp, or --accelerator tpu"},
    {Code::data_parallel_needs_gpus, "{0} replicates over GPUs: use ddp on CPUs"},
    {Code::mps_has_no_64_bit_floats, "the Apple GPU has no 64-bit floats: use 32-true, or --accelerator cpu"},
    {Code::mps_has_no_fp8, "the Apple GPU has no FP8: use bf16-mixed, or transformer-engine on CUDA or CPUs"},
};

/// The code's sentence, or nothing for a code that is its own explanation.
constexpr std::string_view sentence_of(Code code) {
  for (const Sentence& sentence : sentences) {
    if (sentence.code == code) return sentence.text;
  }
  return {};
}

}  // namespace fabric::detail
