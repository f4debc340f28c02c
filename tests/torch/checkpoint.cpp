// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint torch
//
// Fabric::save and load: what can be saved, what is refused, and that a failure changes nothing.
#include <array>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/hana/define_struct.hpp>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
namespace fs = std::filesystem;

/// A folder that is gone after the test.
struct Folder {
  fs::path path;

  Folder() {
    std::string name = fs::temp_directory_path() / "fabric-checkpoint-XXXXXX";
    path = mkdtemp(name.data());
  }
  ~Folder() {
    std::error_code ignored;
    fs::permissions(path, fs::perms::owner_all, ignored);
    fs::remove_all(path, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return path / name; }
};

struct NetImpl : torch::nn::Module {
  explicit NetImpl(std::int64_t out = 2) : head(register_module("head", torch::nn::Linear(4, out))) {}
  torch::nn::Linear first{register_module("first", torch::nn::Linear(3, 4))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(4))};
  torch::nn::Linear head;

  at::Tensor forward(const at::Tensor& x) { return head(norm(first(x))); }
};
TORCH_MODULE(Net);

using OnCpu = Fabric<Cpu, SingleDevice, F32>;

Net net_of(std::uint64_t seed) {
  torch::manual_seed(seed);
  return Net();
}
std::vector<at::Tensor> copy_of(const torch::nn::Module& module) {
  std::vector<at::Tensor> copies;
  for (const auto& tensor : module.parameters()) copies.push_back(tensor.detach().clone());
  for (const auto& tensor : module.buffers()) copies.push_back(tensor.clone());
  return copies;
}
bool equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!a[i].equal(b[i])) return false;
  }
  return true;
}
template <class Model, class Optimizer>
void train(OnCpu& fabric, Model& model, Optimizer& optimizer, int steps, std::uint64_t seed = 5) {
  for (int i = 0; i < steps; ++i) {
    torch::manual_seed(seed + static_cast<std::uint64_t>(i));
    optimizer.zero_grad();
    fabric.backward(model(torch::randn({8, 3})).pow(2).mean());
    optimizer.step();
  }
}

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// An object with a state of its own, which may refuse.
struct Scaler {
  double scale = 1;
  bool refuses = false;

  [[nodiscard]] Value state_dict() const { return Dict{{"scale", scale}}; }
  void load_state_dict(const Value& state) {
    if (refuses) throw Error("the scaler refuses");
    scale = state.as<Dict>("scaler").at("scale").as_number("scale");
  }
};

enum class Phase { warmup, main };

struct Counters {
  BOOST_HANA_DEFINE_STRUCT(Counters, (std::int64_t, epoch), (std::string, name), (std::vector<double>, losses));
};
struct Everything {
  Net model;
  std::reference_wrapper<double> best;
  Counters counters;
};

}  // namespace

BOOST_HANA_ADAPT_STRUCT(Everything, model, best, counters);

TEST_CASE("[issue-7.1] every kind of state comes back, whether or not setup wrapped it") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  auto [model, optimizer] = fabric.setup(net, torch::optim::AdamW(net->parameters(), 0.1));
  train(fabric, model, optimizer, 2);
  torch::optim::StepLR scheduler(optimizer.optimizer(), 2, 0.5);
  scheduler.step();
  Scaler scaler{64};
  at::Tensor tensor = torch::arange(4);
  at::Tensor late = torch::ones({2});
  std::int64_t epoch = 3;
  bool flag = true;
  float lr = 0.25F;
  std::string name = "run";
  Phase phase = Phase::main;
  std::vector<double> losses{1, 2.5};
  std::map<std::string, at::Tensor> tensors{{"a", torch::ones({2})}};
  std::array<int, 2> pair{1, 2};
  std::optional<std::string> nothing;
  std::optional<int> something = 4;
  std::tuple<int, std::string> both{1, "x"};
  torch::nn::Linear plain(2, 2);
  torch::optim::SGD sgd(plain->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  const std::vector<at::Tensor> before = copy_of(*net);
  const auto plain_weight = plain->weight.detach().clone();
  const State state{{"model", model},
                    {"optimizer", optimizer},
                    {"scheduler", scheduler},
                    {"scaler", scaler},
                    {"tensor", tensor},
                    {"late", late},
                    {"epoch", epoch},
                    {"flag", flag},
                    {"lr", lr},
                    {"name", name},
                    {"phase", phase},
                    {"losses", losses},
                    {"tensors", tensors},
                    {"pair", pair},
                    {"nothing", nothing},
                    {"something", something},
                    {"both", both},
                    {"plain", plain},
                    {"sgd", sgd}};
  fabric.save(folder / "all.pt", state);
  REQUIRE(equal(copy_of(*net), before));

  train(fabric, model, optimizer, 3);
  {
    const torch::NoGradGuard no_grad;
    plain->weight.zero_();
  }
  scheduler.step();
  static_cast<torch::optim::SGDOptions&>(sgd.param_groups()[0].options()).lr(7);
  scaler.scale = 1;
  tensor.zero_();
  late = at::Tensor();
  epoch = 0;
  flag = false;
  lr = 0;
  name = "";
  phase = Phase::warmup;
  losses = {9, 9, 9};
  tensors.clear();
  pair = {};
  nothing = "x";
  something.reset();
  both = {};
  const auto loaded = fabric.load(folder / "all.pt", state);
  CHECK(equal(copy_of(*net), before));
  CHECK(static_cast<torch::optim::AdamWOptions&>(optimizer->param_groups()[0].options()).lr() == 0.1);
  CHECK(static_cast<torch::optim::SGDOptions&>(sgd.param_groups()[0].options()).lr() == 0.1);
  CHECK(plain->weight.equal(plain_weight));
  CHECK(scaler.scale == 64);
  CHECK(tensor.equal(torch::arange(4)));
  CHECK(late.equal(torch::ones({2})));
  CHECK((epoch == 3 && flag && lr == 0.25F && name == "run" && phase == Phase::main));
  CHECK(losses == std::vector<double>{1, 2.5});
  CHECK(tensors.at("a").equal(torch::ones({2})));
  CHECK(pair == std::array<int, 2>{1, 2});
  CHECK((!nothing && something == 4 && both == std::tuple<int, std::string>(1, "x")));
  CHECK(loaded.manifest.at("precision").as<std::string>("") == "F32");
  CHECK(loaded.manifest.at("world_size").as<std::int64_t>("") == 1);
  CHECK(loaded.manifest.at("torch").as<std::string>("") == TORCH_VERSION);
  const auto rate = [&optimizer = optimizer] {
    return static_cast<torch::optim::AdamWOptions&>(optimizer->param_groups()[0].options()).lr();
  };
  scheduler.step();  // goes on from the saved count
  CHECK(rate() == 0.1);
  scheduler.step();
  CHECK(rate() == 0.05);
}

TEST_CASE("[issue-7.1] a module's keys and their order are Python's, buffers included") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  fabric.save(folder / "net.pt", {{"model", net}});
  const std::string path = folder / "net.pt";
  const auto contents = TorchFile::read(fabric::detail::map_file(path), path);
  std::vector<std::string> keys;
  for (const auto& [key, value] : contents.state.as<Dict>("").at("model").as<Dict>("")) keys.push_back(to_text(key));
  CHECK(keys == std::vector<std::string>{"first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean",
                                         "norm.running_var", "norm.num_batches_tracked", "head.weight", "head.bias"});
}

TEST_CASE("[issue-7.1] a struct is saved by the names of its members") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  double best = 0.5;
  Everything state{net, best, {4, "run", {0.5}}};
  fabric.save(folder / "struct.pt", state);
  const auto before = copy_of(*net);
  Net other = net_of(2);
  best = 0;
  Everything loaded{other, best, {}};
  fabric.load(folder / "struct.pt", loaded);
  CHECK(equal(copy_of(*other), before));
  CHECK(best == 0.5);
  CHECK((loaded.counters.epoch == 4 && loaded.counters.name == "run" && loaded.counters.losses.size() == 1));
}

TEST_CASE("[issue-7.1] a map of modules, nested states, and what is not asked for") {
  const Folder folder;
  OnCpu fabric;
  Net a = net_of(1);
  Net b = net_of(2);
  std::map<std::string, Net> nets{{"a", a}, {"b", b}};
  fabric.save(folder / "map.pt", {{"nets", nets}, {"inner", {{"step", 3}, {"text", "x"}}}, {"more", torch::ones({1})}});
  const auto saved = copy_of(*b);
  std::map<std::string, Net> others{{"a", net_of(3)}, {"b", net_of(4)}};
  int step = 0;
  const auto loaded = fabric.load(folder / "map.pt", {{"nets", others}, {"inner", {{"step", step}}}});
  CHECK(equal(copy_of(*others.at("b")), saved));
  CHECK(step == 3);
  CHECK(loaded.rest.as<Dict>("").size() == 1);
  CHECK(loaded.rest.as<Dict>("").at("more").as<at::Tensor>("").equal(torch::ones({1})));
}

TEST_CASE("[issue-7.1] a filter leaves out keys") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  const Filter no_head{{"model", [](const std::string& key, const Value&) { return !key.starts_with("head"); }}};
  fabric.save(folder / "part.pt", {{"model", net}}, no_head);
  Net other = net_of(2);
  const auto before = copy_of(*other);
  CHECK_THROWS_WITH(fabric.load(folder / "part.pt", {{"model", other}}),
                    ContainsSubstring("'model.head.weight', 'model.head.bias'"));
  CHECK(equal(copy_of(*other), before));
  const auto loaded = fabric.load(folder / "part.pt", {{"model", other}}, /*strict=*/false);
  CHECK(loaded.missing == std::vector<std::string>{"model.head.weight", "model.head.bias"});
  CHECK(other->first->weight.equal(net->first->weight));
  CHECK_FALSE(other->head->weight.equal(net->head->weight));
  const Filter unknown{{"modle", [](const std::string&, const Value&) { return true; }}};
  CHECK_THROWS_WITH(fabric.save(folder / "part.pt", {{"model", net}}, unknown), ContainsSubstring("'modle'"));
}

TEST_CASE("[issue-7.1] all of it in the safetensors format") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  auto [model, optimizer] = fabric.setup(net, torch::optim::AdamW(net->parameters(), 0.1));
  train(fabric, model, optimizer, 2);
  std::int64_t step = 2;
  const State state{{"model", model}, {"optimizer", optimizer}, {"step", step}};
  fabric.save<SafetensorsFile>(folder / "all.safetensors", state);
  train(fabric, model, optimizer, 1, 50);
  const auto after = copy_of(*net);
  train(fabric, model, optimizer, 4);
  step = 0;
  fabric.load<SafetensorsFile>(folder / "all.safetensors", state);
  CHECK(step == 2);
  train(fabric, model, optimizer, 1, 50);
  CHECK(equal(copy_of(*net), after));
}

TEST_CASE("[issue-7.3] what does not fit is named, and nothing changes, neither here nor in the file") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  torch::optim::AdamW adamw(net->parameters(), 0.1);
  std::int64_t step = 3;
  fabric.save(folder / "x.pt", {{"model", net}, {"optimizer", adamw}, {"step", step}, {"name", "x"}});
  const std::string file = bytes_of(folder / "x.pt");

  const auto refuses = [&](const State& state, const std::vector<std::string>& words) {
    std::string message;
    try {
      fabric.load(folder / "x.pt", state);
    } catch (const Error& error) {
      message = error.what();
    }
    for (const std::string& word : words) {
      INFO(message);
      CHECK(message.find(word) != std::string::npos);
    }
    CHECK(message.find("nothing was changed") != std::string::npos);
  };
  Net other = net_of(2);
  const auto before = copy_of(*other);
  Net wide(std::make_shared<NetImpl>(5));
  refuses({{"model", other}, {"stepp", step}}, {"'stepp'"});
  refuses({{"model", wide}}, {"'model.head.weight' is Float [2, 4] in it, and Float [5, 4] here", "'model.head.bias'"});
  {
    Net doubles = net_of(2);
    doubles->to(torch::kDouble);
    refuses({{"model", doubles}}, {"Float [4, 3] in it, and Double [4, 3] here", "(it was saved in F32 by 1 ranks)"});
  }
  torch::nn::Linear linear(3, 4);
  refuses({{"model", linear}}, {"'model.weight', 'model.bias'", "'model.first.weight'", "and 4 more"});
  torch::optim::SGD sgd(other->parameters(), 0.1);
  step = 8;
  refuses({{"model", other}, {"optimizer", sgd}, {"step", step}}, {"'optimizer.param_groups.0.momentum'"});
  torch::optim::AdamW fewer(linear->parameters(), 0.1);
  refuses({{"model", other}, {"optimizer", fewer}, {"step", step}}, {"'optimizer.param_groups.0' has another number"});
  refuses({{"step", other}}, {"'step' is an integer in it, and a module here"});
  std::string text;
  refuses({{"model", other}, {"step", text}}, {"'step' is an integer in it, and a text here"});
  refuses({{"model", other}, {"step", 3}}, {"'step' is a constant or a temporary"});
  std::uint8_t small = 0;
  fabric.save(folder / "large.pt", {{"small", 1000}});
  CHECK_THROWS_WITH(fabric.load(folder / "large.pt", {{"small", small}}), ContainsSubstring("1000"));
  CHECK(equal(copy_of(*other), before));
  CHECK(step == 8);
  CHECK(bytes_of(folder / "x.pt") == file);
}

TEST_CASE("[issue-7.3] an object that refuses its state takes what others loaded back with it") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  Scaler first{2};
  Scaler second{4};
  fabric.save(folder / "x.pt", {{"model", net}, {"first", first}, {"second", second}});
  Net other = net_of(2);
  const auto before = copy_of(*other);
  first.scale = 10;
  second = {20, /*refuses=*/true};
  CHECK_THROWS_WITH(fabric.load(folder / "x.pt", {{"model", other}, {"first", first}, {"second", second}}),
                    ContainsSubstring("the scaler refuses"));
  CHECK(equal(copy_of(*other), before));
  CHECK((first.scale == 10 && second.scale == 20));
}

TEST_CASE("[issue-7.3] a damaged file is refused by name, and nothing changes") {
  const Folder folder;
  OnCpu fabric;
  Net net = net_of(1);
  fabric.save(folder / "x.pt", {{"model", net}});
  const std::string good = bytes_of(folder / "x.pt");
  Net other = net_of(2);
  const auto before = copy_of(*other);
  for (std::size_t i = 1; i < 40; ++i) {
    std::string bad = good;
    const std::size_t place = good.size() * i / 40;
    i % 2 == 0 ? bad.resize(place) : static_cast<void>(bad[place] = static_cast<char>(~bad[place]));
    std::ofstream(folder / "bad.pt", std::ios::binary) << bad;
    bool whole = true;
    try {
      fabric.load(folder / "bad.pt", {{"model", other}});
    } catch (const DamagedCheckpoint& error) {
      whole = false;
      CHECK(std::string(error.what()).find("bad.pt") != std::string::npos);
    }
    // Padding may be anything.
    CHECK(equal(copy_of(*other), whole ? copy_of(*net) : before));
    if (whole) other = net_of(2);
  }
  CHECK_THROWS_WITH(fabric.load(folder / "none.pt", {{"model", other}}), ContainsSubstring("No such file"));
}

TEST_CASE("[issue-7.3] a full disk: the error says so, the checkpoint before stays whole, nothing is left behind") {
  const Folder folder;
  OnCpu fabric;
  at::Tensor state = torch::zeros({1 << 16});
  const auto fails = [&](const std::string& path, const std::string& reason) {
    CHECK_THROWS_WITH(fabric.save(path, {{"x", torch::ones({1 << 20})}}), ContainsSubstring(reason));
    fabric.load(path, {{"x", state}});
    CHECK(state.sum().item<double>() == 1 << 16);
    CHECK(std::distance(fs::directory_iterator(fs::path(path).parent_path()), {}) == 1);
  };
  fabric.save(folder / "x.pt", {{"x", torch::ones({1 << 16})}});
  {
    rlimit before{};
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit less{1 << 20, before.rlim_max};
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &less);
    fails(folder / "x.pt", "File too large");
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
  }
  const std::string disk = folder / "disk";
  fs::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=1m") != 0) {
    std::puts("a small tmpfs was not tried: only root may mount it, where the system lets it");
    return;
  }
  fabric.save(disk + "/x.pt", {{"x", torch::ones({1 << 16})}});
  fails(disk + "/x.pt", "No space left on device");
  umount(disk.c_str());
}

TEST_CASE("[issue-7.3] a folder that cannot be written to") {
  OnCpu fabric;
  CHECK_THROWS_WITH(fabric.save("/proc/x.pt", {{"x", 1}}), ContainsSubstring("/proc"));
  CHECK_THROWS_WITH(fabric.save("/dev/null/x.pt", {{"x", 1}}), ContainsSubstring("/dev/null"));
  const Folder folder;
  if (geteuid() == 0) return;  // whom nothing stops
  fabric.save(folder / "x.pt", {{"x", 1}});
  fs::permissions(folder.path, fs::perms::owner_read | fs::perms::owner_exec);
  CHECK_THROWS_WITH(fabric.save(folder / "x.pt", {{"x", 2}}), ContainsSubstring("Permission denied"));
  int x = 0;
  fabric.load(folder / "x.pt", {{"x", x}});
  CHECK(x == 1);
}

TEST_CASE("[issue-7.2] the newest stay, latest means the last, and a damaged one is passed over, which is said") {
  const Folder folder;
  OnCpu fabric;
  std::int64_t step = 0;
  const State state{{"step", step}};
  Checkpoints checkpoints(fabric, {.folder = folder / "run/deep", .keep = 2});
  CHECK_FALSE(checkpoints.load_latest(state).has_value());
  std::ofstream(folder / "run/deep/.step-0000000001.pt.tmp") << "left by a killed job";
  for (step = 10; step <= 30; step += 10) checkpoints.save(step, state);
  const auto names = [&] {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder / "run/deep")) found.push_back(entry.path().filename());
    std::sort(found.begin(), found.end());
    return found;
  };
  Checkpoints again(fabric, {.folder = folder / "run/deep", .keep = 2});
  CHECK(names() == std::vector<std::string>{"latest", "step-0000000020.pt", "step-0000000030.pt"});
  CHECK(fs::read_symlink(folder / "run/deep/latest") == "step-0000000030.pt");
  auto loaded = again.load_latest(state);
  CHECK((step == 30 && loaded && loaded->damaged.empty()));
  int by_link = 0;
  fabric.load(folder / "run/deep/latest", {{"step", by_link}});
  CHECK(by_link == 30);

  fs::resize_file(folder / "run/deep/step-0000000030.pt", 100);
  loaded = again.load_latest(state);
  CHECK(step == 20);
  REQUIRE((loaded && loaded->damaged.size() == 1));
  CHECK(loaded->damaged[0].find("step-0000000030.pt") != std::string::npos);
  CHECK(loaded->file == folder / "run/deep/step-0000000020.pt");
  again.save(25, state);
  CHECK(fs::read_symlink(folder / "run/deep/latest") == "step-0000000025.pt");

  for (const auto& name : names()) {
    if (name != "latest") fs::resize_file(folder / ("run/deep/" + name), 100);
  }
  CHECK_THROWS_AS(again.load_latest(state), DamagedCheckpoint);
  CHECK(step == 20);
  CHECK_THROWS_WITH((Checkpoints(fabric, {.folder = folder / "run", .keep = 0})), ContainsSubstring("keep"));
}

TEST_CASE("[issue-7.5] an asynchronous save holds what was there when it was called") {
  const Folder folder;
  OnCpu fabric;
  at::Tensor values = torch::zeros({1 << 20});
  std::int64_t step = 0;
  const State state{{"values", values}, {"part", values.slice(0, 0, 10)}, {"step", step}};
  Checkpoints checkpoints(fabric, {.folder = folder / "run", .keep = 5, .asynchronous = true});
  for (step = 1; step <= 3; ++step) {
    values.fill_(static_cast<double>(step));
    checkpoints.save(step, state);
    values.fill_(-1);  // while it is written
  }
  checkpoints.close();
  for (std::int64_t saved = 1; saved <= 3; ++saved) {
    at::Tensor back;
    std::int64_t number = 0;
    fabric.load(folder / ("run/step-000000000" + std::to_string(saved) + ".pt"), {{"values", back}, {"step", number}});
    CHECK(number == saved);
    CHECK(back.eq(static_cast<double>(saved)).all().item<bool>());
  }
  const auto size = fs::file_size(folder / "run/latest");
  CHECK(size < 4.1 * (1 << 20));  // the shared part is not there twice
}

TEST_CASE("[issue-7.5] what an asynchronous save fails with comes at the next one, or at close") {
  const Folder folder;
  OnCpu fabric;
  at::Tensor values = torch::ones({1 << 20});
  const State state{{"values", values}};
  Checkpoints checkpoints(fabric, {.folder = folder / "run", .asynchronous = true});
  checkpoints.save(1, state);
  checkpoints.close();
  const auto away = [&] { fs::rename(folder / "run", folder / "away"); };
  const auto back = [&] { fs::rename(folder / "away", folder / "run"); };
  away();
  checkpoints.save(2, state);
  CHECK_THROWS_WITH(checkpoints.save(3, state), ContainsSubstring("step-0000000002.pt"));
  back();
  checkpoints.save(4, state);  // it goes on
  checkpoints.close();
  away();
  checkpoints.save(5, state);
  CHECK_THROWS_WITH(checkpoints.close(), ContainsSubstring("step-0000000005.pt"));
  back();
  CHECK(fs::read_symlink(folder / "run/latest") == "step-0000000004.pt");
}

TEST_CASE("[issue-7.4] random numbers go on as if nothing had happened") {
  const Folder folder;
  OnCpu fabric;
  RandomState random;
  torch::manual_seed(4);
  (void)torch::randn({3});
  fabric.save(folder / "x.pt", {{"random", random}});
  const auto expected = torch::randn({5});
  torch::manual_seed(99);
  fabric.load(folder / "x.pt", {{"random", random}});
  CHECK(torch::randn({5}).equal(expected));
}

TEST_CASE("[issue-7.1] looking up a key takes no longer in a long dict") {
  Dict dict;
  for (std::int64_t i = 0; i < 200000; ++i) dict["key " + std::to_string(i)] = i;
  for (std::int64_t i = 0; i < 200000; ++i)
    REQUIRE(std::get<std::int64_t>(dict.at("key " + std::to_string(i)).data()) == i);
  CHECK(dict.find("key") == nullptr);
}
