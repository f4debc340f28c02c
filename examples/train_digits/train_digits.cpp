// SPDX-License-Identifier: Apache-2.0
//
// Trains a small network on handwritten digits, on whatever the flags say:
//   train_digits --strategy ddp --devices 2 --precision bf16-mixed

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include <CLI/CLI.hpp>
#include <fabric/checkpoint.hpp>
#include <fabric/connector/explain.hpp>
#include <fabric/fabric.hpp>
#include <fabric/precision/transformer_engine.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "digits.hpp"
#include "kernels.hpp"
#include "progress.hpp"

namespace {

using namespace fabric;

struct Arguments {
  Flags flags;
  int epochs = 12;
  std::size_t batch_size = 32;  // of each process
  double lr = 2e-3;
  double eps = 1e-8;
  std::uint64_t seed = 0;
  std::string optimizer = "adamw";
  std::string log;
  std::string data = FABRIC_SOURCE_DIR "/examples/data/digits.csv";
  bool no_shuffle = false;
  std::string save;  // a folder
  bool resume = false;
  std::int64_t checkpoint_every = 0;
  std::string init;
  std::string save_init;
};

/// What this program can run on. Each combination is compiled once, all others are refused by name.
using OnWhat = std::conditional_t<built_with_nccl, Accelerators<Cpu, Cuda>, Accelerators<Cpu>>;
using DigitsMenu = Menu<OnWhat, Strategies<SingleDevice, Ddp, DdpFindUnusedParameters>,
                        Precisions<F32, F64, F16, BF16, F16Mixed, BF16Mixed,  // F16Mixed: Cuda
                                   TransformerEngine<>, TransformerEngine<F16>>>;

std::unique_ptr<torch::optim::Optimizer> make_optimizer(const Arguments& arguments,
                                                        const std::vector<at::Tensor>& parameters) {
  if (arguments.optimizer == "sgd") {
    return std::make_unique<optim::SGD>(parameters, optim::SGDOptions(arguments.lr).momentum(0.9));
  }
  if (arguments.optimizer == "adam") {
    return std::make_unique<optim::Adam>(parameters, optim::AdamOptions(arguments.lr).eps(arguments.eps));
  }
  return std::make_unique<optim::AdamW>(parameters, optim::AdamWOptions(arguments.lr).eps(arguments.eps));
}

/// The share of held-out digits that the model reads rightly, over all ranks.
template <class F, class Model>
double accuracy(F& fabric, Model& model, const Arguments& arguments) {
  // Not padded: each digit counts once.
  auto loader = fabric.setup_dataloader(Digits(arguments.data, Part::held_out), {.batch_size = 256, .pad = false});
  const torch::NoGradGuard no_grad;
  model->eval();
  auto right_and_all = torch::zeros({2}, torch::TensorOptions(fabric.device()).dtype(torch::kDouble));
  for (auto& batch : loader) {
    right_and_all[0] += model(batch.data).argmax(1).eq(batch.target).sum();
    right_and_all[1] += batch.target.size(0);
  }
  model->train();
  const auto sums = fabric.all_reduce(right_and_all, ReduceOp::sum);
  return (sums[0] / sums[1]).template item<double>();
}

/// The training loop, which is the same for each entry of the menu.
template <class F>
void train(F& fabric, const Arguments& arguments) {
  fabric.launch();
  seed_everything(arguments.seed);
  auto net = fabric.init_module([] { return DigitNet(); });
  if (!arguments.init.empty()) {
    // Not strict: the weights may be of another precision. But all of them must be there.
    const auto loaded = fabric.load(arguments.init, net, /*strict=*/false);
    if (!loaded.missing.empty()) throw Error("--init: " + arguments.init + " has no " + loaded.missing[0]);
  }
  if (!arguments.save_init.empty()) fabric.save(arguments.save_init, net);
  auto [model, optimizer] = fabric.setup(net, make_optimizer(arguments, net->parameters()));
  auto loader = fabric.setup_dataloader(
      Digits(arguments.data, Part::training),
      {.batch_size = arguments.batch_size, .shuffle = !arguments.no_shuffle, .seed = arguments.seed});

  std::int64_t step = 0;
  int epoch = 0;
  RandomState random;
  const State state{{"model", model},   {"optimizer", optimizer}, {"loader", loader},
                    {"random", random}, {"step", step},           {"epoch", epoch}};
  std::optional<Checkpoints<F>> checkpoints;
  if (!arguments.save.empty()) checkpoints.emplace(fabric, CheckpointsOptions{.folder = arguments.save});
  if (arguments.resume && checkpoints->load_latest(state)) fabric.print("resumed after step ", step);
  const auto images = static_cast<std::int64_t>(loader.rows()) * fabric.world_size();
  Progress progress(fabric.is_global_zero(), arguments.epochs, static_cast<std::int64_t>(loader.size()), images, step);
  for (; epoch < arguments.epochs; ++epoch) {
    for (auto& batch : loader) {
      optimizer.zero_grad();
      const at::Tensor loss = torch::cross_entropy_loss(model(batch.data), batch.target);
      fabric.backward(loss);
      optimizer.step();
      fabric.log("loss", loss, step++);
      progress.step(step, loss);
      if (checkpoints && arguments.checkpoint_every > 0 && step % arguments.checkpoint_every == 0) {
        checkpoints->save(step, state);
      }
    }
  }
  if (checkpoints) checkpoints->save(step, state);
  fabric.print(fmt::format("accuracy={:.4f}", accuracy(fabric, model, arguments)));
}

/// One line: what multiplies matrices in a forward and a backward of this precision on that device.
template <class Plugin>
std::string kernels(const at::Device& device) {
  DigitNet net = [] {
    [[maybe_unused]] const typename Plugin::InitContext context;
    return DigitNet();
  }();
  net->to(device);
  Plugin::convert_module(*net);
  const Kernels used;
  at::Tensor logits;
  {
    const typename Plugin::ForwardContext context(device.type());
    logits = net->forward(Plugin::convert_input(torch::zeros({32, 1, 8, 8}, device)));
  }
  Plugin::convert_output(logits).sum().backward();
  const auto layers = net->modules();
  const auto in_fp8 = std::count_if(layers.begin(), layers.end(), [](const auto& layer) {
    return dynamic_cast<const LinearSubstitute*>(layer.get()) != nullptr;
  });
  const char* how = fp8::kernel_for(device) == fp8::Kernel::emulation ? "emulated in 32 bits" : "on tensor cores";
  return fmt::format("kernels: {} on {} weights{}", used.text(), at::toString(net->logits->weight.scalar_type()),
                     in_fp8 == 0 ? "" : fmt::format("; FP8, {}, in {} layer", how, in_fp8));
}

/// What the flags come down to, and what then computes.
void print_explanation(const Flags& flags) {
  const CapturedVariables variables = capture_variables();
  std::cout << to_text(explain(flags, variables, probe_host(variables)));
  std::string line;
  try {
    const Selection selection = resolve_for<DigitsMenu>(flags);
    line = visit_selected<DigitsMenu>(selection, [&](auto entry) {
      return kernels<typename decltype(entry)::type::Plugin>(device_of(selection, 0));
    });
  } catch (const Error&) {
    line = "kernels: none, since these flags do not run";  // why not was just explained
  }
  std::cout << line << '\n';
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments arguments;
  CLI::App app("Trains a small network on handwritten digits");
  add_flags(app, arguments.flags);
  app.add_option("--epochs", arguments.epochs)->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--batch-size", arguments.batch_size, "of each process")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--lr", arguments.lr)->capture_default_str();
  app.add_option("--eps", arguments.eps, "of adam and adamw")->capture_default_str();
  app.add_option("--seed", arguments.seed)->capture_default_str();
  app.add_option("--optimizer", arguments.optimizer)
      ->capture_default_str()
      ->check(CLI::IsMember({"adamw", "sgd", "adam"}));
  app.add_option("--log", arguments.log, "CSV file for the loss of each step");
  app.add_option("--data", arguments.data)->capture_default_str()->check(CLI::ExistingFile);
  app.add_option("--init", arguments.init, "start from these weights: a state_dict saved by Python or by --save-init")
      ->check(CLI::ExistingFile);
  app.add_option("--save-init", arguments.save_init, "write the weights that training starts from");
  auto* save = app.add_option("--save", arguments.save, "folder for checkpoints; the newest is latest");
  app.add_option("--checkpoint-every", arguments.checkpoint_every, "steps; by default only at the end")
      ->check(CLI::PositiveNumber);
  app.add_flag("--resume", arguments.resume, "go on from the newest checkpoint, if there is one")->needs(save);
  app.add_flag("--no-shuffle", arguments.no_shuffle, "the same order in each epoch");
  bool explained = false;
  app.add_flag("--explain", explained, "say what the flags come down to, and stop");
  CLI11_PARSE(app, argc, argv);

  if (explained) {
    print_explanation(arguments.flags);
    return 0;
  }
  std::vector<std::shared_ptr<Logger>> loggers;
  if (!arguments.log.empty()) {
    loggers.push_back(std::make_shared<CsvLogger>(arguments.log, CsvLoggerOptions{.resume = arguments.resume}));
  }
  dispatch<DigitsMenu>(
      arguments.flags, [&](auto& fabric) { train(fabric, arguments); }, loggers);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "train_digits: " << error.what() << '\n';
  return 1;
}
