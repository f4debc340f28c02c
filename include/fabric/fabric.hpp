// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything, in the order in which a reader may want to read it.

#include "fabric/config.hpp"  // policies, rules, the connector: free of LibTorch

#include "fabric/core.hpp"  // class Fabric

#include "fabric/strategy/ddp.hpp"  // what the policies do
#include "fabric/strategy/single_device.hpp"

#include "fabric/precision/mixed_precision.hpp"
#include "fabric/precision/true_precision.hpp"

#include "fabric/optim/adagrad.hpp"  // optimizers on fused kernels
#include "fabric/optim/adam.hpp"
#include "fabric/optim/sgd.hpp"

#include "fabric/dispatch.hpp"  // from strings to one of the types that the program has

#include "fabric/loggers/csv_logger.hpp"
#include "fabric/random.hpp"
#include "fabric/version.hpp"
