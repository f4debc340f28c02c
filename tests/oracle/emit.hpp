// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "oracle/connector_flags.hpp"

// Writes flags, variables and hosts as C++ source, for the generated static_asserts.

namespace oracle {

inline std::string literal(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) >= 0x80) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\x%02x\"\"", static_cast<unsigned char>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

template <class Enum>
std::string cast(const char* type, Enum value) {
  return std::string(type) + "(" + std::to_string(static_cast<int>(value)) + ")";
}

inline std::string emit(const fabric::AcceleratorFacts& facts) {
  if (facts.built_in) return std::string(facts.name.view()) + "::facts";
  return "AcceleratorFacts{.name = " + literal(facts.name) +
         ", .flag = \"\", .device = " + cast("DeviceType", facts.device) +
         ", .built_in = false, .available = " + (facts.available ? "true" : "false") +
         ", .own_devices = " + std::to_string(facts.own_devices) + "}";
}

inline std::string emit(const fabric::PrecisionFacts& facts) {
  return "PrecisionFacts{.name = " + literal(facts.name) + ", .flag = " + literal(facts.flag) +
         ", .kind = " + cast("PrecisionKind", facts.kind) + ", .parameters = " + cast("Scalar", facts.parameters) +
         ", .compute = " + cast("Scalar", facts.compute) +
         ", .quantisation = " + cast("BitsandbytesMode", facts.quantisation) + "}";
}

inline std::string emit(const fabric::PrecisionObject& object) {
  return "[] { PrecisionObject o{" + emit(object.facts) + ", " + cast("PrecisionEngine", object.engine) +
         "}; o.device = " + cast("DeviceType", object.device) + "; return o; }()";
}

inline std::string emit(const fabric::EnvironmentObject& object) {
  std::string out = "[] { EnvironmentObject o{EnvironmentFacts{.name = " + literal(object.facts.name) +
                    ", .kind = " + cast("EnvironmentKind", object.facts.kind) + "}}; ";
  if (object.facts.kind == fabric::EnvironmentKind::custom) {
    out += "o.world_size = " + std::to_string(object.world_size) +
           "; o.global_rank = " + std::to_string(object.global_rank) +
           "; o.local_rank = " + std::to_string(object.local_rank) + "; ";
  }
  return out + "return o; }()";
}

inline std::string emit(const fabric::StrategyObject& o) {
  const auto& f = o.facts;
  std::string out =
      "[] { StrategyObject o{.facts = {.name = " + literal(f.name) + ", .flag = " + literal(f.flag) +
      ", .family = " + cast("StrategyFamily", f.family) + ", .start_method = " + cast("StartMethod", f.start_method) +
      ", .find_unused_parameters = " + (f.find_unused_parameters ? "true" : "false") +
      ", .stage = " + std::to_string(f.stage) + ", .optimizer_offload = " + cast("Offload", f.optimizer_offload) +
      ", .parameter_offload = " + cast("Offload", f.parameter_offload) +
      ", .built_in = " + (f.built_in ? "true" : "false") + "}}; ";
  if (o.has_accelerator) out += "o.has_accelerator = true; o.accelerator = " + emit(o.accelerator) + "; ";
  if (o.has_precision) out += "o.has_precision = true; o.precision = " + emit(o.precision) + "; ";
  if (o.checkpoint != fabric::CheckpointKind::none)
    out += "o.checkpoint = " + cast("CheckpointKind", o.checkpoint) + "; ";
  if (o.environment.given()) out += "o.environment = " + emit(o.environment) + "; ";
  if (o.devices.count > 0) {
    out += "o.devices = {.type = " + cast("DeviceType", o.devices.type) +
           ", .count = " + std::to_string(o.devices.count) + ", .listed = " + (o.devices.listed ? "true" : "false") +
           "}; ";
    for (int i = 0; i < o.devices.indices.count; ++i) {
      out += "o.devices.indices.push(" + std::to_string(o.devices.indices[i]) + "); ";
    }
  }
  if (o.has_devices) {
    out += "o.has_devices = true; o.device = {" + cast("DeviceType", o.device.type) + ", " +
           std::to_string(o.device.index) + "}; ";
  }
  return out + "return o; }()";
}

inline std::string emit(const fabric::Plugin& plugin) {
  switch (plugin.kind) {
    case fabric::Plugin::Kind::precision: return emit(plugin.precision);
    case fabric::Plugin::Kind::checkpoint: return cast("CheckpointKind", plugin.checkpoint);
    case fabric::Plugin::Kind::environment: break;
  }
  return emit(plugin.environment);
}

inline std::string emit(const fabric::DevicesFlag& flag) {
  using Form = fabric::DevicesFlag::Form;
  switch (flag.form) {
    case Form::unset: return "{}";
    case Form::integer: return std::to_string(flag.number);
    case Form::boolean: return flag.number != 0 ? "true" : "false";
    case Form::text: return literal(flag.text);
    case Form::null: return "nullptr";
    case Form::list: break;
  }
  if (flag.indices.count == 0) return "DevicesFlag::list(nullptr, 0)";
  std::string out;
  for (int i = 0; i < flag.indices.count; ++i) out += (i > 0 ? ", " : "{") + std::to_string(flag.indices[i]);
  return "DevicesFlag(" + out + "})";
}

inline std::string emit(const fabric::Flags& flags, const Json& args) {
  std::string out = "Flags{";
  const auto add = [&](const char* name, const std::string& value) {
    out += std::string(out.back() == '{' ? "." : ", .") + name + " = " + value;
  };
  if (args.contains("accelerator")) {
    add("accelerator", flags.accelerator.is_object ? emit(flags.accelerator.facts) : literal(flags.accelerator.text));
  }
  if (args.contains("strategy")) {
    add("strategy", flags.strategy.is_object ? emit(flags.strategy.object) : literal(flags.strategy.text));
  }
  if (args.contains("devices")) add("devices", emit(flags.devices));
  if (args.contains("num_nodes")) {
    add("num_nodes", flags.num_nodes.is_text ? literal(flags.num_nodes.text) : std::to_string(flags.num_nodes.number));
  }
  if (args.contains("precision") && flags.precision.form != fabric::PrecisionFlag::Form::unset) {
    const bool text = flags.precision.form == fabric::PrecisionFlag::Form::text;
    add("precision", text ? literal(flags.precision.text) : std::to_string(flags.precision.number));
  }
  if (flags.plugins.count > 0) {
    std::string list;
    for (const fabric::Plugin& plugin : flags.plugins)
      list += (list.empty() ? "Plugin(" : ", Plugin(") + emit(plugin) + ")";
    add("plugins", "{" + list + "}");
  }
  return out + "}";
}

/// The host's and the variables' arrays, and an expression for each.
struct EmittedHost {
  std::string arrays, variables, host;
};

inline EmittedHost emit(const RowHost& row) {
  EmittedHost out;
  out.variables = "Variables{}";
  if (row.variables().begin() != row.variables().end()) {
    out.arrays += "constexpr Variable variables[]{";
    for (const fabric::Variable& v : row.variables())
      out.arrays += "{" + literal(v.name) + ", " + literal(v.value) + "}, ";
    out.arrays += "};\n";
    out.variables = "Variables(variables, std::size(variables))";
  }
  const fabric::Host& h = row.host();
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  std::string mpi = "{}";
  if (h.mpi.available) {
    out.arrays += "constexpr std::string_view mpi_hosts[]{";
    for (std::size_t i = 0; i < h.mpi.host_count; ++i) out.arrays += literal(h.mpi.hosts[i]) + ", ";
    out.arrays += "};\n";
    mpi = "{.available = true, .size = " + std::to_string(h.mpi.size) + ", .rank = " + std::to_string(h.mpi.rank) +
          ", .local_rank = " + std::to_string(h.mpi.local_rank) +
          ", .hosts = mpi_hosts, .host_count = std::size(mpi_hosts)}";
  }
  std::string files;
  if (h.file_count > 0) {
    out.arrays += "constexpr HostFile files[]{";
    for (std::size_t i = 0; i < h.file_count; ++i) {
      out.arrays += "{" + literal(h.files[i].path) + ", " + literal(h.files[i].text) + "}, ";
    }
    out.arrays += "};\n";
    files = ", .files = files, .file_count = std::size(files)";
  }
  out.host = "Host{.cuda_devices = " + std::to_string(h.cuda_devices) + ", .mps = " + flag(h.mps) +
             ", .tpu_devices = " + std::to_string(h.tpu_devices) + ", .interactive = " + flag(h.interactive) +
             ", .fork = " + flag(h.fork) + ", .srun = " + flag(h.srun) + ", .xla_engine = " + flag(h.xla_engine) +
             ", .deepspeed_engine = " + flag(h.deepspeed_engine) +
             ", .bitsandbytes_engine = " + flag(h.bitsandbytes_engine) +
             ", .transformer_engine = " + flag(h.transformer_engine) + ", .hostname = " + literal(h.hostname) +
             ", .mpi = " + mpi + files + "}";
  return out;
}

}  // namespace oracle
