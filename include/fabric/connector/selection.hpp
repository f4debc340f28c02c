// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "fabric/connector/devices.hpp"
#include "fabric/connector/flags.hpp"
#include "fabric/connector/hostlist.hpp"
#include "fabric/connector/problem.hpp"

namespace fabric {

/// How the processes of the other local ranks come to be.
enum class Launcher : std::uint8_t {
  none,             ///< One process.
  subprocess,       ///< The program is started again for each.
  multiprocessing,  ///< Spawned or forked for one function.
  xla,              ///< By the XLA runtime.
};

/// What the resolver has to say without refusing anything: warnings first, then plain information.
enum class Note : std::uint8_t {
  precision_alias_discouraged,
  dp_on_cpu_to_ddp,
  fp16_amp_cpu_to_bf16,
  srun_not_used,
  scaler_disabled_no_cuda,
  single_tpu_deprecated,
  amp_fp16,
  amp_bf16,
  interactive_one_gpu,
};

namespace detail {
inline constexpr std::array<std::string_view, 9> note_names{"precision_alias_discouraged",
                                                            "dp_on_cpu_to_ddp",
                                                            "fp16_amp_cpu_to_bf16",
                                                            "srun_not_used",
                                                            "scaler_disabled_no_cuda",
                                                            "single_tpu_deprecated",
                                                            "amp_fp16",
                                                            "amp_bf16",
                                                            "interactive_one_gpu"};
}  // namespace detail

/// The note's spelling.
[[nodiscard]] constexpr std::string_view name_of(Note note) {
  return detail::note_names[static_cast<std::size_t>(note)];
}

/// Does the note warn?
[[nodiscard]] constexpr bool is_warning(Note note) { return note < Note::amp_fp16; }

/// Notes in the order in which they arose.
struct Notes {
  std::array<Note, 8> items{};
  std::size_t count = 0;

  constexpr void add(Note note) {
    if (count < items.size()) items[count++] = note;
  }
  [[nodiscard]] constexpr bool has(Note note) const {
    for (const Note n : *this) {
      if (n == note) return true;
    }
    return false;
  }
  [[nodiscard]] constexpr const Note* begin() const { return items.data(); }
  [[nodiscard]] constexpr const Note* end() const { return items.data() + count; }
  friend constexpr bool operator==(const Notes&, const Notes&) = default;
};

/// Where a choice comes from.
enum class Source : std::uint8_t {
  automatic,  ///< Nobody asked: the default, or what the host and the variables suggest.
  flag,       ///< The flag, or the argument in code.
  variable,   ///< The `LT_` variable of the flag.
  plugin,     ///< An object in `plugins`.
  strategy,   ///< The strategy object brought it.
  fallback,   ///< Something else was asked for; a note says why it was replaced.
};

/// The sources of a selection's parts, for `explain`.
struct Sources {
  Source accelerator = Source::automatic;
  Source strategy = Source::automatic;
  Source devices = Source::automatic;
  Source num_nodes = Source::automatic;
  Source precision = Source::automatic;
  Source environment = Source::automatic;
  Source checkpoint = Source::automatic;
  friend constexpr bool operator==(const Sources&, const Sources&) = default;
};

/// A number that the environment may not know, or not yet: then `code` says why, and `name` which variable or value.
struct Rank {
  int value = 0;
  Code code = Code::none;
  Text<32> name{};

  [[nodiscard]] constexpr bool known() const { return code == Code::none; }
  friend constexpr bool operator==(const Rank&, const Rank&) = default;
};

/// Everything that a set of flags, variables and host facts comes down to: a literal and structural type.
struct Selection {
  AcceleratorFacts accelerator = Cpu::facts;
  StrategyFacts strategy = SingleDevice::facts;
  StrategyOptions options{};
  PrecisionFacts precision = F32::facts;
  PrecisionEngine precision_engine = PrecisionEngine::plain;
  DeviceType precision_device = DeviceType::cpu;  ///< Where autocast acts; meaningful for the engine `mixed`.
  EnvironmentFacts environment = Local::facts;
  CheckpointKind checkpoint = CheckpointKind::none;  ///< `none`: the strategy's own.

  DeviceList devices{};         ///< Of this node.
  DeviceList parsed_devices{};  ///< What `--devices` alone means; differs where the strategy object brought devices.
  Device single_device{};       ///< Of a strategy that runs in one process.
  int num_nodes = 1;

  Launcher launcher = Launcher::none;
  StartMethod start_method = StartMethod::none;
  bool external_launch = false;  ///< Somebody else started all processes.

  Rank world_size{1}, global_rank{}, local_rank{}, node_rank{};
  Rank sampler_replicas{1};  ///< Over how many replicas data are divided; `global_rank` says which one this is.
  HostName main_address;     ///< Where global rank 0 runs.
  Rank main_port{};          ///< Its port; 0: a free one is to be chosen. Unknown where the address is.
  Problem settings;          ///< devices and num_nodes contradict what the environment says; none if they agree.

  Name accelerator_flag;  ///< The text that names the accelerator; empty for an object.
  Name strategy_flag;     ///< The text that names the strategy; empty for an object.
  Name precision_flag;    ///< The precision that was asked for, before any fallback.
  Notes notes;
  Sources sources;

  friend constexpr bool operator==(const Selection&, const Selection&) = default;
};

/// The stages of `resolve`, in the order in which their problems win. The names are those of the codes' documentation.
enum class Stage : std::uint8_t {
  user,
  env_args,
  config_flags,
  device_flags,
  choose_accelerator,
  init_accelerator,
  cluster_env,
  choose_strategy,
  fallback,
  init_strategy,
  precision,
  lazy_init,
  rules,  ///< What the rules table refuses beyond the reference.
};

namespace detail {
inline constexpr std::array<std::string_view, 13> stage_names{
    "user",        "env_args",        "config_flags", "device_flags",  "choose_accelerator", "init_accelerator",
    "cluster_env", "choose_strategy", "fallback",     "init_strategy", "precision",          "lazy_init",
    "rules"};
}  // namespace detail

/// The stage's spelling.
[[nodiscard]] constexpr std::string_view name_of(Stage stage) {
  return detail::stage_names[static_cast<std::size_t>(stage)];
}

/// Problems, the one that a user should solve first in front.
struct Problems {
  std::array<Problem, 6> items{};
  std::size_t count = 0;

  constexpr void add(const Problem& problem) {
    if (count < items.size()) items[count++] = problem;
  }
  [[nodiscard]] constexpr bool empty() const { return count == 0; }
  [[nodiscard]] constexpr std::size_t size() const { return count; }
  [[nodiscard]] constexpr const Problem& operator[](std::size_t i) const { return items[i]; }
  [[nodiscard]] constexpr const Problem& front() const { return items[0]; }
  [[nodiscard]] constexpr const Problem* begin() const { return items.data(); }
  [[nodiscard]] constexpr const Problem* end() const { return items.data() + count; }
  friend constexpr bool operator==(const Problems&, const Problems&) = default;
};

/// A selection, or the problems that kept it from being.
struct Resolution : Selection {
  Problems problems;
  Stage stage = Stage::user;  ///< Where the first problem arose.

  [[nodiscard]] constexpr bool ok() const { return problems.empty(); }
  /// The first problem's code; `Code::none` when all is well.
  [[nodiscard]] constexpr Code code() const { return problems.items[0].code; }
  [[nodiscard]] constexpr const Selection& selection() const { return *this; }
};

}  // namespace fabric
