// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "fabric/comm/subgroup.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// The world as a grid of data x tensor, as one rank sees it. Ranks of one tensor group follow one another, since they
/// communicate most and so should be on one host: with 2 x 4, they are 0 to 3 and 4 to 7.
struct DeviceMesh {
  World data;    ///< The ranks that hold the same slices of a model, and see other batches. `tensor`'s place is theirs.
  World tensor;  ///< The ranks that each hold slices of one model, and see the same batches.
};

/// Lays the world out as a mesh. All ranks call this, in the same order as their other groups. Throws fabric::Error if
/// `tensor_size` does not divide the world's size.
[[nodiscard]] inline DeviceMesh make_mesh(const World& world, int tensor_size, const std::string& name = "mesh") {
  if (tensor_size < 1 || world.size % tensor_size != 0) {
    std::string legal;
    for (int size = 1; size <= world.size; ++size) {
      if (world.size % size == 0) legal += (legal.empty() ? "" : ", ") + std::to_string(size);
    }
    throw Error("fabric: make_mesh '" + name + "': tensor groups of " + std::to_string(tensor_size) +
                " do not divide the world of " + std::to_string(world.size) + "; legal are " + legal);
  }
  std::vector<int> data;
  std::vector<int> tensor;
  for (int rank = 0; rank < world.size; ++rank) {
    if (rank % tensor_size == world.global_rank % tensor_size) data.push_back(rank);
    if (rank / tensor_size == world.global_rank / tensor_size) tensor.push_back(rank);
  }
  return {world_of(world, make_subgroup(world, data, name + "/data")),
          world_of(world, make_subgroup(world, tensor, name + "/tensor"))};
}

}  // namespace fabric
