// SPDX-License-Identifier: Apache-2.0
//
// What tests/python/dcp.py asks of C++:
//   dcp_tool train STRATEGY RANKS IN OUT  goes on training from a folder for three steps and saves to another
//   dcp_tool consolidate FOLDER FILE      turns a folder into one file
//   dcp_tool copy FILE FOLDER             the other way
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include <fabric/checkpoint.hpp>
#include <fabric/sharding.hpp>
#include <torch/torch.h>

#include "support/sharded_policies.hpp"

namespace {

using namespace fabric;

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(6, 8))};
  torch::nn::LayerNorm norm{register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})))};
  torch::nn::Sequential rest{
      register_module("rest", torch::nn::Sequential(torch::nn::Tanh(), torch::nn::Linear(8, 3)))};
  at::Tensor seen = register_buffer("seen", torch::zeros({}, torch::kLong));

  at::Tensor forward(const at::Tensor& x) {
    seen.add_(1);
    return rest->forward(norm(first(x)));
  }
};
TORCH_MODULE(Net);

template <class S>
void train(int ranks, const std::string& in, const std::string& out) {
  const tests::DoubleOutputs outputs;
  at::set_num_threads(1);
  Fabric<Cpu, S, F64> fabric({.devices = ranks});
  fabric.launch();
  Net net;
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), torch::optim::AdamWOptions(0.5)));
  at::Tensor x;
  at::Tensor y;
  std::int64_t step = 0;
  const State state{{"model", model}, {"optimizer", optimizer}, {"x", x}, {"y", y}, {"step", step}};
  fabric.template load<DistributedCheckpoint>(in, state);
  const std::int64_t rows = x.size(0) / ranks;
  for (int i = 0; i < 3; ++i, ++step) {
    optimizer.zero_grad();
    const auto own = [&](const at::Tensor& all) { return all.narrow(0, rows * fabric.global_rank(), rows); };
    fabric.backward(torch::mse_loss(model(own(x)), own(y)));
    optimizer.step();
  }
  fabric.template save<DistributedCheckpoint>(out, state);
}

void copy(const std::string& file, const std::string& folder) {
  const auto contents = TorchFile::read(fabric::detail::map_file(file), file);
  const World alone;
  Ranks ranks(alone, "copy", std::chrono::minutes(1));
  DistributedCheckpoint::save(folder, contents.state, {}, {}, ranks);
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "consolidate" && argc == 4) {
    consolidate(argv[2], argv[3]);
  } else if (command == "copy" && argc == 4) {
    copy(argv[2], argv[3]);
  } else if (command == "train" && argc == 6) {
    const std::string strategy = argv[2];
    const int ranks = std::atoi(argv[3]);
    if (strategy == "one") train<SingleDevice>(ranks, argv[4], argv[5]);
    if (strategy == "ddp") train<Ddp>(ranks, argv[4], argv[5]);
    if (strategy == "zero1") train<tests::Zero<1>>(ranks, argv[4], argv[5]);
    if (strategy == "zero3") train<tests::Zero<3>>(ranks, argv[4], argv[5]);
  } else {
    throw std::runtime_error("usage: see the top of dcp_tool.cpp");
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
