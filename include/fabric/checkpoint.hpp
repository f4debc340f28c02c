// SPDX-License-Identifier: Apache-2.0
#pragma once

// Saving and loading: what `Fabric::save` and `load` need, and what goes with them. See docs/checkpoints.md.

#include "fabric/checkpoint/checkpoints.hpp"  // a folder of them: the newest stay, `latest`, in the background
#include "fabric/checkpoint/distributed_checkpoint.hpp"  // folders that all ranks write, for sharded models
#include "fabric/checkpoint/loader_state.hpp"            // where a data loader is
#include "fabric/checkpoint/per_rank.hpp"                // what differs by rank
#include "fabric/checkpoint/random_state.hpp"            // random numbers of all ranks
#include "fabric/checkpoint/safetensors_file.hpp"        // the formats
#include "fabric/checkpoint/save_load.hpp"               // what Fabric::save and load do
#include "fabric/checkpoint/state.hpp"                   // what can be saved
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
