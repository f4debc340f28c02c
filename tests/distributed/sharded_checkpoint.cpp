// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint distributed sharding
// ranks: 4
// timeout: 300
//
// Checkpoints of sharded training: it goes on under another strategy, on another number of ranks, from a folder that
// all ranks write or from one file; a kill at any moment leaves a whole checkpoint. Run with `job NAME` as arguments,
// this program is such a job.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/sharding.hpp"
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"
#include "support/job.hpp"
#include "support/process.hpp"
#include "support/sharded_policies.hpp"

namespace {

using namespace fabric;
using tests::Process;
using tests::say;
using tests::Sharded;
using tests::variable;
using tests::Zero;
namespace fs = std::filesystem;

// ---- The jobs ----

/// Tied weights, a parameter of three dimensions, one of none, a buffer, and a bias too small for each rank to have
/// some.
struct NetImpl : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(6, 7))};
  at::Tensor mix = register_parameter("mix", torch::randn({3, 7, 7}));
  at::Tensor scale = register_parameter("scale", torch::ones({}));
  at::Tensor offset = register_parameter("offset", torch::zeros({1}));
  at::Tensor tied = register_parameter("tied", first->weight);
  at::Tensor seen = register_buffer("seen", torch::zeros({2}, torch::kLong));

  at::Tensor forward(const at::Tensor& x) {
    if (is_training()) seen.add_(1);
    const at::Tensor hidden = torch::tanh(first(x));
    return at::matmul(hidden + at::matmul(hidden, mix.sum(0)), tied) * scale + offset;
  }
};
TORCH_MODULE(Net);

/// Two groups that are in another order than the module's parameters.
template <class Optimizer>
Optimizer make_optimizer(Net& net) {
  const auto options = [](double rate) {
    return std::make_unique<torch::optim::AdamWOptions>(torch::optim::AdamWOptions(rate).weight_decay(0.1));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<at::Tensor>{net->scale, net->mix, net->offset}, options(0.02));
  groups.emplace_back(net->first->parameters(), options(0.01));
  return Optimizer(groups, torch::optim::AdamWOptions(0.5));
}

template <class F, class S>
void save(F& fabric, const std::string& path, const S& state) {
  path.ends_with(".pt") ? fabric.save(path, state) : fabric.template save<DistributedCheckpoint>(path, state);
}
template <class F, class S>
void load(F& fabric, const std::string& path, const S& state) {
  path.ends_with(".pt") ? fabric.load(path, state) : fabric.template load<DistributedCheckpoint>(path, state);
}

/// Goes on from LOAD, if there is one, until step UNTIL, and saves to SAVE.
template <class S, class Optimizer = optim::AdamW, class Options = typename Engine<Cpu, S>::Options>
int train(const Options& options = {}) {
  const tests::DoubleOutputs outputs;
  at::set_num_threads(1);
  Fabric<Cpu, S, F64> fabric({.devices = std::atoi(variable("RANKS", "1").c_str()), .strategy = options});
  fabric.launch();
  torch::manual_seed(3);
  Net net;
  const std::string from = variable("LOAD", "");
  if (!from.empty()) {
    const torch::NoGradGuard no_grad;
    for (at::Tensor& parameter : net->parameters()) parameter.add_(1);
  }
  auto [model, optimizer] = fabric.setup(net, make_optimizer<Optimizer>(net));
  std::int64_t step = 0;
  const State state{{"optimizer", optimizer}, {"model", model}, {"step", step}};
  if (!from.empty()) load(fabric, from, state);
  const std::int64_t until = std::atoi(variable("UNTIL", "0").c_str());
  for (; step < until; ++step) {
    torch::manual_seed(1000 + static_cast<std::uint64_t>(step));
    const std::int64_t rows = 8 / fabric.world_size();
    const at::Tensor x = torch::randn({8, 6}).narrow(0, rows * fabric.global_rank(), rows);
    optimizer.zero_grad();
    fabric.backward(torch::mse_loss(model(x), x.cos()));
    optimizer.step();
  }
  save(fabric, variable("SAVE"), state);
  return 0;
}

/// Saves one state after the other, each a step further, until it is killed.
template <class S>
int save_forever() {
  at::set_num_threads(1);
  Fabric<Cpu, S, F64> fabric({.devices = std::atoi(variable("RANKS", "1").c_str())});
  fabric.launch();
  torch::nn::Linear net(512, 512);
  auto model = fabric.setup(net);
  std::int64_t step = 0;
  const State state{{"step", step}, {"model", model}};
  const auto fill = [&] {
    const torch::NoGradGuard no_grad;
    for (at::Tensor& parameter : net->parameters()) parameter.fill_(static_cast<double>(step));
  };
  tests::say_who(fabric.global_rank());
  for (;;) {
    ++step;
    if constexpr (requires { model.state()->with_full_parameters(fill); }) {
      model.state()->with_full_parameters(fill);
    } else {
      fill();
    }
    fabric.template save<DistributedCheckpoint>(variable("SAVE"), state);
    if (fabric.is_global_zero()) say("saved " + std::to_string(step) + ".");
  }
}

/// What one rank cannot do, none does.
int all_or_none() {
  at::set_num_threads(1);
  const tests::DoubleOutputs outputs;
  Fabric<Cpu, Zero<3>, F64> fabric({.devices = 2});
  fabric.launch();
  const std::string path = variable("SAVE");
  const std::string rank = "rank " + std::to_string(fabric.global_rank());
  torch::nn::Linear net(512, 1024);  // 4 MB, half of it on each rank
  auto model = fabric.setup(net);
  const auto sum = [&] {
    double all = 0;
    for (const Shard& shard : model.state()->shards()) all += shard.master.sum().template item<double>();
    return all;
  };
  fabric.save<DistributedCheckpoint>(path, {{"model", model}});
  try {
    at::Tensor bad = fabric.global_rank() == 1 ? torch::eye(2).to_sparse() : torch::eye(2);
    fabric.save<DistributedCheckpoint>(path, {{"model", model}, {"bad", bad}});
    say(rank + " SAVED");
  } catch (const Error& error) {
    say(rank + " did not save: " + error.what());
  }
  try {
    fabric.save("/proc/no/x.pt", {{"model", model}});  // rank 0 gathers nothing, and nobody waits for it
    say(rank + " SAVED");
  } catch (const Error& error) {
    say(rank + " cannot write: " + error.what());
  }
  if (fabric.is_global_zero()) {  // only rank 1 wants these bytes
    const std::string file = path + "/__1_0.distcp";
    std::FILE* opened = std::fopen(file.c_str(), "r+b");
    std::fseek(opened, static_cast<long>(fs::file_size(file) / 2), SEEK_SET);
    std::fputs("x", opened);
    std::fclose(opened);
  }
  fabric.barrier();
  for (const Shard& shard : model.state()->shards()) shard.master.detach().fill_(1);
  model.state()->changed();
  const double before = sum();
  try {
    fabric.load<DistributedCheckpoint>(path, {{"model", model}});
    say(rank + " LOADED");
  } catch (const Error& error) {
    say(rank + (sum() == before ? " unchanged: " : " CHANGED: ") + error.what());
  }
  return 0;
}

struct NormedImpl : torch::nn::Module {
  torch::nn::Linear in{register_module("in", torch::nn::Linear(8, 8))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(8))};
  at::Tensor forward(const at::Tensor& x) { return norm(in(x)); }
};
TORCH_MODULE(Normed);

/// Mixed precision: what is saved are the numbers that the optimizer changes, and buffers as the module was made.
int mixed() {
  at::set_num_threads(1);
  Fabric<Cpu, DeepSpeed<3>, BF16Mixed> fabric({.devices = 2});
  fabric.launch();
  torch::manual_seed(1);
  Normed net;
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), torch::optim::AdamWOptions(0.01)));
  const auto step = [&, &model = model, &optimizer = optimizer] {
    torch::manual_seed(2);
    optimizer.zero_grad();
    fabric.backward(model(torch::randn({4, 8})).pow(2).mean());
    optimizer.step();
  };
  const auto masters = [&, &model = model] {
    std::vector<at::Tensor> all;
    for (const Shard& shard : model.state()->shards()) all.push_back(shard.master.detach().clone());
    for (const at::Tensor& buffer : net->buffers()) all.push_back(buffer.clone());
    return all;
  };
  const State state{{"model", model}, {"optimizer", optimizer}};
  step();
  fabric.save<DistributedCheckpoint>(variable("SAVE"), state);
  fabric.save(variable("SAVE") + ".pt", state);
  step();
  const auto expected = masters();
  step();
  fabric.load<DistributedCheckpoint>(variable("SAVE"), state);
  step();  // on parameters that are made from the loaded ones
  const auto got = masters();
  bool same = true;
  for (std::size_t i = 0; i < got.size(); ++i) same = same && got[i].equal(expected[i]);
  say("rank " + std::to_string(fabric.global_rank()) + (same ? " goes on as before" : " DIFFERS"));
  return 0;
}

/// Checkpoints of one file, and of folders, with the oldest going; and a part of a model.
int rotating() {
  at::set_num_threads(1);
  const tests::DoubleOutputs outputs;
  Fabric<Cpu, Zero<3>, F64> fabric({.devices = 2});
  fabric.launch();
  torch::nn::Linear net(5, 3);
  auto [model, optimizer] = fabric.setup(net, torch::optim::SGD(net->parameters(), 0.1));
  std::int64_t step = 0;
  RandomState random;
  const State state{{"model", model}, {"optimizer", optimizer}, {"random", random}, {"step", step}};
  const auto fill = [&, &model = model](double number) {
    for (const Shard& shard : model.state()->shards()) shard.master.detach().fill_(number);
    model.state()->changed();
  };
  const auto good = [&, &model = model](double number) {
    bool all = true;
    for (const Shard& shard : model.state()->shards()) all = all && shard.master.eq(number).all().item<bool>();
    return all;
  };
  const std::string folder = variable("SAVE");
  const auto rotate = [&](auto& checkpoints, const std::string& name) {
    for (step = 1; step <= 3; ++step) {
      fill(static_cast<double>(step));
      checkpoints.save(step, state);
      fill(0);
    }
    const auto loaded = checkpoints.load_latest(state);
    checkpoints.close();
    say("rank " + std::to_string(fabric.global_rank()) + " " + name +
        (loaded && step == 3 && good(3) ? " is right" : " IS WRONG"));
  };
  Checkpoints in_files(fabric, {.folder = folder + "/files", .keep = 2, .asynchronous = true});
  rotate(in_files, "asynchronous file");
  Checkpoints<decltype(fabric), DistributedCheckpoint> in_folders(fabric, {.folder = folder + "/folders", .keep = 2});
  rotate(in_folders, "folder");
  const Filter only_bias{{"model", [](const std::string& key, const Value&) { return key == "bias"; }}};
  fabric.save<DistributedCheckpoint>(folder + "/some", state, only_bias);
  fabric.save(folder + "/some.pt", state, only_bias);
  fill(0);
  auto loaded = fabric.load<DistributedCheckpoint>(folder + "/some", {{"model", model}}, /*strict=*/false);
  const bool folder_right = loaded.missing == std::vector<std::string>{"model.weight"};
  loaded = fabric.load(folder + "/some.pt", {{"model", model}}, /*strict=*/false);
  const bool right = folder_right && loaded.missing == std::vector<std::string>{"model.weight"};
  say("rank " + std::to_string(fabric.global_rank()) + (right ? " part is right" : " part IS WRONG"));
  fabric.save<SafetensorsFile>(folder + "/all.safetensors", state);
  fill(0);
  fabric.load<SafetensorsFile>(folder + "/all.safetensors", state);
  return 0;
}

const std::map<std::string, std::function<int()>> jobs{
    {"one", [] { return train<SingleDevice>(); }},
    {"one of torch", [] { return train<SingleDevice, torch::optim::AdamW>(); }},
    {"ddp", [] { return train<Ddp>(); }},
    {"zero 1", [] { return train<Zero<1>>(); }},
    {"zero 2 of torch", [] { return train<Zero<2>, torch::optim::AdamW>(); }},
    {"zero 3", [] { return train<Zero<3>>(); }},
    {"zero 3 in files", [] { return train<Zero<3, Offload::nvme>>(ShardingOptions{.nvme_path = "/tmp"}); }},
    {"full", [] { return train<Sharded>(); }},
    {"hybrid", [] { return train<Sharded>(ShardingOptions{.sharding = Sharding::hybrid, .shard_group_size = 2}); }},
    {"replicated", [] { return train<Sharded>(ShardingOptions{.sharding = Sharding::none}); }},
    {"one saves forever", save_forever<SingleDevice>},
    {"two save forever", save_forever<Zero<3>>},
    {"all or none", all_or_none},
    {"mixed", mixed},
    {"rotating", rotating},
};

// ---- The tests ----

struct Folder {
  fs::path path;
  Folder() {
    std::string name = fs::temp_directory_path() / "fabric-sharded-XXXXXX";
    path = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return path / name; }
};

Process job(const std::string& name, std::vector<Process::Variable> variables) {
  return Process({"/proc/self/exe", "job", name}, variables);
}
void run(const std::string& name, int ranks, const std::string& from, int until, const std::string& to) {
  auto process =
      job(name, {{"RANKS", std::to_string(ranks)}, {"LOAD", from}, {"UNTIL", std::to_string(until)}, {"SAVE", to}});
  const int code = process.wait();
  INFO(name << " on " << ranks << ": " << process.output());
  REQUIRE(code == 0);
}

Value contents(const Folder& folder, const std::string& path) {
  std::string file = path;
  if (!path.ends_with(".pt")) consolidate(path, file = folder / "consolidated.pt");
  return TorchFile::read(fabric::detail::map_file(file), file).state;
}

/// The same keys, kinds, shapes and dtypes, and numbers that are equal but for rounding.
void compare(const Value& a, const Value& b, const std::string& key, bool any_order) {
  INFO(key);
  REQUIRE(a.data().index() == b.data().index());
  if (const auto* dict = std::get_if<Dict>(&a.data())) {
    const auto& other = std::get<Dict>(b.data());
    REQUIRE(dict->size() == other.size());
    auto at = other.begin();
    for (const auto& [own, value] : *dict) {
      if (!any_order) REQUIRE(to_text(own) == to_text(at->first));
      REQUIRE(other.find(own) != nullptr);
      compare(value, other.at(own), key + "." + to_text(own), any_order);
      ++at;
    }
  } else if (const auto* list = std::get_if<List>(&a.data())) {
    const auto& items = std::get<List>(b.data()).items;
    REQUIRE(list->items.size() == items.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
      compare(list->items[i], items[i], key + "." + std::to_string(i), any_order);
    }
  } else if (const auto* tensor = std::get_if<at::Tensor>(&a.data())) {
    const auto& other = std::get<at::Tensor>(b.data());
    REQUIRE(tensor->sizes() == other.sizes());
    REQUIRE(tensor->scalar_type() == other.scalar_type());
    CHECK(tensor->allclose(other, 1e-10, 1e-12));
  } else {
    std::visit(
        [&](const auto& one) {
          using T = std::decay_t<decltype(one)>;
          if constexpr (std::is_same_v<T, double> || std::is_same_v<T, std::int64_t> || std::is_same_v<T, bool> ||
                        std::is_same_v<T, std::string>) {
            CHECK(one == std::get<T>(b.data()));
          }
        },
        a.data());
  }
}

/// The steps that the output says were saved.
std::int64_t last_saved(const std::string& output) {
  std::int64_t last = 0;
  for (std::size_t at = output.find("saved "); at != std::string::npos; at = output.find("saved ", at + 1)) {
    const std::size_t end = output.find_first_not_of("0123456789", at + 6);
    if (end != std::string::npos && output[end] == '.')
      last = std::max<std::int64_t>(last, std::stoll(output.substr(at + 6)));
  }
  return last;
}

void kill_and_load(const std::string& name, const Folder& folder, int kills, int ranks) {
  std::mt19937 random(7);
  int in_a_save = 0;
  for (int i = 0; i < kills; ++i) {
    auto process = job(name, {{"RANKS", std::to_string(ranks)}, {"SAVE", folder / "c"}});
    REQUIRE(process.wait_for("saved 1."));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 40000));
    if (ranks > 1 && i % 2 == 1) {
      kill(tests::process_of(process.output(), 1), SIGKILL);  // which ends the others
    } else {
      process.kill(SIGKILL);
    }
    REQUIRE(process.wait() != 0);
    in_a_save += fs::exists(folder / ".c.tmp") ? 1 : 0;
    Fabric<Cpu, SingleDevice, F64> fabric;
    torch::nn::Linear net(512, 512);
    net->to(torch::kDouble);
    std::int64_t step = 0;
    const auto loaded = fabric.load<DistributedCheckpoint>(folder / "c", {{"step", step}, {"model", net}});
    CHECK(step >= last_saved(process.output()));
    CHECK(net->weight.eq(static_cast<double>(step)).all().item<bool>());
    CHECK(net->bias.eq(static_cast<double>(step)).all().item<bool>());
  }
  std::printf("%s: kills survived: %d, %d of them with a folder half-written\n", name.c_str(), kills, in_a_save);
}

}  // namespace

TEST_CASE("[issue-8.7] training goes on under other strategies, on 1, 4 and 2 ranks, as if nothing had happened") {
  const Folder folder;
  run("one", 1, "", 12, folder / "whole.pt");
  const Value whole = contents(folder, folder / "whole.pt");
  const struct {
    const char* name;
    int ranks;
    const char* to;
  } stages[] = {{"one of torch", 1, "a"}, {"zero 3", 4, "b"},     {"ddp", 2, "c"},
                {"zero 1", 2, "d.pt"},    {"hybrid", 4, "e"},     {"zero 2 of torch", 2, "f"},
                {"full", 4, "g.pt"},      {"replicated", 2, "h"}, {"zero 3 in files", 2, "i"},
                {"one", 1, "j"}};
  std::string from;
  int until = 0;
  for (const auto& stage : stages) {
    until += until < 4 ? 2 : 1;
    run(stage.name, stage.ranks, from, until, folder / stage.to);
    from = folder / stage.to;
  }
  REQUIRE(until == 12);
  // Optimizers are by name in folders: into one file of the usual form once more.
  run("one", 1, from, 12, folder / "last.pt");
  compare(whole, contents(folder, folder / "last.pt"), "", false);
}

TEST_CASE("[issue-8.7] one file of a sharded model has what an unsharded one has, in the same places") {
  const Folder folder;
  run("one", 1, "", 2, folder / "one.pt");
  const Value one = contents(folder, folder / "one.pt");
  for (const std::string name : {"zero 3", "zero 1", "hybrid", "replicated", "zero 3 in files"}) {
    run(name, 4, "", 2, folder / "sharded.pt");
    compare(one, contents(folder, folder / "sharded.pt"), name, true);
  }
  run("ddp", 2, "", 2, folder / "ddp");
  run("zero 3", 4, "", 2, folder / "zero3");
  compare(contents(folder, folder / "ddp"), contents(folder, folder / "zero3"), "folders", true);
}

TEST_CASE("[issue-8.7] a kill at any moment of a save leaves a whole folder, not older than the last that was saved") {
  const char* soak = std::getenv("FABRIC_SOAK");
  const Folder folder;
  kill_and_load("one saves forever", folder, soak == nullptr ? 12 : std::atoi(soak), 1);
  kill_and_load("two save forever", folder, soak == nullptr ? 4 : std::atoi(soak), 2);
}

TEST_CASE("[issue-8.7] what one rank cannot save or load, no rank does") {
  const Folder folder;
  auto process = job("all or none", {{"SAVE", folder / "c"}});
  const int code = process.wait();
  INFO(process.output());
  REQUIRE(code == 0);
  for (const std::string rank : {"rank 0", "rank 1"}) {
    CHECK_THAT(process.output(), ContainsSubstring(rank + " did not save: ") &&
                                     ContainsSubstring(rank + " cannot write: fabric: cannot make the folder") &&
                                     ContainsSubstring(rank + " unchanged: "));
  }
  CHECK_THAT(process.output(), ContainsSubstring("'bad' is not a dense tensor") &&
                                   ContainsSubstring("__1_0.distcp ('model.weight') cannot be loaded"));
  CHECK_FALSE(fs::exists(folder / ".c.tmp"));
}

TEST_CASE("[issue-8.7] in mixed precision the optimizer's own numbers are saved") {
  const Folder folder;
  auto process = job("mixed", {{"SAVE", folder / "c"}});
  const int code = process.wait();
  INFO(process.output());
  REQUIRE(code == 0);
  CHECK(tests::count(process.output(), "goes on as before") == 2);
  const Value saved = contents(folder, folder / "c");
  const auto& model = saved.as<Dict>("").at("model").as<Dict>("");
  CHECK(model.at("in.weight").as<at::Tensor>("").scalar_type() == at::kFloat);
  CHECK(model.at("norm.running_mean").as<at::Tensor>("").scalar_type() == at::kFloat);
  // And so they are loaded without sharding.
  Fabric<Cpu, SingleDevice, BF16Mixed> one;
  Normed net;
  auto [whole, optimizer] = one.setup(net, optim::AdamW(net->parameters(), torch::optim::AdamWOptions(0.01)));
  for (const auto& file : {folder / "c.pt", folder / "c"}) {
    net->norm->running_mean.zero_();
    if (file.ends_with(".pt")) {
      one.load(file, {{"model", whole}, {"optimizer", optimizer}});
    } else {
      one.load<DistributedCheckpoint>(file, {{"model", whole}, {"optimizer", optimizer}});
    }
    REQUIRE(net->norm->running_mean.abs().sum().item<float>() > 0);
  }
}

TEST_CASE(
    "[issue-8.7] the newest checkpoints of sharded training stay, in files and in folders; parts are saved, too") {
  const Folder folder;
  auto process = job("rotating", {{"SAVE", folder.path}});
  const int code = process.wait();
  INFO(process.output());
  REQUIRE(code == 0);
  CHECK(tests::count(process.output(), " is right") == 6);
  CHECK(fs::read_symlink(folder / "files/latest") == "step-0000000003.pt");
  CHECK(fs::read_symlink(folder / "folders/latest") == "step-0000000003");
  CHECK_FALSE(fs::exists(folder / "folders/step-0000000001"));
}

int main(int argc, char** argv) try {
  if (argc == 3 && std::string(argv[1]) == "job") return jobs.at(argv[2])();
  return Catch::Session().run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  std::exit(1);
}
