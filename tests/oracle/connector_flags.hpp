// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "fabric/config.hpp"
#include "oracle/devices_row.hpp"
#include "oracle/row_host.hpp"

namespace oracle {

/// A row's value that no C++ program can pass. The text is the name of its kind in docs/differences.md.
struct Inexpressible {
  std::string kind;
};

inline const fabric::PrecisionFacts& precision_facts(const std::string& text) {
  for (const auto& entry : fabric::detail::precision_entries) {
    if (entry.flag == text) return *entry.facts;
  }
  throw Inexpressible{"object_of_a_class_unknown_here"};
}

inline fabric::Device device_from(const std::string& text) {
  const auto colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  fabric::Device device;
  device.type = kind == "cuda"  ? fabric::DeviceType::cuda
                : kind == "mps" ? fabric::DeviceType::mps
                : kind == "xla" ? fabric::DeviceType::xla
                                : fabric::DeviceType::cpu;
  if (colon != std::string::npos) device.index = std::stoi(text.substr(colon + 1));
  return device;
}

inline std::string class_name(const Json& value) {
  return value.is_object() && value.contains("class") ? value["class"].get<std::string>() : std::string();
}

inline const Json& kwargs_of(const Json& object) {
  static const Json none = Json::object();
  return object.contains("kwargs") ? object["kwargs"] : none;
}

inline fabric::AcceleratorFacts accelerator_object(const Json& value) {
  using fabric::DeviceType;
  const std::string name = class_name(value);
  if (name == "CPUAccelerator") return fabric::Cpu::facts;
  if (name == "CUDAAccelerator") return fabric::Cuda::facts;
  if (name == "MPSAccelerator") return fabric::Mps::facts;
  if (name == "XLAAccelerator") return fabric::Xla::facts;
  fabric::AcceleratorFacts facts{.name = name.c_str(), .flag = "", .built_in = false};
  if (name == "CPUAcceleratorSubclass") return facts;
  if (name == "CUDAAcceleratorSubclass") {
    facts.device = DeviceType::cuda;
    return facts;
  }
  facts.own_devices = 3;
  if (name == "CustomAccelerator") return facts;
  facts.available = false;
  if (name == "UnavailableAccelerator") return facts;
  throw Inexpressible{"unrelated_object"};
}

inline fabric::PrecisionObject precision_object(const Json& value) {
  using fabric::PrecisionEngine;
  const std::string name = class_name(value);
  const Json& kwargs = kwargs_of(value);
  const auto text = [&] { return kwargs.value("precision", "32-true"); };
  if (name == "Precision") return fabric::F32{};
  if (name == "DoublePrecision") return fabric::F64{};
  if (name == "HalfPrecision") return {precision_facts(kwargs.value("precision", "16-true")), PrecisionEngine::half};
  if (name == "FSDPPrecision") return {precision_facts(text()), PrecisionEngine::fsdp};
  if (name == "DeepSpeedPrecision") return {precision_facts(text()), PrecisionEngine::deepspeed};
  if (name == "XLAPrecision") return {precision_facts(text()), PrecisionEngine::xla};
  if (name == "MixedPrecision" || name == "MixedSubclass") {
    fabric::PrecisionObject object{precision_facts(text()), PrecisionEngine::mixed};
    object.device = device_from(kwargs.value("device", "cuda")).type;
    if (name == "MixedSubclass") {
      object.facts.name = name.c_str();
      object.built_in = false;
    }
    return object;
  }
  if (name == "PrecisionSubclass") {
    fabric::PrecisionObject object = fabric::F32{};
    object.facts.name = name.c_str();
    object.built_in = false;
    return object;
  }
  const auto dtype = [&](const char* key) {
    const Json given = kwargs.value(key, Json::object());
    return given.value("dtype", std::string());
  };
  if (name == "TransformerEnginePrecision") {
    if (dtype("weights_dtype") == "float16") return fabric::TransformerEngine<fabric::F16>{};
    return fabric::TransformerEngine<>{};
  }
  if (name == "BitsandbytesPrecision") {
    using fabric::BitsandbytesMode;
    const std::string mode = kwargs.value("mode", "nf4");
    fabric::PrecisionObject object =
        mode == "int8"            ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::int8>{})
        : mode == "int8-training" ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::int8_training>{})
        : mode == "fp4"           ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::fp4>{})
        : mode == "fp4-dq"        ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::fp4_dq>{})
        : mode == "nf4-dq"        ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::nf4_dq>{})
        : mode == "nf4"           ? fabric::PrecisionObject(fabric::Bitsandbytes<BitsandbytesMode::nf4>{})
                                  : throw Inexpressible{"quantisation_mode_outside_the_enum"};
    if (const std::string type = dtype("dtype"); !type.empty()) {
      object.facts.compute = type == "float16"   ? fabric::Scalar::f16
                             : type == "float32" ? fabric::Scalar::f32
                                                 : fabric::Scalar::bf16;
    }
    return object;
  }
  throw Inexpressible{"unrelated_object"};
}

inline std::optional<fabric::EnvironmentObject> environment_object(const Json& value) {
  const std::string name = class_name(value);
  if (name == "TorchElasticEnvironment") return fabric::TorchElastic{};
  if (name == "SLURMEnvironment") return fabric::Slurm{};
  if (name == "LSFEnvironment") return fabric::Lsf{};
  if (name == "MPIEnvironment") return fabric::Mpi{};
  if (name == "KubeflowEnvironment") return fabric::Kubeflow{};
  if (name == "LightningEnvironment") return fabric::Local{};
  if (name == "XLAEnvironment") {
    return fabric::EnvironmentObject(fabric::detail::environment_facts(fabric::EnvironmentKind::xla));
  }
  if (name == "CustomEnvironment") {
    fabric::EnvironmentObject object{fabric::EnvironmentFacts{.name = "CustomEnvironment"}};
    object.world_size = 2;
    object.global_rank = 1;
    object.local_rank = 1;
    return object;
  }
  return std::nullopt;
}

inline fabric::CheckpointKind checkpoint_kind(const Json& value) {
  const std::string name = class_name(value);
  if (name == "TorchCheckpointIO") return fabric::CheckpointKind::torch;
  if (name == "XLACheckpointIO") return fabric::CheckpointKind::xla;
  return fabric::CheckpointKind::none;
}

inline fabric::DeviceList device_list(const Json& value) {
  fabric::DeviceList list{.count = 0};
  std::vector<int> indices;
  bool counted = true;
  for (const Json& text : value["devices"]) {
    const fabric::Device device = device_from(text.get<std::string>());
    if (!indices.empty() && device.type != list.type) throw Inexpressible{"strategy_devices_of_two_kinds"};
    list.type = device.type;
    counted &= device.index == static_cast<int>(indices.size()) || device.type == fabric::DeviceType::cpu;
    indices.push_back(device.index);
  }
  list.count = static_cast<int>(indices.size());
  list.listed = !counted;
  if (list.listed) {
    for (const int index : indices) list.indices.push(index);
  }
  return list;
}

inline void read_strategy_options(const std::string& key, const Json& value, fabric::StrategyObject& object) {
  using fabric::StartMethod;
  if (key == "accelerator") {
    object.has_accelerator = true;
    object.accelerator = accelerator_object(value);
  } else if (key == "precision") {
    object.has_precision = true;
    object.precision = precision_object(value);
  } else if (key == "checkpoint_io") {
    object.checkpoint = checkpoint_kind(value);
  } else if (key == "cluster_environment") {
    object.environment = environment_object(value).value();
  } else if (key == "parallel_devices") {
    object.devices = device_list(value);
  } else if (key == "device") {
    object.has_devices = true;
    object.device = value.is_number() ? fabric::Device{fabric::DeviceType::xla, value.get<int>()}
                                      : device_from(value.is_string() ? value.get<std::string>()
                                                                      : value["device"].get<std::string>());
  } else if (key == "start_method") {
    const std::string method = value.get<std::string>();
    object.facts.start_method = method == "popen"        ? StartMethod::popen
                                : method == "spawn"      ? StartMethod::spawn
                                : method == "fork"       ? StartMethod::fork
                                : method == "forkserver" ? StartMethod::forkserver
                                                         : throw Inexpressible{"start_method_outside_the_enum"};
  } else if (key == "find_unused_parameters") {
    object.facts.find_unused_parameters = value.get<bool>();
  } else if (key == "static_graph") {
    object.options.static_graph = value.get<bool>();
  } else if (key == "bucket_cap_mb") {
    object.options.bucket_cap_mb = value.get<int>();
  } else if (key == "process_group_backend") {
    object.options.backend = value.get<std::string>().c_str();
  } else if (key == "stage") {
    object.facts.stage = value.get<int>();
  } else if (key == "zero_optimization") {
    if (!value.get<bool>()) object.facts.stage = -1;
  } else if (key == "offload_optimizer") {
    object.facts.optimizer_offload = value.get<bool>() ? fabric::Offload::cpu : fabric::Offload::none;
  } else if (key == "cpu_offload") {
    object.facts.parameter_offload = value.get<bool>() ? fabric::Offload::cpu : fabric::Offload::none;
  } else if (key == "sharding_strategy") {
    object.options.sharding = value == "NO_SHARD"       ? fabric::Sharding::none
                              : value == "HYBRID_SHARD" ? fabric::Sharding::hybrid
                                                        : fabric::Sharding::full;
  } else if (key == "state_dict_type") {
    object.options.full_state_dict = value == "full";
  } else if (key == "data_parallel_size") {
    object.options.data_parallel_size = value.get<int>();
  } else if (key == "tensor_parallel_size") {
    object.options.tensor_parallel_size = value.get<int>();
  } else if (key != "parallelize_fn" && key != "device_mesh") {
    throw std::runtime_error("unknown option " + key);
  }
}

inline fabric::StrategyObject strategy_object(const Json& value) {
  const std::string name = class_name(value);
  fabric::StrategyObject object;
  if (name == "DDPStrategy" || name == "DDPSubclass") {
    object.facts = fabric::Ddp::facts;
  } else if (name == "FSDPStrategy" || name == "FSDPSubclass") {
    object.facts = fabric::Fsdp::facts;
  } else if (name == "DataParallelStrategy") {
    object.facts = fabric::DataParallel::facts;
  } else if (name == "DeepSpeedStrategy") {
    object.facts = fabric::DeepSpeed<>::facts;
  } else if (name == "ModelParallelStrategy") {
    object.facts = fabric::ModelParallel::facts;
  } else if (name == "SingleDeviceStrategy") {
    object.facts = fabric::SingleDevice::facts;
  } else if (name == "SingleDeviceXLAStrategy") {
    object.facts = fabric::SingleDeviceXla::facts;
  } else if (name == "XLAStrategy") {
    object.facts = fabric::XlaDdp::facts;
  } else if (name == "XLAFSDPStrategy") {
    object.facts = fabric::XlaFsdp::facts;
  } else {
    throw Inexpressible{"unrelated_object"};
  }
  if (name.ends_with("Subclass")) {
    object.facts.name = name.c_str();
    object.facts.built_in = false;
  }
  for (const auto& [key, option] : kwargs_of(value).items()) read_strategy_options(key, option, object);
  return object;
}

inline fabric::Plugin plugin(const Json& value) {
  if (class_name(value).empty()) throw Inexpressible{"plugin_that_is_no_plugin"};
  if (const auto environment = environment_object(value)) return *environment;
  if (const auto checkpoint = checkpoint_kind(value); checkpoint != fabric::CheckpointKind::none) return checkpoint;
  try {
    return precision_object(value);
  } catch (const Inexpressible& why) {
    if (why.kind == "unrelated_object") throw Inexpressible{"plugin_that_is_no_plugin"};
    throw;
  }
}

inline fabric::DevicesFlag devices_of_connector_row(const Json& value) {
  const auto flag = devices_flag(value);
  if (!flag) throw Inexpressible{"devices_of_python_type"};
  if (empty_tuple(value)) throw Inexpressible{"empty_tuple"};
  return *flag;
}

inline fabric::NumNodesFlag num_nodes_flag(const Json& value) {
  if (value.is_number_integer()) return value.get<int>();
  if (value.is_string()) return std::string_view(value.get_ref<const std::string&>());
  throw Inexpressible{"num_nodes_neither_integer_nor_text"};
}

inline fabric::PrecisionFlag precision_flag(const Json& value) {
  if (value.is_null()) return {};
  if (value.is_number_integer()) return value.get<int>();
  if (value.is_string()) return std::string_view(value.get_ref<const std::string&>());
  throw Inexpressible{"precision_neither_integer_nor_text"};
}

/// The flags that a row's `args` are in C++. Throws `Inexpressible` where they are none.
inline fabric::Flags flags_from(const Json& args) {
  fabric::Flags flags;
  for (const auto& [key, value] : args.items()) {
    if (key == "accelerator") {
      if (value.is_string()) {
        flags.accelerator = std::string_view(value.get_ref<const std::string&>());
      } else {
        flags.accelerator = accelerator_object(value);
      }
    } else if (key == "strategy") {
      if (value.is_string()) {
        flags.strategy = std::string_view(value.get_ref<const std::string&>());
      } else {
        flags.strategy = strategy_object(value);
      }
    } else if (key == "devices") {
      flags.devices = devices_of_connector_row(value);
    } else if (key == "num_nodes") {
      flags.num_nodes = num_nodes_flag(value);
    } else if (key == "precision") {
      flags.precision = precision_flag(value);
    } else if (key == "plugins" && !value.is_null()) {
      if (value.is_object() && value.contains("class")) {
        flags.plugins.add(plugin(value));
      } else {
        const bool tuple = value.is_object() && value.contains("tuple");
        if (!value.is_array() && !tuple) throw Inexpressible{"plugin_that_is_no_plugin"};
        for (const Json& item : tuple ? value["tuple"] : value) flags.plugins.add(plugin(item));
      }
    }
  }
  return flags;
}

}  // namespace oracle
