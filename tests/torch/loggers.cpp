// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <unistd.h>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using OnCpu = Fabric<Cpu, SingleDevice, F32>;

/// A folder of its own for each test, which is removed at its end.
struct Folder {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("fabric-loggers-" + std::to_string(getpid()));
  Folder() { std::filesystem::remove_all(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

std::string content(const std::filesystem::path& file) {
  std::stringstream text;
  text << std::ifstream(file).rdbuf();
  return text.str();
}

struct Hooks : Callback {
  virtual void on_epoch_end(int epoch, const std::string& note) = 0;
};
struct Recorder : Hooks {
  std::vector<std::string>* record;
  std::string name;
  Recorder(std::vector<std::string>& where, std::string who) : record(&where), name(std::move(who)) {}
  void on_epoch_end(int epoch, const std::string& note) override {
    record->push_back(name + " " + std::to_string(epoch) + " " + note);
  }
};
struct Deaf : Callback {};

}  // namespace

TEST_CASE("[issue-3.6] metrics become rows of a CSV file, columns in the order of their coming") {
  const Folder folder;
  const auto file = folder.path / "deep" / "metrics.csv";
  OnCpu fabric({.loggers = {std::make_shared<CsvLogger>(file)}});
  CHECK_FALSE(std::filesystem::exists(file));
  fabric.log("loss", 0.5, 0);
  CHECK(content(file) == "step,loss\n0,0.5\n");
  fabric.log_dict({{"loss", 0.25}, {"accuracy", 1}}, 1);
  CHECK(content(file) == "step,loss,accuracy\n0,0.5,\n1,0.25,1\n");
  fabric.log("loss", torch::tensor(2.0), 2);
  fabric.log("accuracy", torch::tensor({3}));
  CHECK(content(file) == "step,loss,accuracy\n0,0.5,\n1,0.25,1\n2,2,\n,,3\n");
}

TEST_CASE("[issue-3.6] a CSV file gives back the same doubles") {
  const Folder folder;
  const auto file = folder.path / "exact.csv";
  CsvLogger logger(file);
  const std::vector<double> values{0.1, 1.0 / 3, 1e300, -5e-324, std::nextafter(1.0, 2.0), 123456789.123456789};
  for (const double value : values) logger.log_metrics({{"x", value}}, {});
  std::ifstream lines(file);
  std::string line;
  std::getline(lines, line);
  for (const double value : values) {
    std::getline(lines, line);
    CHECK(std::strtod(line.c_str(), nullptr) == value);
  }
  CHECK_FALSE(std::getline(lines, line));
}

TEST_CASE("[issue-3.6] numbers that are none are written as such, names are quoted where they must be") {
  const Folder folder;
  const auto file = folder.path / "odd.csv";
  CsvLogger logger(file);
  logger.log_metrics({{"a,b", std::nan("")}, {"say \"x\"", std::numeric_limits<double>::infinity()}, {"plain", -1}},
                     {});
  CHECK(content(file) == "\"a,b\",\"say \"\"x\"\"\",plain\nnan,inf,-1\n");
}

TEST_CASE("[issue-3.6] a CSV file that is resumed keeps the rows of the steps before") {
  const Folder folder;
  const auto file = folder.path / "resumed.csv";
  {
    CsvLogger logger(file);
    for (const int step : {0, 1, 2, 3}) logger.log_metrics({{"a,\"b\"", 0.5 * step}}, step);
  }
  std::ofstream(file, std::ios::app) << "4,7";  // cut off
  CsvLogger logger(file, {.resume = true});
  CHECK(content(file) == "step,\"a,\"\"b\"\"\"\n0,0\n1,0.5\n2,1\n3,1.5\n4,7");  // until there is something to log
  logger.log_metrics({{"more", 5}}, {});                                        // which says nothing about steps
  logger.log_metrics({{"a,\"b\"", -1}, {"more", 9}}, 2);
  logger.log_metrics({{"a,\"b\"", -2}}, 3);
  CHECK(content(file) == "step,\"a,\"\"b\"\"\",more\n0,0,\n1,0.5,\n,,5\n2,-1,9\n3,-2,\n");
  std::filesystem::create_directory(folder.path / "folder.csv");
  CHECK_THROWS_WITH(CsvLogger(folder.path / "folder.csv", {.resume = true}).log_metrics({{"x", 1}}, 0),
                    ContainsSubstring("cannot read") && ContainsSubstring("folder.csv"));
  CsvLogger(folder.path / "new.csv", {.resume = true}).log_metrics({{"x", 1}}, 5);
  CHECK(content(folder.path / "new.csv") == "step,x\n5,1\n");
  CsvLogger(file).log_metrics({{"x", 1}}, 0);
  CHECK(content(file) == "step,x\n0,1\n");
}

TEST_CASE("[issue-3.6] a folder that cannot be made is an error that names the file") {
  CHECK_THROWS_WITH(CsvLogger("/proc/nowhere/metrics.csv"), ContainsSubstring("/proc/nowhere/metrics.csv"));
}

TEST_CASE("[issue-3.6] every logger gets every metric; a tensor of several elements is none") {
  const Folder folder;
  OnCpu fabric({.loggers = {std::make_shared<CsvLogger>(folder.path / "a.csv"),
                            std::make_shared<CsvLogger>(folder.path / "b.csv")}});
  fabric.log("x", 1.5);
  CHECK(content(folder.path / "a.csv") == "x\n1.5\n");
  CHECK(content(folder.path / "b.csv") == "x\n1.5\n");
  CHECK_THROWS(fabric.log("x", torch::ones({2})));
  OnCpu().log("x", torch::ones({1}));  // nobody listens, and that is fine
}

TEST_CASE("[issue-3.6] call runs a hook on the callbacks that have it, in their order") {
  std::vector<std::string> record;
  OnCpu fabric({.callbacks = {std::make_shared<Recorder>(record, "first"), std::make_shared<Deaf>(),
                              std::make_shared<Recorder>(record, "second")}});
  fabric.call(&Hooks::on_epoch_end, 3, "done");
  CHECK(record == std::vector<std::string>{"first 3 done", "second 3 done"});
}

TEST_CASE("[issue-3.6] seed_everything makes LibTorch and C repeat themselves, and returns the seed") {
  CHECK(seed_everything(7) == 7);
  const auto tensor = torch::rand({3});
  const int number = std::rand();
  CHECK(OnCpu::seed_everything(7) == 7);
  CHECK(torch::rand({3}).equal(tensor));
  CHECK(std::rand() == number);
  seed_everything(8);
  CHECK_FALSE(torch::rand({3}).equal(tensor));
}

TEST_CASE("[issue-3.6] deterministic mode can be turned on and off") {
  use_deterministic_algorithms();
  CHECK(at::globalContext().deterministicAlgorithms());
  CHECK(at::globalContext().deterministicCuDNN());
  CHECK_FALSE(at::globalContext().deterministicAlgorithmsWarnOnly());
  CHECK(std::string(std::getenv("CUBLAS_WORKSPACE_CONFIG")) == ":4096:8");
  // put_ without accumulation has no deterministic form.
  CHECK_THROWS(torch::zeros({2}).put_(torch::zeros({1}, torch::kLong), torch::ones({1})));
  use_deterministic_algorithms(false);
  CHECK_FALSE(at::globalContext().deterministicAlgorithms());
  CHECK_NOTHROW(torch::zeros({2}).put_(torch::zeros({1}, torch::kLong), torch::ones({1})));
}
