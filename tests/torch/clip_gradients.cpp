// SPDX-License-Identifier: Apache-2.0
//
// Clipping against LibTorch's own functions.
#include <cmath>
#include <limits>
#include <vector>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A module, and a copy with the same gradients. The last bias has none.
struct Twins {
  torch::nn::Sequential ours{torch::nn::Linear(4, 3), torch::nn::Linear(3, 2)};
  torch::nn::Sequential theirs{torch::nn::Linear(4, 3), torch::nn::Linear(3, 2)};

  Twins() {
    torch::manual_seed(3);
    const auto a = ours->parameters();
    const auto b = theirs->parameters();
    for (std::size_t i = 0; i + 1 < a.size(); ++i) {
      a[i].mutable_grad() = torch::randn_like(a[i]) * 5;
      b[i].mutable_grad() = a[i].grad().clone();
    }
  }
  [[nodiscard]] bool equal_gradients() const {
    const auto a = ours->parameters();
    const auto b = theirs->parameters();
    for (std::size_t i = 0; i + 1 < a.size(); ++i) {
      if (!a[i].grad().equal(b[i].grad())) return false;
    }
    return !a.back().grad().defined();
  }
};

}  // namespace

TEST_CASE("[issue-3.6] clipping by norm is LibTorch's clip_grad_norm_ and returns the norm from before") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  for (const double max_norm : {1.0, 1000.0}) {
    for (const double norm_type : {2.0, 1.0, 3.0, infinity}) {
      INFO(max_norm << " " << norm_type);
      Twins twins;
      auto model = fabric.setup(twins.ours);
      const auto norm = fabric.clip_gradients(model, ClipNorm{.max_norm = max_norm, .norm_type = norm_type});
      const double expected = torch::nn::utils::clip_grad_norm_(twins.theirs->parameters(), max_norm, norm_type);
      CHECK(norm.dim() == 0);
      CHECK(norm.item<double>() == Approx(expected).epsilon(1e-6));
      CHECK(twins.equal_gradients());
    }
  }
}

TEST_CASE("[issue-3.6] clipping by value is LibTorch's clip_grad_value_") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  Twins twins;
  auto model = fabric.setup(twins.ours);
  fabric.clip_gradients(model, ClipValue{2.5});
  torch::nn::utils::clip_grad_value_(twins.theirs->parameters(), 2.5);
  CHECK(twins.equal_gradients());
  CHECK(twins.ours->parameters()[0].grad().abs().max().item<double>() == 2.5);
}

TEST_CASE("[issue-3.6] an optimizer's parameters alone can be clipped") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  Twins twins;
  const auto first = std::vector{twins.ours->parameters()[0]};
  auto [model, optimizer] = fabric.setup(twins.ours, torch::optim::SGD(first, 0.1));
  fabric.clip_gradients(optimizer, ClipNorm{0.5});
  torch::nn::utils::clip_grad_norm_(std::vector{twins.theirs->parameters()[0]}, 0.5);
  CHECK(twins.equal_gradients());
}

TEST_CASE("[issue-3.6] gradients that are not finite are refused by name and stay as they were") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  for (const double bad : {std::nan(""), infinity}) {
    Twins twins;
    auto model = fabric.setup(twins.ours);
    twins.ours->parameters()[1].mutable_grad()[0] = bad;
    const auto before = twins.ours->parameters()[0].grad().clone();
    CHECK_THROWS_WITH(fabric.clip_gradients(model, ClipNorm{1.0}), ContainsSubstring("0.bias") &&
                                                                       !ContainsSubstring("0.weight") &&
                                                                       ContainsSubstring("error_if_nonfinite"));
    CHECK(twins.ours->parameters()[0].grad().equal(before));
  }
}

TEST_CASE("[issue-3.6] error_if_nonfinite = false clips all the same, as LibTorch does") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  Twins twins;
  auto model = fabric.setup(twins.ours);
  twins.ours->parameters()[1].mutable_grad()[0] = infinity;
  const auto norm = fabric.clip_gradients(model, ClipNorm{.max_norm = 1.0, .error_if_nonfinite = false});
  CHECK(norm.item<double>() == infinity);
  CHECK(twins.ours->parameters()[0].grad().abs().max().item<double>() == 0);
}

TEST_CASE("[issue-3.6] the norm of no gradients is zero") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  auto model = fabric.setup(torch::nn::Linear(2, 2));
  CHECK(fabric.clip_gradients(model, ClipNorm{1.0}).item<double>() == 0);
}
