// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fabric {

/// Names and values, in order.
using Metrics = std::vector<std::pair<std::string, double>>;

/// Where `log` and `log_dict` write. Only global rank 0 calls it.
class Logger {
 public:
  virtual ~Logger() = default;
  /// One row of metrics, at `step` if the caller counts steps.
  virtual void log_metrics(const Metrics& metrics, std::optional<std::int64_t> step) = 0;
};

}  // namespace fabric
