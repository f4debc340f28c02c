// SPDX-License-Identifier: Apache-2.0
//
// Clipping against LibTorch's own functions, and against Python's: tests/reference/optimizers.py.
#include <cmath>
#include <limits>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"
#include "support/reference.hpp"

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

TEST_CASE("[issue-5.4] clipping gives the gradients and the norm of Python's foreach functions") {
  using namespace fabric::tests;
  const Json reference = read_reference("optimizers.json.gz");
  int cases = 0;
  for (const Json& expected : reference["clipping"]) {
    INFO(expected["by"] << " " << expected["bound"] << " of order " << expected["norm_type"]);
    NamedParameters named;
    for (const at::Tensor& gradient : tensors_of(expected["before"])) {
      const auto like = gradient.defined() ? gradient : at::zeros({});
      named.emplace_back("parameter", at::zeros_like(like).requires_grad_());
      named.back().second.mutable_grad() = gradient;
    }
    const double bound = expected["bound"];
    if (expected["by"] == "value") {
      clip_gradients(named, ClipValue{bound});
    } else {
      const ClipNorm clip{bound, std::stod(expected["norm_type"].get<std::string>()), false};
      CHECK(ulps_between(clip_gradients(named, clip), tensor_of(expected["norm"])) <= 1);
    }
    for (std::size_t i = 0; i < named.size(); ++i) {
      CHECK(ulps_between(named[i].second.grad(), tensor_of(expected["after"][i])) <= 1);
    }
    ++cases;
  }
  CHECK(cases == 43);
}

TEST_CASE("[issue-5.4] gradients of several dtypes are clipped together, and each parameter counts once") {
  torch::nn::Linear net(2, 2);
  net->register_parameter("again", net->weight);
  net->bias.set_data(net->bias.detach().to(at::kDouble));
  net->weight.mutable_grad() = at::full({2, 2}, 1.5);
  net->bias.mutable_grad() = at::full({2}, 2.0, at::kDouble);
  const at::Tensor norm = clip_gradients(*net, ClipNorm{1.0});
  CHECK(norm.item<double>() == Approx(std::sqrt(4 * 1.5 * 1.5 + 2 * 4.0)));
  CHECK(net->weight.grad()[0][0].item<double>() == Approx(1.5 / norm.item<double>()));
  CHECK(net->bias.grad()[1].item<double>() == Approx(2.0 / norm.item<double>()));
}

TEST_CASE("[issue-5.4] the first parameter at fault is named, and how many more there are") {
  Twins twins;
  auto parameters = twins.ours->parameters();
  parameters[1].mutable_grad()[0] = std::nan("");
  parameters[2].mutable_grad()[0] = infinity;
  CHECK_THROWS_WITH(clip_gradients(*twins.ours, ClipNorm{1.0}), ContainsSubstring("0.bias and 1 more"));
  const torch::optim::SGD optimizer(parameters, 0.1);
  CHECK_THROWS_WITH(clip_gradients(optimizer, ClipNorm{1.0}), ContainsSubstring("parameter 1 and 1 more"));
}

TEST_CASE("[issue-5.4] bounds and orders that make no sense are refused") {
  const Twins twins;
  for (const double order : {0.0, -1.0, -infinity, std::nan("")}) {
    CHECK_THROWS_WITH(clip_gradients(*twins.ours, ClipNorm{1.0, order}), ContainsSubstring("norm_type is"));
  }
  CHECK_THROWS_WITH(clip_gradients(*twins.ours, ClipNorm{-1.0}), ContainsSubstring("max_norm is -1"));
  CHECK_THROWS_WITH(clip_gradients(*twins.ours, ClipValue{std::nan("")}), ContainsSubstring("max_value is"));
  CHECK(twins.equal_gradients());
}

TEST_CASE("[issue-5.4] gradients in shards are clipped as the whole, by what the ranks' parts come to together") {
  for (const double order : {2.0, 1.0, 3.0, 0.5, infinity}) {
    INFO("order " << order);
    const Twins twins;
    const double whole = clip_gradients(*twins.theirs, ClipNorm{0.25, order}).item<double>();
    // The two layers stand for two ranks. The other's part is what it would send.
    const auto norm_of = [&](std::size_t rank) {
      return clip_gradients(*twins.ours->ptr(rank), ClipNorm{1e9, order}).to(at::kDouble);
    };
    const at::Tensor norms[] = {norm_of(0), norm_of(1)};
    for (const std::size_t rank : {0U, 1U}) {
      const at::Tensor& other = norms[1 - rank];
      const auto over_ranks = [&](const at::Tensor& own) {
        CHECK(own.scalar_type() == at::kDouble);
        return std::isinf(order) ? at::max(own, other) : own + other.pow(order);
      };
      CHECK(clip_gradients(*twins.ours->ptr(rank), ClipNorm{0.25, order}, over_ranks).item<double>() ==
            Approx(whole).epsilon(1e-6));
    }
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(twins.ours->parameters()[i].grad().allclose(twins.theirs->parameters()[i].grad(), 1e-5, 1e-7));
    }
  }
}

TEST_CASE("[issue-5.4] a rank that holds no gradient of its own learns the norm all the same") {
  const torch::nn::Linear net(2, 2);
  const auto over_ranks = [](const at::Tensor& own) { return own + 9; };
  CHECK(clip_gradients(*net, ClipNorm{1.0}, over_ranks).item<double>() == 3);
}
