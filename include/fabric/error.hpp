// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

namespace fabric {

/// What the library throws: flags that cannot be resolved, a call at the wrong time, gradients that must not be used.
/// The message says what was given, what is legal and how to fix it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace fabric
