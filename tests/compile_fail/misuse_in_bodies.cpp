// SPDX-License-Identifier: Apache-2.0
//
// Mistakes with Fabric that are found in bodies which compilers look at last, and clang not at all after other errors.
// needs: torch
// expect: an optimizer that evaluates the loss itself would use scaled gradients: use BF16Mixed or F32
// expect: save and load need #include .*fabric/checkpoint.hpp
#include <torch/torch.h>

#include <fabric/fabric.hpp>

struct Scaled {
  static constexpr fabric::PrecisionFacts facts{.name = "Scaled", .flag = "", .compute = fabric::Scalar::f16};
};
template <>
class fabric::PrecisionPlugin<Scaled> : public fabric::detail::MixedPrecision<at::kHalf> {};

using OnCpu = fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::F32>;

#ifdef FABRIC_TWIN
void use(OnCpu& fabric, torch::nn::Linear& net) {
  fabric.setup(torch::optim::LBFGS(net->parameters())).step([] { return at::Tensor(); });
}
#else
void use(OnCpu& fabric, torch::nn::Linear& net) {
  fabric::Fabric<fabric::Cpu, fabric::SingleDevice, Scaled> scaled;
  scaled.setup(torch::optim::LBFGS(net->parameters())).step([] { return at::Tensor(); });
  fabric.save("x.pt", 1);
}
#endif
