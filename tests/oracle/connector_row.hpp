// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/config.hpp"
#include "oracle/connector_flags.hpp"
#include "oracle/connector_outcome.hpp"
#include "oracle/differences.hpp"
#include "oracle/row_host.hpp"

namespace oracle {

/// The answer to a row of connector.jsonl: an outcome, and the kind of difference where the row is of a listed one.
inline Json answer_connector_row(const Json& row) {
  const Json args = row.value("args", Json::object());
  const RowHost on(row);
  Json answer{{"id", row.value("id", Json())}};
  try {
    const fabric::Flags flags = flags_from(args);
    const fabric::Resolution resolution = fabric::resolve(flags, on.variables(), on.host());
    const Json devices = on.variables().has("LT_DEVICES") ? Json() : args.value("devices", Json());
    answer["outcome"] = outcome_of(resolution, flags, on.host(), on.variables(), devices);
    if (const std::string kind = difference_of(flags, on.variables(), on.host()); !kind.empty())
      answer["differs"] = kind;
  } catch (const Inexpressible& why) {
    answer["outcome"] = Json{{"ok", false}, {"code", "not_expressible"}};
    answer["differs"] = why.kind;
  }
  return answer;
}

}  // namespace oracle
