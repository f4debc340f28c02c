// SPDX-License-Identifier: Apache-2.0
//
// The fused optimizers on a GPU, beside the CPU's.
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using Optimizer = std::unique_ptr<torch::optim::Optimizer>;
using Make = std::function<Optimizer(const std::vector<at::Tensor>&)>;

const std::vector<std::pair<std::string, Make>> optimizers{
    {"AdamW",
     [](const auto& all) -> Optimizer { return std::make_unique<optim::AdamW>(all, optim::AdamWOptions(0.01)); }},
    {"Adam with amsgrad",
     [](const auto& all) -> Optimizer {
       return std::make_unique<optim::Adam>(all, optim::AdamOptions(0.01).amsgrad(true));
     }},
    {"SGD with Nesterov's momentum",
     [](const auto& all) -> Optimizer {
       return std::make_unique<optim::SGD>(all, optim::SGDOptions(0.1).momentum(0.9).nesterov(true));
     }},
    {"Adagrad",
     [](const auto& all) -> Optimizer { return std::make_unique<optim::Adagrad>(all, optim::AdagradOptions(0.1)); }}};

/// Parameters after ten steps with the same gradients.
std::vector<at::Tensor> stepped(const Make& make, at::Device device, at::ScalarType dtype) {
  std::vector<at::Tensor> parameters;
  torch::manual_seed(3);
  for (const std::int64_t size : {1, 7, 1000, 70000}) {
    parameters.push_back(torch::randn({size}, at::kDouble).to(device, dtype).requires_grad_());
  }
  const Optimizer optimizer = make(parameters);
  for (int step = 0; step < 10; ++step) {
    for (at::Tensor& parameter : parameters) {
      parameter.mutable_grad() = torch::randn(parameter.sizes(), at::kDouble).to(device, dtype);
    }
    optimizer->step();
  }
  std::vector<at::Tensor> results;
  for (const at::Tensor& parameter : parameters) results.push_back(parameter.detach().cpu());
  return results;
}

}  // namespace

TEST_CASE("[issue-5.3] the fused kernels of the GPU and of the CPU agree") {
  for (const auto& [name, make] : optimizers) {
    for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-13}, std::pair{at::kFloat, 2e-6}}) {
      INFO(name << ' ' << dtype);
      const auto on_cpu = stepped(make, at::kCPU, dtype);
      const auto on_gpu = stepped(make, at::Device(at::kCUDA, 0), dtype);
      for (std::size_t i = 0; i < on_cpu.size(); ++i) {
        CHECK(at::allclose(on_gpu[i], on_cpu[i], tolerance, tolerance));
      }
    }
  }
}

TEST_CASE("[issue-5.4] clipping gives the CPU's norm and gradients, of several dtypes at once") {
  const auto clipped = [](at::Device device) {
    torch::manual_seed(4);
    std::vector<at::Tensor> all;
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      all.push_back(torch::zeros({300}, dtype).to(device).requires_grad_());
      all.back().mutable_grad() = torch::randn({300}, at::kDouble).to(device, dtype);
    }
    torch::optim::SGD sgd(all, 0.1);
    const at::Tensor norm = clip_gradients(sgd, ClipNorm{0.5});
    return std::pair(norm.cpu().to(at::kDouble), all[0].grad().cpu());
  };
  const auto [cpu_norm, cpu_gradient] = clipped(at::kCPU);
  const auto [gpu_norm, gpu_gradient] = clipped(at::Device(at::kCUDA, 0));
  REQUIRE(at::allclose(gpu_norm, cpu_norm, 1e-6, 0));
  REQUIRE(at::allclose(gpu_gradient, cpu_gradient, 1e-5, 1e-8));
}
