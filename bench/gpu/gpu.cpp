// SPDX-License-Identifier: Apache-2.0
//
// Training a transformer on one GPU, with AdamW and clipping by norm: with Fabric beside a loop written by hand on
// LibTorch, and beside Python's with AdamW(fused=True); and what FP8 brings. Each in a process of its own, in turns. It
// needs a build on a LibTorch with CUDA.
//   bench_gpu OUT.json [--quick]
//   echo 12 768 12 50257 1024 1024 8 10 | bench_gpu serve bf16-mixed    only runs a loop, for a profiler

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fabric/fabric.hpp>
#include <fabric/precision/transformer_engine.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "optimizers/gpt.hpp"
#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

constexpr double adamw_lr = 1e-4;
constexpr double max_norm = 1.0;

/// A transformer and the number of sequences in a batch.
struct Task {
  GptSize size;
  std::int64_t rows;

  [[nodiscard]] std::string text() const {
    return fmt::format("{} {} {} {} {} {} {}", size.layers, size.width, size.heads, size.vocabulary, size.positions,
                       size.tokens, rows);
  }
  [[nodiscard]] std::string name() const {
    return fmt::format("{} of width {}, {} tokens", size.name(), size.width, rows * size.tokens);
  }
};

std::istream& operator>>(std::istream& words, Task& task) {
  GptSize& size = task.size;
  return words >> size.layers >> size.width >> size.heads >> size.vocabulary >> size.positions >> size.tokens >>
         task.rows;
}

at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& targets) {
  return torch::cross_entropy_loss(logits.flatten(0, 1), targets.flatten());
}

Batch make_data(const Task& task) {
  const at::Tensor text =
      torch::randint(task.size.vocabulary, {task.rows, task.size.tokens + 1}, at::kLong).to(at::kCUDA);
  return {text.slice(1, 0, task.size.tokens).contiguous(), text.slice(1, 1).contiguous()};
}

Loop by_hand(const Task& task) {
  torch::manual_seed(0);
  Gpt model(task.size);
  model->to(at::kCUDA);
  const Batch batch = make_data(task);
  const auto parameters = model->parameters();
  auto optimizer = std::make_shared<torch::optim::AdamW>(parameters, torch::optim::AdamWOptions(adamw_lr));
  at::autocast::set_autocast_dtype(at::kCUDA, at::kBFloat16);
  return [=](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer->zero_grad();
      at::autocast::set_autocast_enabled(at::kCUDA, true);
      loss = loss_of(model->forward(batch.inputs), batch.targets);
      at::autocast::set_autocast_enabled(at::kCUDA, false);
      at::autocast::clear_cache();
      loss.backward();
      torch::nn::utils::clip_grad_norm_(parameters, max_norm);
      optimizer->step();
    }
    return loss.item<double>();
  };
}

template <class P>
Loop with_fabric(const Task& task) {
  using F = fabric::Fabric<fabric::Cuda, fabric::SingleDevice, P>;
  auto fabric = std::make_shared<F>(typename F::Options{.devices = 1});
  fabric::seed_everything(0);
  Gpt net(task.size);
  const Batch batch = make_data(task);
  auto [model, optimizer] =
      fabric->setup(net, fabric::optim::AdamW(net->parameters(), fabric::optim::AdamWOptions(adamw_lr)));
  return [=, model = model, optimizer = optimizer](int steps) mutable {
    at::Tensor loss;
    for (int step = 0; step < steps; ++step) {
      optimizer.zero_grad();
      {
        const auto autocast = fabric->autocast();
        loss = loss_of(model(batch.inputs), batch.targets);
      }
      fabric->backward(loss);
      fabric->clip_gradients(optimizer, fabric::ClipNorm{.max_norm = max_norm, .error_if_nonfinite = false});
      optimizer.step();
    }
    return loss.template item<double>();
  };
}

Loop make_loop(const std::string& contestant, const Task& task) {
  if (contestant == "by_hand") return by_hand(task);
  if (contestant == "bf16-mixed") return with_fabric<fabric::BF16Mixed>(task);
  if (contestant == "bf16-true") return with_fabric<fabric::BF16>(task);
  if (contestant == "transformer-engine") return with_fabric<fabric::TransformerEngine<>>(task);
  throw std::runtime_error("no loop " + contestant);
}

/// Reads lines "TASK STEPS" and answers each with the microseconds per step and the last loss, as gpu.py does.
void serve(const std::string& contestant) {
  std::map<std::string, Loop> loops;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    Task task{};
    int steps = 0;
    words >> task >> steps;
    if (!loops.contains(task.text())) loops = {{task.text(), make_loop(contestant, task)}};
    const double start = now();
    const double loss = loops[task.text()](steps);  // which waits for the GPU
    fmt::print("{} {}\n", (now() - start) / steps * 1e6, loss);
    std::fflush(stdout);
  }
}

struct Contestant {
  std::string name;
  std::unique_ptr<Program> program;
  Samples microseconds{};

  double run(const Task& task, int steps) {
    std::istringstream answer(program->ask(fmt::format("{} {}", task.text(), steps)));
    double took = 0;
    double loss = 0;
    if (!(answer >> took >> loss)) throw std::runtime_error(name + " gave no time");
    microseconds.add(took);
    return loss;
  }
};

Contestant python() {
  const char* own = std::getenv("FABRIC_PYTHON");
  const std::string script = FABRIC_SOURCE_DIR "/bench/gpu/gpu.py";
  const std::string interpreter = own != nullptr ? own : FABRIC_SOURCE_DIR "/tools/run-python";
  return {"Python, fused", std::make_unique<Program>(std::vector<std::string>{interpreter, script})};
}

void compare(const Task& task, int rounds, int steps, Report& report) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  std::vector<Contestant> all;
  for (const std::string name : {"bf16-mixed", "by_hand", "bf16-true", "transformer-engine"}) {
    all.push_back({name, std::make_unique<Program>(std::vector<std::string>{self, "serve", name})});
  }
  all.push_back(python());
  constexpr int warm_up = 5;
  double loss = 0;
  for (auto contestant = all.begin(); contestant != all.end();) {
    try {
      const double own = contestant->run(task, 1);
      contestant->run(task, warm_up);
      contestant->microseconds = {};
      if (loss == 0) loss = own;
      if (std::abs(own - loss) > 0.05 * loss) {
        throw std::runtime_error(fmt::format("{}: the loss is {}, not {}", contestant->name, own, loss));
      }
      ++contestant;
    } catch (const std::exception& error) {
      if (contestant->name != "Python, fused") throw;
      fmt::print("without Python: {}\n", error.what());
      contestant = all.erase(contestant);
    }
  }
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t turn = 0; turn < all.size(); ++turn) {
      all[(turn + static_cast<std::size_t>(round)) % all.size()].run(task, steps);
    }
  }
  const auto add = [&](const Contestant& ours, const Contestant& other) {
    report.add({task.name() + ", " + ours.name, "us/step", ours.microseconds, other.microseconds, other.name});
  };
  add(all[0], all[1]);
  if (all.size() > 4) add(all[0], all[4]);
  add(all[3], all[2]);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc == 3 && std::string(argv[1]) == "serve") {
    serve(argv[2]);
    return 0;
  }
  const Arguments arguments = parse(argc, argv);
  Report report;
  if (!torch::cuda::is_available()) {
    fmt::print("nothing to measure: there is no GPU\n");
  } else {
    // Bound by the host, which launches kernels; by the GPU; by its matrix products.
    const GptSize small{.layers = 4, .width = 256, .heads = 4, .vocabulary = 1024, .tokens = 64};
    const GptSize wide{.layers = 2, .width = 4096, .heads = 32, .vocabulary = 1024, .tokens = 1024};
    compare({small, 4}, arguments.quick ? 1 : 9, arguments.quick ? 5 : 50, report);
    if (!arguments.quick) compare({GptSize{.tokens = 1024}, 8}, 7, 5, report);
    if (!arguments.quick) compare({wide, 8}, 7, 5, report);
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "gpu: {}\n", error.what());
  return 1;
}
