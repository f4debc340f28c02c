// SPDX-License-Identifier: Apache-2.0
//
// What all entries share, so that each compiles no more than what its combination changes.

#include <fabric/separate_source.hpp>
#include <torch/torch.h>

#include "measure.hpp"

torch::nn::Sequential make_mlp(const Settings& settings) {
  torch::nn::Sequential mlp;
  for (int i = 0; i < settings.layers; ++i) {
    mlp->push_back(torch::nn::Linear(settings.width, settings.width));
    mlp->push_back(torch::nn::ReLU());
  }
  return mlp;
}
