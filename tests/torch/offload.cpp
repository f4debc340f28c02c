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
  struct Trained {
    std::vector<at::Tensor> parameters{};
    std::vector<std::vector<at::Tensor>> states{};  ///< What the optimizer keeps of each parameter.
  };
  const auto train = [](auto& fabric, const auto& after_step) {
    Trained trained;
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(batch(step)).pow(2).mean());
      optimizer.step();
      after_step(*net);
    }
    for (const at::Tensor& parameter : optimizer->param_groups().front().params()) {
      auto& tensors = trained.states.emplace_back();
      optim::each_state_tensor(*optimizer->state().at(parameter.unsafeGetTensorImpl()),
                               [&](const at::Tensor& tensor) { tensors.push_back(tensor.flatten().clone()); });
    }
    const auto keep = [&, &net = net] {
      for (const at::Tensor& parameter : net->parameters()) trained.parameters.push_back(parameter.detach().clone());
    };
    const auto state = model.state();
    if constexpr (requires { state->with_full_parameters(keep); }) {
      state->with_full_parameters(keep);
    } else {
      keep();
    }
    return trained;
  };
  Fabric<Cpu, SingleDevice, F32> whole;
  const Trained expected = train(whole, [](const auto&) {});
  const bool past_cache = GENERATE(false, true);
  const Units units = GENERATE(Units::by_type<Part>(), Units::by_size(1 << 20));  // five, and one with all
  Fabric<Cpu, DeepSpeed<3, Offload::nvme>, F32> fabric(
      {.devices = 1, .strategy = {.units = units, .nvme_path = "/tmp", .nvme_direct = past_cache}});
  fabric.launch();
  const Trained ours = train(fabric, [](const auto& net) {
    for (const auto& parameter : net.parameters()) REQUIRE(parameter.storage().nbytes() == 0);
  });
  REQUIRE(ours.parameters.size() == expected.parameters.size());
  for (std::size_t i = 0; i < ours.parameters.size(); ++i) {
    REQUIRE(at::allclose(ours.parameters[i], expected.parameters[i], 1e-6, 1e-7));
    REQUIRE(ours.states[i].size() == 2);
    for (std::size_t k = 0; k < 2; ++k) {
      REQUIRE(at::allclose(ours.states[i][k], expected.states[i][k], 1e-6, 1e-9));
    }
  }
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
