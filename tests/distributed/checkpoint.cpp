// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint distributed
// timeout: 300
//
// Checkpoints of jobs of one and of two processes: training goes on bit for bit after a kill, a kill at any moment
// leaves a whole checkpoint, and no rank waits without end. Run with `job NAME` as arguments, this program is such a
// job.
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/fabric.hpp"
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"
#include "support/job.hpp"
#include "support/process.hpp"

namespace {

using namespace fabric;
using tests::Process;
using tests::say;
using tests::variable;
namespace fs = std::filesystem;
using OnOne = Fabric<Cpu, SingleDevice, F32>;
using OnTwo = Fabric<Cpu, Ddp, F32>;

// ---- The jobs ----

class Rows : public torch::data::datasets::BatchDataset<Rows, torch::data::Example<>> {
 public:
  torch::data::Example<> get_batch(c10::ArrayRef<std::size_t> rows) override {
    const auto index = torch::tensor(std::vector<std::int64_t>(rows.begin(), rows.end()));
    return {inputs_.index_select(0, index), targets_.index_select(0, index)};
  }
  [[nodiscard]] std::optional<std::size_t> size() const override { return 52; }

 private:
  at::Tensor inputs_ = torch::arange(52 * 6, torch::kFloat).view({52, 6}).sin();
  at::Tensor targets_ = torch::arange(52, torch::kFloat).view({52, 1}).cos();
};

torch::nn::Sequential make_net() {
  torch::manual_seed(3);
  return torch::nn::Sequential(torch::nn::Linear(6, 32), torch::nn::BatchNorm1d(32), torch::nn::ReLU(),
                               torch::nn::Dropout(0.3), torch::nn::Linear(32, 1));
}

/// A number that says each bit.
std::string digits(double number) {
  char text[64];
  std::snprintf(text, sizeof text, "%a", number);
  return text;
}

/// Twenty steps; a checkpoint every five; dies on the way if told so, and goes on from the newest if there is one.
template <class F>
int train(F& fabric) {
  at::set_num_threads(1);
  fabric.launch();
  auto net = make_net();
  auto [model, optimizer] = fabric.setup(net, torch::optim::AdamW(net->parameters(), 0.01));
  torch::optim::StepLR scheduler(optimizer.optimizer(), 3, 0.7);
  auto loader = fabric.setup_dataloader(Rows(), {.batch_size = 4, .shuffle = true, .seed = 5, .workers = 1});
  torch::manual_seed(100 + static_cast<std::uint64_t>(fabric.global_rank()));  // each rank drops out its own
  RandomState random;
  std::int64_t step = 0;
  double sum = 0;
  const State state{{"model", model},   {"optimizer", optimizer}, {"scheduler", scheduler}, {"loader", loader},
                    {"random", random}, {"step", step},           {"sum", PerRank(sum)}};
  Checkpoints checkpoints(fabric,
                          {.folder = variable("CKPT_FOLDER", ""), .asynchronous = variable("CKPT_ASYNC", "") == "1"});
  if (const auto loaded = checkpoints.load_latest(state)) fabric.print("resumed at ", step);
  const std::string die_at = variable("CKPT_DIE_AT", "");
  while (step < 20) {
    for (auto& batch : loader) {
      optimizer.zero_grad();
      const at::Tensor loss = torch::mse_loss(model(batch.data), batch.target);
      fabric.backward(loss);
      optimizer.step();
      scheduler.step();
      ++step;
      sum += loss.template item<double>();
      fabric.print("step ", step, " loss ", digits(loss.template item<double>()));
      if (step % 5 == 0) checkpoints.save(step, state);
      if (std::to_string(step) == die_at) raise(SIGKILL);
      if (step == 20) break;
    }
  }
  checkpoints.close();
  double parameters = 0;
  for (const auto& tensor : net->parameters())
    parameters += tensor.to(torch::kDouble).pow(2).sum().template item<double>();
  for (const auto& tensor : net->buffers())
    parameters += tensor.to(torch::kDouble).pow(2).sum().template item<double>();
  say("rank " + std::to_string(fabric.global_rank()) + " ends with " + digits(parameters) + " " + digits(sum) + " " +
      digits(torch::rand({}).template item<double>()));
  return 0;
}

/// Saves one state after the other, each a step further, until it is killed.
int save_forever() {
  OnOne fabric;
  std::int64_t step = 0;
  at::Tensor values = torch::zeros({1 << 20});
  at::Tensor more = torch::zeros({1 << 18}, torch::kDouble);
  const State state{{"step", step}, {"values", values}, {"more", more}};
  Checkpoints checkpoints(fabric,
                          {.folder = variable("CKPT_FOLDER", ""), .asynchronous = variable("CKPT_ASYNC", "") == "1"});
  checkpoints.load_latest(state);
  for (;;) {
    ++step;
    values.fill_(static_cast<double>(step));
    more.fill_(static_cast<double>(step));
    checkpoints.save(step, state);
    say("saved " + std::to_string(step) + ".");
  }
}

OnTwo& on_two() {
  static OnTwo fabric({.devices = 2});
  fabric.launch();
  return fabric;
}
constexpr std::chrono::milliseconds soon = std::chrono::seconds(2);

const std::map<std::string, std::function<int()>> jobs{
    {"train on one",
     [] {
       OnOne fabric;
       return train(fabric);
     }},
    {"train on two",
     [] {
       OnTwo fabric({.devices = 2});
       return train(fabric);
     }},
    {"save forever", save_forever},
    {"rank 0 alone saves",
     [] {
       auto& fabric = on_two();
       if (fabric.global_rank() == 0) fabric.save(variable("CKPT_FOLDER", "") + "/x.pt", {{"x", 1}}, {}, soon);
       fabric.barrier();
       return 0;
     }},
    {"rank 1 alone saves",
     [] {
       auto& fabric = on_two();
       if (fabric.global_rank() == 1) fabric.save(variable("CKPT_FOLDER", "") + "/x.pt", {{"x", 1}}, {}, soon);
       fabric.barrier();
       return 0;
     }},
    {"one saves and one loads",
     [] {
       auto& fabric = on_two();
       int x = 0;
       if (fabric.global_rank() == 0) {
         fabric.save(variable("CKPT_FOLDER", "") + "/x.pt", {{"x", 1}}, {}, soon);
       } else {
         fabric.load(variable("CKPT_FOLDER", "") + "/x.pt", {{"x", x}}, true, soon);
       }
       return 0;
     }},
    {"does not fit on rank 1",
     [] {
       auto& fabric = on_two();
       const std::string path = variable("CKPT_FOLDER", "") + "/x.pt";
       at::Tensor saved = torch::ones({3});
       fabric.save(path, {{"x", saved}});
       at::Tensor here = fabric.global_rank() == 0 ? torch::zeros({3}) : torch::zeros({4});
       try {
         fabric.load(path, {{"x", here}});
       } catch (const Error& error) {
         say("rank " + std::to_string(fabric.global_rank()) +
             (here.sum().item<double>() == 0 ? " unchanged: " : " CHANGED: ") + error.what());
       }
       fabric.save(path, {{"x", 2}});  // and it goes on
       int x = 0;
       fabric.load(path, {{"x", x}});
       say("rank " + std::to_string(fabric.global_rank()) + " got " + std::to_string(x));
       return 0;
     }},
    {"nobody can write",
     [] {
       auto& fabric = on_two();
       try {
         fabric.save("/proc/no/x.pt", {{"x", 1}});
       } catch (const Error& error) {
         say("rank " + std::to_string(fabric.global_rank()) + ": " + error.what());
       }
       return 0;
     }},
};

// ---- The tests ----

struct Folder {
  fs::path path;
  Folder() {
    std::string name = fs::temp_directory_path() / "fabric-checkpoint-XXXXXX";
    path = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
};

Process job(const std::string& name, const Folder& folder, std::vector<Process::Variable> variables = {}) {
  variables.emplace_back("CKPT_FOLDER", folder.path);
  return Process({"/proc/self/exe", "job", name}, variables);
}

/// The lines that begin with `word`, behind the label of a child's, sorted: two ranks print at the same time.
std::vector<std::string> lines(const std::string& text, const std::string& word) {
  std::vector<std::string> found;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    constexpr std::string_view label = "[rank 1] ";
    if (text.compare(at, label.size(), label) == 0) at += label.size();
    if (text.compare(at, word.size(), word) == 0) found.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  std::sort(found.begin(), found.end());
  return found;
}

void goes_on(const std::string& name, std::size_t ranks, const std::string& asynchronous) {
  const Folder whole_folder;
  auto whole = job(name, whole_folder);
  const int code = whole.wait();
  INFO(whole.output());
  REQUIRE(code == 0);
  REQUIRE(lines(whole.output(), "step ").size() == 20);
  REQUIRE(lines(whole.output(), "rank ").size() == ranks);

  const Folder folder;
  auto killed = job(name, folder, {{"CKPT_DIE_AT", "13"}, {"CKPT_ASYNC", asynchronous}});
  REQUIRE(killed.wait() == 128 + SIGKILL);
  auto resumed = job(name, folder, {{"CKPT_ASYNC", asynchronous}});
  const int resumed_code = resumed.wait();
  INFO(resumed.output());
  REQUIRE(resumed_code == 0);
  // An asynchronous write of step 10 may have been killed with the rest.
  const bool from_10 = lines(resumed.output(), "resumed at 10").size() == 1;
  REQUIRE((from_10 || (asynchronous == "1" && lines(resumed.output(), "resumed at 5").size() == 1)));
  auto expected = lines(whole.output(), "step ");
  const auto got = lines(resumed.output(), "step ");
  CHECK(got.size() == (from_10 ? 10 : 15));
  for (const auto& line : got) CHECK(std::find(expected.begin(), expected.end(), line) != expected.end());
  CHECK(lines(resumed.output(), "rank ") == lines(whole.output(), "rank "));
}

}  // namespace

TEST_CASE("[issue-7.4] ten steps, a kill, and ten more are twenty steps bit for bit, on one device") {
  goes_on("train on one", 1, "0");
}

TEST_CASE("[issue-7.4] ten steps, a kill, and ten more are twenty steps bit for bit, on two processes") {
  goes_on("train on two", 2, "0");
}

TEST_CASE("[issue-7.5] the same with asynchronous saves") { goes_on("train on two", 2, "1"); }

TEST_CASE("[issue-7.3] another world size is refused by name") {
  const Folder folder;
  auto two = job("train on two", folder);
  REQUIRE(two.wait() == 0);
  auto one = job("train on one", folder);
  CHECK(one.wait() != 0);
  CHECK_THAT(one.output(), ContainsSubstring("'random'") && ContainsSubstring("saved by 2 ranks, and this job has 1") &&
                               ContainsSubstring("nothing was changed"));
}

TEST_CASE(
    "[issue-7.3] a kill at any moment of a save leaves a whole checkpoint, not older than the last that was saved") {
  const char* soak = std::getenv("FABRIC_SOAK");
  const int kills = soak == nullptr ? 20 : std::atoi(soak);
  const Folder folder;
  std::mt19937 random(7);
  int in_a_save = 0;
  for (int i = 0; i < kills; ++i) {
    auto process = job("save forever", folder, {{"CKPT_ASYNC", i % 4 == 3 ? "1" : "0"}});
    REQUIRE(process.wait_for("saved "));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 60000));
    process.kill(SIGKILL);
    REQUIRE(process.wait() == 128 + SIGKILL);
    const bool asynchronous = i % 4 == 3;
    std::int64_t said = 0;
    for (const auto& line : lines(process.output(), "saved ")) {
      if (line.ends_with(".")) said = std::max<std::int64_t>(said, std::stoll(line.substr(6)));
    }
    for (const auto& entry : fs::directory_iterator(folder.path))
      in_a_save += entry.path().extension() == ".tmp" ? 1 : 0;

    OnOne fabric;
    std::int64_t step = 0;
    at::Tensor values;
    at::Tensor more;
    Checkpoints checkpoints(fabric, {.folder = folder.path});
    const auto loaded = checkpoints.load_latest({{"step", step}, {"values", values}, {"more", more}});
    REQUIRE(loaded.has_value());
    CHECK(loaded->damaged.empty());
    CHECK(step >= said - (asynchronous ? 1 : 0));  // an asynchronous save may still be on its way
    CHECK(values.eq(static_cast<double>(step)).all().item<bool>());
    CHECK(more.eq(static_cast<double>(step)).all().item<bool>());
    CHECK(fs::exists(folder.path / "latest"));
  }
  std::printf("kills survived: %d of %d, %d of them with a file half-written\n", kills, kills, in_a_save);
  CHECK(in_a_save > 0);
}

TEST_CASE("[issue-7.2] a save that not all ranks come to ends soon, with the ranks by number") {
  const Folder folder;
  auto zero = job("rank 0 alone saves", folder);
  CHECK(zero.wait(30) > 0);
  CHECK_THAT(zero.output(), ContainsSubstring("x.pt was called on rank 0, but not on rank 1 within 2.0 s"));
  auto one = job("rank 1 alone saves", folder);
  CHECK(one.wait(30) > 0);
  CHECK_THAT(one.output(), ContainsSubstring("was called on rank 1, but rank 0 did not come within 2.0 s"));
  auto mixed = job("one saves and one loads", folder);
  CHECK(mixed.wait(30) > 0);
  CHECK_THAT(mixed.output(), ContainsSubstring("rank 0 is in save of") && ContainsSubstring("rank 1 in load of"));
}

TEST_CASE("[issue-7.3] what one rank cannot load, no rank loads; what rank 0 cannot write, all know") {
  const Folder folder;
  auto process = job("does not fit on rank 1", folder);
  REQUIRE(process.wait() == 0);
  for (const std::string rank : {"rank 0", "rank 1"}) {
    CHECK_THAT(process.output(), ContainsSubstring(rank + " unchanged: "));
    CHECK_THAT(process.output(), ContainsSubstring(rank + " got 2"));
  }
  CHECK_THAT(process.output(), ContainsSubstring("'x' is Float [3] in it, and Float [4] here"));
  auto nobody = job("nobody can write", folder);
  REQUIRE(nobody.wait() == 0);
  CHECK(lines(nobody.output(), "rank 0: fabric: cannot make the folder").size() == 1);
  CHECK(lines(nobody.output(), "rank 1: fabric: cannot make the folder").size() == 1);
}

int main(int argc, char** argv) try {
  if (argc == 3 && std::string(argv[1]) == "job") return jobs.at(argv[2])();
  return Catch::Session().run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  std::exit(1);
}
