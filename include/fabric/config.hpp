// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything that needs no LibTorch: policies, their rules, and the connector from flags to a selection.

#include "fabric/connector/fabric_t.hpp"
#include "fabric/connector/resolve.hpp"
#include "fabric/policy/diagnose.hpp"
#include "fabric/policy/registry.hpp"
#include "fabric/policy/rules.hpp"
#include "fabric/policy/strategy_precision.hpp"
