// SPDX-License-Identifier: Apache-2.0
// labels: torch sharding
//
// Offload where there is nobody to divide anything with.
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#include "support/catch.hpp"
#include "support/parts.hpp"

namespace {

using namespace fabric;

using tests::make_net;
using tests::Net;
using tests::Part;

at::Tensor batch(int step) {
  torch::manual_seed(static_cast<std::uint64_t>(100 * step));
  return torch::randn({4, 8});
}

}  // namespace

TEST_CASE("[issue-8.4] one process alone offloads parameters and optimizer state to files") {
  Fabric<Cpu, SingleDevice, F32> whole;
  const auto expected = [&] {
    Net net = make_net();
    auto [model, optimizer] = whole.setup(net, optim::AdamW(net->parameters(), 0.01));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      whole.backward(model(batch(step)).pow(2).mean());
      optimizer.step();
    }
    return net->parameters();
  }();
  const bool past_cache = GENERATE(false, true);
  Fabric<Cpu, DeepSpeed<3, Offload::nvme>, F32> fabric(
      {.devices = 1, .strategy = {.units = Units::by_type<Part>(), .nvme_path = "/tmp", .nvme_direct = past_cache}});
  fabric.launch();
  Net net = make_net();
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    fabric.backward(model(batch(step)).pow(2).mean());
    optimizer.step();
    for (const auto& parameter : net->parameters()) REQUIRE(parameter.storage().nbytes() == 0);
  }
  model.state()->with_full_parameters([&] {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      REQUIRE(at::allclose(net->parameters()[i], expected[i], 1e-6, 1e-7));
    }
  });
}

TEST_CASE("[issue-8.4] in files too, two optimizers share a module, a part is frozen, and masters may be looked at") {
  const auto train = [](auto& fabric) {
    Net net = make_net();
    for (at::Tensor& parameter : net->part(2).parameters()) parameter.requires_grad_(false);
    std::vector<at::Tensor> front;
    std::vector<at::Tensor> back;
    for (std::size_t i = 0; i < 5; ++i) {
      if (i == 2) continue;
      for (const at::Tensor& parameter : net->part(i).parameters()) (i < 2 ? front : back).push_back(parameter);
    }
    auto [model, first, second] = fabric.setup(net, optim::AdamW(front, 0.01), optim::AdamW(back, 0.01));
    for (int step = 0; step < 4; ++step) {
      first.zero_grad();
      second.zero_grad();
      fabric.backward(model(batch(step)).pow(2).mean());
      second.step();
      if (step % 2 == 0) first.step();
    }
    return std::pair(net, model);
  };
  Fabric<Cpu, SingleDevice, F32> whole;
  const auto expected = train(whole).first->named_parameters();
  const bool past_cache = GENERATE(false, true);
  Fabric<Cpu, DeepSpeed<3, Offload::nvme>, F32> fabric(
      {.devices = 1, .strategy = {.units = Units::by_type<Part>(), .nvme_path = "/tmp", .nvme_direct = past_cache}});
  fabric.launch();
  const auto [net, model] = train(fabric);
  for (const auto& [name, master] : model.state()->masters()) {
    INFO(name);
    REQUIRE(at::allclose(master.detach(), expected[name].detach().reshape({-1}), 1e-6, 1e-7));
  }
}
