// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "oracle/connector_row.hpp"
#include "oracle/devices_row.hpp"
#include "oracle/environment_row.hpp"

namespace oracle {

/// The reference's exception for a code by name.
inline std::string error_type_of(const std::string& name) {
  for (std::size_t i = 0; i < fabric::detail::code_names.size(); ++i) {
    if (fabric::detail::code_names[i] == name) return error_type(static_cast<fabric::Code>(i));
  }
  return "ValueError";
}

/// The answer to a row of any of the tables: its id where it has one, an outcome in the row's schema, and the kind of
/// difference where the row is of a listed one.
inline Json answer(const Json& row) {
  if (row.contains("args")) return answer_connector_row(row);
  Json result = Json::object();
  if (row.contains("id")) result["id"] = row["id"];
  std::string kind;
  if (row.contains("accelerator")) {
    result["outcome"] = devices_answer(row);
    kind = devices_difference(row);
  } else if (row.contains("class")) {
    result["outcome"] = environment_answer(row);
    kind = environment_difference(row);
  } else {
    result["outcome"] = {{"ok", false}, {"code", "not_replayed_here"}};
  }
  Json& outcome = result["outcome"];
  if (outcome.contains("code")) outcome["error_type"] = error_type_of(outcome["code"]);
  if (outcome.contains("construct") && outcome["construct"].is_object()) {
    outcome["construct"]["error_type"] = error_type_of(outcome["construct"]["error"]);
  }
  if (!kind.empty()) result["differs"] = kind;
  return result;
}

}  // namespace oracle
