// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>
#include <vector>

#include "fabric/shard/flat_unit.hpp"

namespace fabric::detail {

/// In which order units are used, as it was seen the last time.
class UnitOrder {
 public:
  /// The next pass begins.
  void begin() {
    if (!seen_.empty()) known_ = std::exchange(seen_, {});
    seen_.clear();
  }
  /// Notes a use; returns the unit that came next the last time, or null.
  FlatUnit* used(FlatUnit& unit) {
    seen_.push_back(&unit);
    const bool as_known = seen_.size() < known_.size() && known_[seen_.size() - 1] == &unit;
    return as_known ? known_[seen_.size()] : nullptr;
  }

 private:
  std::vector<FlatUnit*> known_;
  std::vector<FlatUnit*> seen_;
};

}  // namespace fabric::detail
