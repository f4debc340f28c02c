// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "fabric/connector/devices.hpp"
#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/environment.hpp"
#include "fabric/policy/precision.hpp"
#include "fabric/policy/strategy.hpp"

namespace fabric {

// The values of the flags. Each is written as itself: a text, a number, or an object of a policy type.
// NOLINTBEGIN(google-explicit-constructor)

/// `--accelerator`: a text, or an object such as `Cuda{}`.
struct AcceleratorFlag {
  Name text = "auto";
  bool is_object = false;
  AcceleratorFacts facts{};  ///< Of the object.

  constexpr AcceleratorFlag() = default;
  constexpr AcceleratorFlag(std::string_view value) : text(value) {}
  constexpr AcceleratorFlag(const char* value) : text(value) {}
  constexpr AcceleratorFlag(const AcceleratorFacts& object) : text(), is_object(true), facts(object) {}
  template <AcceleratorPolicy A>
  constexpr AcceleratorFlag(A) : AcceleratorFlag(AcceleratorFacts(A::facts)) {}

  friend constexpr bool operator==(const AcceleratorFlag&, const AcceleratorFlag&) = default;
};

/// Who carries a precision out: this library's own modes, or a strategy's.
enum class PrecisionEngine : std::uint8_t {
  plain,
  double_,
  half,
  mixed,
  transformer_engine,
  bitsandbytes,
  deepspeed,
  fsdp,
  xla,
  custom,
};

/// Who carries `kind` out where the strategy does not do it itself.
[[nodiscard]] constexpr PrecisionEngine own_engine(PrecisionKind kind) {
  switch (kind) {
    case PrecisionKind::f32: return PrecisionEngine::plain;
    case PrecisionKind::f64: return PrecisionEngine::double_;
    case PrecisionKind::f16:
    case PrecisionKind::bf16: return PrecisionEngine::half;
    case PrecisionKind::f16_mixed:
    case PrecisionKind::bf16_mixed: return PrecisionEngine::mixed;
    case PrecisionKind::transformer_engine: return PrecisionEngine::transformer_engine;
    case PrecisionKind::bitsandbytes: return PrecisionEngine::bitsandbytes;
    case PrecisionKind::custom: break;
  }
  return PrecisionEngine::custom;
}

/// A precision as an object: what it is, who carries it out and, for autocast, where.
struct PrecisionObject {
  PrecisionFacts facts = F32::facts;
  PrecisionEngine engine = PrecisionEngine::plain;
  bool built_in = true;
  DeviceType device = DeviceType::cuda;  ///< Autocast's.

  constexpr PrecisionObject() = default;
  constexpr PrecisionObject(const PrecisionFacts& what, PrecisionEngine who) : facts(what), engine(who) {}
  template <PrecisionPolicy P>
  constexpr PrecisionObject(P) : facts(P::facts), engine(own_engine(P::facts.kind)) {}

  friend constexpr bool operator==(const PrecisionObject&, const PrecisionObject&) = default;
};

/// `--precision`: a text, one of the numbers 16, 32 and 64, or an object such as `BF16Mixed{}`, which means its flag.
struct PrecisionFlag {
  enum class Form : std::uint8_t { unset, text, integer, object };
  Form form = Form::unset;
  Name text;
  int number = 0;
  PrecisionObject object{};  ///< A precision that has no flag.

  constexpr PrecisionFlag() = default;
  constexpr PrecisionFlag(std::string_view value) : form(Form::text), text(value) {}
  constexpr PrecisionFlag(const char* value) : PrecisionFlag(std::string_view(value)) {}
  constexpr PrecisionFlag(int value) : form(Form::integer), number(value) {}
  PrecisionFlag(bool) = delete;
  PrecisionFlag(double) = delete;
  template <PrecisionPolicy P>
  constexpr PrecisionFlag(P policy) : form(Form::text), text(P::facts.flag) {
    if (text.empty() || P::facts.kind == PrecisionKind::custom) {
      form = Form::object;
      object = policy;
    }
  }

  friend constexpr bool operator==(const PrecisionFlag&, const PrecisionFlag&) = default;
};

/// Who writes checkpoints. `none`: nobody was asked for, the strategy has its own.
enum class CheckpointKind : std::uint8_t { none, torch, xla, custom };

/// A cluster environment as an object. An environment from outside the library states its values itself.
struct EnvironmentObject {
  EnvironmentFacts facts = Detected::facts;
  bool external = true;  ///< Custom: were all processes started by someone else?
  int world_size = 1, global_rank = 0, local_rank = 0, node_rank = 0;  ///< Custom.

  constexpr EnvironmentObject() = default;
  constexpr EnvironmentObject(const EnvironmentFacts& what) : facts(what) {}
  template <EnvironmentPolicy E>
  constexpr EnvironmentObject(E) : facts(E::facts) {}

  [[nodiscard]] constexpr bool given() const { return facts.kind != EnvironmentKind::detected; }
  friend constexpr bool operator==(const EnvironmentObject&, const EnvironmentObject&) = default;
};

/// What the ranks of a shard group divide among themselves. All but `none` divide the optimizer's state.
enum class Sharding : std::uint8_t {
  full,     ///< Parameters and gradients too: each unit is gathered for its forward and again for its backward.
  grad_op,  ///< Gradients; parameters are gathered for forward and kept until their backward is over.
  none,     ///< Nothing: every rank holds everything, and gradients are all-reduced.
  hybrid,   ///< `full` among neighbours, such as the processes of one node; the groups are replicas of one another.
};

/// Options of a strategy that are no part of its type.
struct StrategyOptions {
  bool static_graph = false;           ///< Ddp: each step uses the same parameters.
  int bucket_cap_mb = 0;               ///< Ddp: megabytes a gradient bucket holds; 0: the engine's default.
  Sharding sharding = Sharding::full;  ///< Fsdp.
  bool full_state_dict = false;        ///< Fsdp: checkpoints hold whole parameters.
  int data_parallel_size = 0;          ///< ModelParallel: 0 means to divide the devices automatically.
  int tensor_parallel_size = 0;        ///< ModelParallel: likewise.
  Text<8> backend;                     ///< The collective library's name; empty: by device.

  friend constexpr bool operator==(const StrategyOptions&, const StrategyOptions&) = default;
};

/// One device: a kind and an index.
struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  friend constexpr bool operator==(const Device&, const Device&) = default;
};

/// A strategy as an object may bring its own accelerator, precision, checkpoint IO, environment and devices.
struct StrategyObject {
  StrategyFacts facts{};
  StrategyOptions options{};
  bool has_accelerator = false, has_precision = false, has_devices = false;
  AcceleratorFacts accelerator{};
  PrecisionObject precision{};
  CheckpointKind checkpoint = CheckpointKind::none;
  EnvironmentObject environment{};
  DeviceList devices{.count = 0};
  Device device{};  ///< Of a single-device strategy, with `has_devices`.

  friend constexpr bool operator==(const StrategyObject&, const StrategyObject&) = default;
};

/// `--strategy`: a text, or an object such as `Ddp{}`.
struct StrategyFlag {
  Name text = "auto";
  bool is_object = false;
  StrategyObject object{};

  constexpr StrategyFlag() = default;
  constexpr StrategyFlag(std::string_view value) : text(value) {}
  constexpr StrategyFlag(const char* value) : text(value) {}
  constexpr StrategyFlag(const StrategyObject& value) : text(), is_object(true), object(value) {}
  template <StrategyPolicy S>
  constexpr StrategyFlag(S) : text(), is_object(true), object{.facts = S::facts} {}

  friend constexpr bool operator==(const StrategyFlag&, const StrategyFlag&) = default;
};

/// `--num-nodes`: a number, or a text that is one.
struct NumNodesFlag {
  bool is_text = false;
  int number = 1;
  Name text;

  constexpr NumNodesFlag() = default;
  constexpr NumNodesFlag(int value) : number(value) {}
  constexpr NumNodesFlag(std::string_view value) : is_text(true), text(value) {}
  constexpr NumNodesFlag(const char* value) : is_text(true), text(value) {}
  NumNodesFlag(bool) = delete;
  NumNodesFlag(double) = delete;

  friend constexpr bool operator==(const NumNodesFlag&, const NumNodesFlag&) = default;
};

/// One plugin: a precision, a checkpoint IO or a cluster environment.
struct Plugin {
  enum class Kind : std::uint8_t { precision, checkpoint, environment };
  Kind kind = Kind::precision;
  PrecisionObject precision{};
  CheckpointKind checkpoint = CheckpointKind::none;
  EnvironmentObject environment{};

  constexpr Plugin() = default;
  constexpr Plugin(const PrecisionObject& object) : kind(Kind::precision), precision(object) {}
  constexpr Plugin(CheckpointKind object) : kind(Kind::checkpoint), checkpoint(object) {}
  constexpr Plugin(const EnvironmentObject& object) : kind(Kind::environment), environment(object) {}
  template <PrecisionPolicy P>
  constexpr Plugin(P object) : Plugin(PrecisionObject(object)) {}
  template <EnvironmentPolicy E>
  constexpr Plugin(E object) : Plugin(EnvironmentObject(object)) {}

  friend constexpr bool operator==(const Plugin&, const Plugin&) = default;
};

/// At most four plugins: more than one of a kind is an error anyway.
struct Plugins {
  static constexpr std::size_t capacity = 4;
  std::array<Plugin, capacity> items{};
  std::size_t count = 0;

  constexpr Plugins() = default;
  constexpr Plugins(std::initializer_list<Plugin> list) {
    for (const Plugin& plugin : list) add(plugin);
  }
  constexpr void add(const Plugin& plugin) {
    if (count < capacity) items[count++] = plugin;
  }
  [[nodiscard]] constexpr const Plugin* begin() const { return items.data(); }
  [[nodiscard]] constexpr const Plugin* end() const { return items.data() + count; }

  friend constexpr bool operator==(const Plugins&, const Plugins&) = default;
};

// NOLINTEND(google-explicit-constructor)

/// What the user asks for. What is left out is chosen: `{.strategy = "ddp", .devices = 2, .precision = "bf16-mixed"}`.
struct Flags {
  AcceleratorFlag accelerator{};
  StrategyFlag strategy{};
  DevicesFlag devices{};
  NumNodesFlag num_nodes{};
  PrecisionFlag precision{};
  Plugins plugins{};
  Text<48> environment{};  ///< `--environment`: a name forces one, "-slurm" turns one off; empty: detected.
};

/// The flags that mean exactly these policies, so that `Fabric<A, S, P, E>` is resolved by the same rules as a text.
template <AcceleratorPolicy A, StrategyPolicy S, PrecisionPolicy P, EnvironmentPolicy E = Detected>
[[nodiscard]] constexpr Flags flags_for(const DevicesFlag& devices = {}, const NumNodesFlag& num_nodes = {}) {
  Flags flags{.accelerator = A{}, .strategy = S{}, .devices = devices, .num_nodes = num_nodes, .precision = P{}};
  if (E::facts.kind != EnvironmentKind::detected) flags.plugins.add(E{});
  return flags;
}

}  // namespace fabric
