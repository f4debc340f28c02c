// SPDX-License-Identifier: Apache-2.0
//
// What tests/python/checkpoint.py asks of C++:
//   checkpoint_tool copy IN OUT            reads a file and writes what it held; formats by the names' ends
//   checkpoint_tool resume OPTIMIZER IN OUT  goes on training from a checkpoint for three steps and saves it
//   checkpoint_tool zip64 OUT              writes a file in the form for archives beyond 4 GB
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include <fabric/checkpoint.hpp>
#include <fabric/fabric.hpp>
#include <torch/torch.h>

namespace {

using namespace fabric;

struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(torch::nn::LinearOptions(6, 8).bias(false)))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(8))};
  torch::nn::Sequential rest{
      register_module("rest", torch::nn::Sequential(torch::nn::ReLU(), torch::nn::Linear(8, 3)))};

  at::Tensor forward(const at::Tensor& x) { return rest->forward(norm(first(x))); }
};
TORCH_MODULE(Net);

/// Options that differ from the checkpoint's, all of which it brings along.
std::unique_ptr<torch::optim::Optimizer> make(const std::string& name, const std::vector<at::Tensor>& parameters) {
  if (name == "AdamW") return std::make_unique<torch::optim::AdamW>(parameters, 0.5);
  if (name == "Adam") return std::make_unique<torch::optim::Adam>(parameters, 0.5);
  if (name == "SGD") return std::make_unique<torch::optim::SGD>(parameters, 0.5);
  if (name == "RMSprop") return std::make_unique<torch::optim::RMSprop>(parameters, 0.5);
  if (name == "Adagrad") return std::make_unique<torch::optim::Adagrad>(parameters, 0.5);
  throw std::runtime_error("unknown optimizer " + name);
}

bool is_safetensors(const std::string& path) { return path.ends_with(".safetensors"); }

void copy(const std::string& in, const std::string& out) {
  const auto bytes = fabric::detail::map_file(in);
  const auto contents = is_safetensors(in) ? SafetensorsFile::read(bytes, in) : TorchFile::read(bytes, in);
  is_safetensors(out) ? fabric::detail::write_file<SafetensorsFile>(out, contents.state, {})
                      : fabric::detail::write_file<TorchFile>(out, contents.state, {});
}

void resume(const std::string& optimizer_name, const std::string& in, const std::string& out) {
  Fabric<Cpu, SingleDevice, F64> fabric;
  Net net;
  auto [model, optimizer] = fabric.setup(net, make(optimizer_name, net->parameters()));
  at::Tensor x;
  at::Tensor y;
  std::int64_t step = 0;
  const State state{{"model", model}, {"optimizer", optimizer}, {"x", x}, {"y", y}, {"step", step}};
  fabric.load(in, state);
  for (int i = 0; i < 3; ++i, ++step) {
    optimizer.zero_grad();
    fabric.backward(torch::mse_loss(net->forward(x), y));
    optimizer.step();
  }
  fabric.save(out, state);
}

void zip64(const std::string& out) {
  fabric::detail::DurableFile file(out);
  fabric::detail::ZipWriter zip(file, /*always_zip64=*/true);
  const fabric::detail::PickleWriter pickle(Dict{{"x", torch::arange(5)}});
  zip.add("archive/data.pkl", pickle.pickle().data(), pickle.pickle().size());
  zip.add("archive/byteorder", "little", 6);
  zip.add("archive/data/0", pickle.storages()[0].data(), pickle.storages()[0].nbytes());
  zip.add("archive/version", "3\n", 2);
  zip.finish();
  file.commit();
  (void)TorchFile::read(fabric::detail::map_file(out), out);
}

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "copy" && argc == 4) {
    copy(argv[2], argv[3]);
  } else if (command == "resume" && argc == 5) {
    resume(argv[2], argv[3], argv[4]);
  } else if (command == "zip64" && argc == 3) {
    zip64(argv[2]);
  } else {
    throw std::runtime_error("usage: see the top of checkpoint_tool.cpp");
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
