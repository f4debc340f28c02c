// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <string>

#include <c10/util/Exception.h>

namespace fabric::detail {

/// What an exception says, without LibTorch's stack trace.
inline std::string reason_of(const std::exception& error) {
  const auto* known = dynamic_cast<const c10::Error*>(&error);
  return known != nullptr ? known->what_without_backtrace() : error.what();
}

}  // namespace fabric::detail
