// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fabric/connector/devices.hpp"
#include "oracle/row_host.hpp"

namespace oracle {

/// A problem's names, one a line, as the rows list them.
inline Json names_of(std::string_view lines) {
  Json names = Json::array();
  while (!lines.empty()) {
    const std::size_t end = lines.find('\n');
    names.push_back(std::string(lines.substr(0, end)));
    lines.remove_prefix(end == std::string_view::npos ? lines.size() : end + 1);
  }
  return names;
}

/// A row's `devices` value as the flag; nothing when no C++ value is like it.
inline std::optional<fabric::DevicesFlag> devices_flag(const Json& value) {
  const auto list = [](const Json& items) -> std::optional<fabric::DevicesFlag> {
    std::vector<int> indices;
    for (const Json& item : items) {
      if (!item.is_number_integer()) return {};
      indices.push_back(item);
    }
    return fabric::DevicesFlag::list(indices.data(), indices.size());
  };
  if (value.is_null()) return fabric::DevicesFlag(nullptr);
  if (value.is_boolean()) return fabric::DevicesFlag(value.get<bool>());
  if (value.is_number_integer()) return fabric::DevicesFlag(value.get<int>());
  if (value.is_string()) return fabric::DevicesFlag(std::string_view(value.get_ref<const std::string&>()));
  if (value.is_array()) return list(value);
  if (value.is_object() && value.contains("tuple")) return list(value["tuple"]);
  return {};
}

/// What only Python can pass as `devices`: a float, an unrelated object, a list whose elements are not all integers.
inline bool devices_of_python_type(const Json& value) { return !devices_flag(value); }

/// Python tells an empty tuple from an empty list.
inline bool empty_tuple(const Json& value) {
  return value.is_object() && value.contains("tuple") && value["tuple"].empty();
}

/// Under torchrun with one visible GPU of that kind, the reference checks no index.
inline bool one_gpu_under_torchrun(const Json& row, const Json& accelerator) {
  const Json& host = row["host"];
  const bool one = accelerator == "mps" ? host.value("mps", false) : host.value("cuda", 0) == 1;
  return one && row["env"].contains("TORCHELASTIC_RUN_ID");
}

/// The kind of difference that a devices row shows (docs/differences.md), or nothing.
inline std::string_view devices_difference(const Json& row) {
  if (!row.contains("devices")) return {};
  const Json& value = row["devices"];
  if (devices_of_python_type(value)) return "devices_of_python_type";
  if (empty_tuple(value) && row["accelerator"] != "cpu" && row["accelerator"] != "tpu") return "empty_tuple";
  if (!one_gpu_under_torchrun(row, row["accelerator"])) return {};
  const std::optional<fabric::DevicesFlag> flag = devices_flag(value);
  const fabric::Expected<fabric::detail::AskedDevices> asked =
      fabric::detail::asked_gpus(*flag, fabric::DeviceType::cuda);
  if (!asked) return {};
  for (int i = 0; i < asked->indices.count && asked->indices.count > 1; ++i) {
    if (asked->indices[i] < 0) return "negative_index_unchecked";
  }
  if (!asked->is_list && asked->number > 128) return "device_index_wraps";
  return {};
}

/// A list as Python shows a tuple.
inline std::string as_tuple(std::string list) {
  list.front() = '(';
  list.back() = ')';
  if (list.size() > 2 && list.find(',') == std::string::npos) list.insert(list.size() - 1, ",");
  return list;
}

/// The outcome of a devices row.
inline Json devices_answer(const Json& row) {
  const RowHost at(row);
  const std::string accelerator = row["accelerator"];
  const fabric::DeviceType type = accelerator == "cuda"  ? fabric::DeviceType::cuda
                                  : accelerator == "mps" ? fabric::DeviceType::mps
                                  : accelerator == "tpu" ? fabric::DeviceType::xla
                                                         : fabric::DeviceType::cpu;
  if (row.contains("query")) {
    const int count = fabric::auto_device_count(type, at.host());
    return {{"ok", true}, {"parsed", count}, {"available", count > 0}};
  }
  const std::optional<fabric::DevicesFlag> flag = devices_flag(row["devices"]);
  if (!flag) return {{"ok", false}, {"code", "not_representable"}};
  const fabric::Expected<fabric::DeviceList> parsed = fabric::parse_devices(*flag, type, at.host(), at.variables());
  if (!parsed) {
    const fabric::Problem& problem = parsed.problem;
    // "No GPUs" is a value there, which fails when it is used.
    const bool mps_none = type == fabric::DeviceType::mps && problem.code == fabric::Code::device_ids_type &&
                          problem.names == "None" && flag->form != fabric::DevicesFlag::Form::null;
    if (mps_none || problem.code == fabric::Code::gpu_devices_resolved_to_none) {
      Json error{{"error", std::string(fabric::name_of(problem.code))}};
      if (mps_none) error["names"] = names_of(problem.names);
      return {{"ok", true}, {"parsed", nullptr}, {"type", "NoneType"}, {"parallel", error}};
    }
    Json names = names_of(problem.names);
    const bool named =
        problem.code == fabric::Code::gpu_not_on_machine || problem.code == fabric::Code::devices_text_not_int ||
        problem.code == fabric::Code::tpu_devices_invalid || problem.code == fabric::Code::tpu_devices_text_invalid ||
        problem.code == fabric::Code::device_ids_type || problem.code == fabric::Code::cpu_devices_odd_digit;
    if (problem.code == fabric::Code::tpu_devices_invalid && row["devices"].is_object()) names[1] = as_tuple(names[1]);
    return {
        {"ok", false}, {"code", std::string(fabric::name_of(problem.code))}, {"names", named ? names : Json::array()}};
  }

  const fabric::DeviceList& list = *parsed;
  Json outcome{{"ok", true}};
  Json indices = Json::array();
  for (int i = 0; i < list.count; ++i) indices.push_back(list[i]);
  const bool gpu = type == fabric::DeviceType::cuda || type == fabric::DeviceType::mps;
  if (gpu || list.listed) {
    outcome["parsed"] = indices;
    outcome["type"] = !gpu && row["devices"].is_object() ? "tuple" : "list";
  } else {
    const bool boolean = flag->form == fabric::DevicesFlag::Form::boolean;
    outcome["parsed"] = boolean ? Json(list.count == 1) : Json(list.count);
    outcome["type"] = boolean ? "bool" : "int";
  }
  Json parallel = Json::array();
  for (int i = 0; i < list.count; ++i) {
    if (type == fabric::DeviceType::cpu) parallel.push_back("cpu");
    if (type == fabric::DeviceType::cuda) parallel.push_back("cuda:" + std::to_string(list[i]));
    if (type == fabric::DeviceType::mps)
      parallel.push_back("mps:" + std::to_string(i));  // there is one: indices do not count
    if (type == fabric::DeviceType::xla) parallel.push_back("xla:" + std::to_string(list[i]));
  }
  if (type == fabric::DeviceType::cpu && list.count > 16) parallel = {{"repeat", "cpu"}, {"n", list.count}};
  outcome["parallel"] = parallel;
  return outcome;
}

}  // namespace oracle
