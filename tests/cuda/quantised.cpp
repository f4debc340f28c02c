// SPDX-License-Identifier: Apache-2.0
//
// FP8 on tensor cores, beside its emulation; bitsandbytes' layers on a GPU, beside the CPU's.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/cuda/CUDAContext.h>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "fabric/precision/bitsandbytes.hpp"
#include "fabric/precision/transformer_engine.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using Mode = BitsandbytesMode;

const at::Device gpu(at::kCUDA, 0);

template <Mode mode>
struct Is {
  static constexpr Mode value = mode;
};

/// Does the GPU multiply FP8 numbers? Those of Ada, Hopper and later do.
bool has_fp8() {
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  return properties->major > 8 || (properties->major == 8 && properties->minor == 9);
}

}  // namespace

TEST_CASE("[issue-5.5] products on tensor cores are those of the emulation") {
  if (!has_fp8()) return;
  torch::manual_seed(0);
  for (const auto& [a_type, b_type] :
       {std::pair{at::kFloat8_e4m3fn, at::kFloat8_e4m3fn}, std::pair{at::kFloat8_e5m2, at::kFloat8_e4m3fn}}) {
    for (const auto& [m, n, k] : {std::tuple{7L, 24L, 40L}, std::tuple{128L, 256L, 512L}}) {
      const at::Tensor a = torch::randn({m, k}).to(a_type).to(gpu);
      const at::Tensor b = torch::randn({n, k}).to(b_type).to(gpu);
      const at::Tensor bias = torch::randn({n}).to(gpu, at::kBFloat16);
      const at::Tensor inverse_a = torch::full({}, 0.25F, gpu);
      const at::Tensor inverse_b = torch::full({}, 0.3F, gpu);
      for (const std::optional<at::Tensor>& added : {std::optional<at::Tensor>{}, std::optional{bias}}) {
        for (const bool fast : {false, true}) {
          const auto product = [&](fp8::Kernel kernel) {
            return fp8::product(a, b, inverse_a, inverse_b, added, at::kBFloat16, fast, kernel).to(at::kFloat);
          };
          const at::Tensor exact = product(fp8::Kernel::emulation);
          const double bound = exact.abs().max().item<double>() * (fast ? 4e-3 : 1e-3);
          CHECK(at::allclose(product(fp8::Kernel::scaled_mm), exact, 8e-3, bound));
        }
      }
    }
  }
}

TEST_CASE("[issue-5.5] a network learns in FP8 on tensor cores as in its emulation on the CPU") {
  if (!has_fp8()) return;
  const auto train = [](auto& fabric) {
    torch::manual_seed(2);
    torch::nn::Sequential net(torch::nn::Linear(64, 128), torch::nn::GELU(), torch::nn::Linear(128, 64));
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), optim::AdamWOptions(3e-3)));
    double first = 0;
    double last = 0;
    for (int step = 0; step < 60; ++step) {
      torch::manual_seed(100 + static_cast<std::uint64_t>(step));
      const at::Tensor x = fabric.to_device(torch::randn({32, 64}));
      optimizer.zero_grad();
      const at::Tensor loss = torch::mse_loss(model(x).to(at::kFloat), x.cos());
      fabric.backward(loss);
      optimizer.step();
      last = loss.template item<double>();
      if (step == 0) first = last;
    }
    return std::pair(first, last);
  };
  Fabric<Cuda, SingleDevice, TransformerEngine<>> on_gpu({.devices = 1});
  Fabric<Cpu, SingleDevice, TransformerEngine<>> on_cpu;
  const auto [first, last] = train(on_gpu);
  const auto [cpu_first, cpu_last] = train(on_cpu);
  CAPTURE(first, last, cpu_first, cpu_last);
  CHECK(last < first / 2);
  CHECK(first == Approx(cpu_first).epsilon(0.01));
  CHECK(last == Approx(cpu_last).epsilon(0.1));
}

TEST_CASE("[issue-5.5] inputs of more dimensions, and sizes that tensor cores do not take as they are") {
  if (!has_fp8()) return;
  Fabric<Cuda, SingleDevice, TransformerEngine<>> fabric({.devices = 1});
  torch::manual_seed(3);
  torch::nn::Sequential net(torch::nn::Linear(48, 80), torch::nn::Linear(80, 16));
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
  for (const std::vector<std::int64_t>& sizes : {std::vector<std::int64_t>{2, 5, 48}, {7, 48}, {16, 48}}) {
    const at::Tensor out = model(fabric.to_device(torch::randn(sizes)));
    CHECK(out.dim() == static_cast<std::int64_t>(sizes.size()));
    CHECK(out.numel() / 16 * 48 == c10::multiply_integers(sizes));
    fabric.backward(out.to(at::kFloat).pow(2).mean());
    optimizer.step();
  }
  CHECK(net->parameters()[0].isfinite().all().item<bool>());
}

TEST_CASE("[issue-5.6] the 4-bit codes are the CPU's, bit by bit") {
  torch::manual_seed(6);
  const at::Tensor tensor = torch::randn({33, 70});
  for (const auto code : {quantisation::Code4::nf4, quantisation::Code4::fp4}) {
    const auto [packed, absmax] = quantisation::quantise_4bit(tensor, code);
    const auto [gpu_packed, gpu_absmax] = quantisation::quantise_4bit(tensor.to(gpu), code);
    CHECK(gpu_packed.cpu().equal(packed));
    CHECK(gpu_absmax.cpu().equal(absmax));
    const auto numbers = [&](const at::Tensor& bytes, const at::Tensor& maxima, at::Device device) {
      return quantisation::dequantise_4bit(bytes, maxima, quantisation::code_of(code, device), tensor.sizes(),
                                           at::kFloat);
    };
    CHECK(numbers(gpu_packed, gpu_absmax, gpu).cpu().equal(numbers(packed, absmax, at::kCPU)));
  }
}

TEST_CASE("[issue-5.6] integer products are exact on the GPU too") {
  torch::manual_seed(0);
  for (const int64_t k : {8L, 1039L, 5000L}) {
    for (const int64_t rows : {3L, 33L}) {
      const at::Tensor a = torch::randint(-127, 128, {rows, k}).to(at::kChar);
      const at::Tensor b = torch::full({16, k}, 127, at::kChar);
      const at::Tensor exact = a.to(at::kLong).mm(b.to(at::kLong).t());
      CHECK(quantisation::int8_product(a.to(gpu), b.to(gpu)).cpu().to(at::kLong).equal(exact));
    }
  }
}

TEMPLATE_TEST_CASE("[issue-5.6] a quantised layer computes what it does on the CPU, and what is around it learns", "",
                   Is<Mode::nf4>, Is<Mode::nf4_dq>, Is<Mode::fp4>, Is<Mode::fp4_dq>, Is<Mode::int8>,
                   Is<Mode::int8_training>) {
  constexpr Mode mode = TestType::value;
  using Plugin = PrecisionPlugin<Bitsandbytes<mode>>;
  const auto make = [] {
    torch::manual_seed(8);
    return torch::nn::Sequential(torch::nn::Linear(64, 48), torch::nn::ReLU(),
                                 torch::nn::LayerNorm(torch::nn::LayerNormOptions({48})));
  };
  torch::manual_seed(9);
  const at::Tensor x = torch::randn({10, 64});
  at::Tensor on_cpu;
  {
    auto net = make();
    Plugin::convert_module(*net);
    const typename Plugin::ForwardContext context(at::kCPU);
    on_cpu = net->forward(Plugin::convert_input(x)).to(at::kFloat);
  }

  Fabric<Cuda, SingleDevice, Bitsandbytes<mode>> fabric({.devices = 1});
  auto net = make();
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.05));
  const at::Tensor input = fabric.to_device(x);
  CHECK(at::allclose(model(input).detach().cpu().to(at::kFloat), on_cpu, 0.03, 0.05));
  double first = 0;
  double last = 0;
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = model(input).to(at::kFloat).pow(2).mean();
    fabric.backward(loss);
    optimizer.step();
    last = loss.template item<double>();
    if (step == 0) first = last;
  }
  CHECK(last < first);
}
