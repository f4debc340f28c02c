// SPDX-License-Identifier: Apache-2.0
//
// What the headers cost to compile: config.hpp without LibTorch, fabric.hpp beside torch/torch.h and with it, and one
// more entry of examples/sweep. With each compiler that is installed; wall-clock seconds and processor seconds.
//   bench_compile_time OUT.json [--quick]

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "support/program.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;
namespace fs = std::filesystem;

constexpr const char* config_check = R"cpp(
#include <fabric/config.hpp>
  static_assert(fabric::CompatibleWith<fabric::Cuda, fabric::Ddp, fabric::BF16Mixed>);
  using FromStrings = fabric::fabric_t<"cuda", "ddp", "bf16-mixed">;
)cpp";
constexpr const char* torch_header = "#include <torch/torch.h>\n";
constexpr const char* fabric_header = "#include <fabric/fabric.hpp>\n";
constexpr const char* sweep_entry = R"cpp(
#include "measure.hpp"
  template Result measure<fabric::Fabric<fabric::Cpu, fabric::Ddp, fabric::BF16Mixed>>(const Settings&);
)cpp";

struct Times {
  Samples wall;
  Samples processor;
};

class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / fmt::format("fabric-compile-time-{}", getpid())) {
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  [[nodiscard]] std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(path_ / name) << text;
    return path_ / name;
  }

 private:
  fs::path path_;
};

/// One source, compiled once a round by one compiler.
class Compilation {
 public:
  Compilation(std::vector<std::string> command, const std::string& source) : command_(std::move(command)) {
    for (const char* word : {"-I", FABRIC_SOURCE_DIR "/include", "-c", "-o", "/dev/null"}) command_.emplace_back(word);
    command_.push_back(source);
  }
  void run() {
    const double start = now();
    Program compiler(command_);
    times.processor.add(compiler.wait());
    times.wall.add(now() - start);
  }
  Times times;

 private:
  std::vector<std::string> command_;
};

bool is_installed(const std::string& program) {
  return std::system((program + " --version > /dev/null 2>&1").c_str()) == 0;
}

void compare(const std::string& name, Compilation& ours, Compilation& baseline, const std::string& baseline_name,
             int rounds, Report& report) {
  for (int round = 0; round < rounds; ++round) {
    (round % 2 == 0 ? ours : baseline).run();
    (round % 2 == 0 ? baseline : ours).run();
  }
  report.add({name, "s", ours.times.wall, baseline.times.wall, baseline_name});
  report.add({name, "processor s", ours.times.processor, baseline.times.processor, baseline_name});
}

}  // namespace

int main(int argc, char** argv) try {
  const Arguments arguments = parse(argc, argv);
  const Folder folder;
  Report report;
  const std::string config = folder.write("config.cpp", config_check);
  const std::string empty = folder.write("empty.cpp", "");
  std::vector<std::string> compilers;
  for (const char* compiler : {"g++", "clang++", "clang++-19"}) {
    if (is_installed(compiler)) compilers.emplace_back(compiler);
  }
  if (arguments.quick && compilers.size() > 1) compilers.resize(1);

  for (const std::string& compiler : compilers) {
    Compilation ours({compiler, "-std=c++20", "-O0"}, config);
    Compilation baseline({compiler, "-std=c++20", "-O0"}, empty);
    compare(compiler + " -O0: config.hpp", ours, baseline, "an empty file", arguments.quick ? 1 : 11, report);
  }
  const std::string torch_flags = FABRIC_BINARY_DIR "/torch.flags";
  if (fs::exists(torch_flags) && !arguments.quick) {
    const std::string torch = folder.write("torch.cpp", torch_header);
    const std::string fabric = folder.write("fabric.cpp", fabric_header);
    const std::string both = folder.write("both.cpp", std::string(torch_header) + fabric_header);
    for (const std::string& compiler : compilers) {
      const std::vector<std::string> command{compiler, "-std=c++20", "-O0", "@" + torch_flags};
      const auto beside_torch = [&](const std::string& what, std::vector<std::string> with, const std::string& source) {
        Compilation ours(with, source);
        Compilation baseline(std::move(with), torch);
        compare(compiler + " -O0" + what, ours, baseline, "torch/torch.h", 5, report);
      };
      beside_torch(": fabric.hpp", command, fabric);
      // What a source costs that has modules of LibTorch's besides.
      beside_torch(": torch/torch.h and fabric.hpp", command, both);
      if (compiler != "g++") continue;
      // g++ looks for garbage whenever its memory has doubled: torch/torch.h ends just before the fourth time, which
      // takes as long as all that fabric.hpp adds. This tells the two apart.
      std::vector<std::string> spacious = command;
      spacious.insert(spacious.end(), {"--param", "ggc-min-heapsize=4000000"});
      beside_torch(", no garbage collection: torch/torch.h and fabric.hpp", spacious, both);
    }
    const std::string entry = folder.write("entry.cpp", sweep_entry);
    const std::string header = folder.write("header.hpp", std::string(torch_header) + fabric_header);
    const auto one_entry = [&](const std::string& compiler, const std::string& optimised) {
      // As in a build: these headers are precompiled.
      std::vector<std::string> command{compiler,
                                       "-std=c++20",
                                       optimised,
                                       "-DNDEBUG",
                                       "@" + torch_flags,
                                       "-I",
                                       FABRIC_SOURCE_DIR "/include",
                                       "-I",
                                       FABRIC_SOURCE_DIR "/examples/sweep"};
      std::vector<std::string> precompile = command;
      const std::string precompiled = header + (compiler == "g++" ? ".gch" : ".pch");
      for (const std::string& word :
           {std::string("-x"), std::string("c++-header"), header, std::string("-o"), precompiled}) {
        precompile.push_back(word);
      }
      Program(precompile).wait();
      command.insert(command.end(), {"-include", header});
      Compilation ours(command, entry);
      Compilation baseline(command, empty);
      const std::string name = fmt::format("{} {}: one entry of sweep", compiler, optimised);
      compare(name, ours, baseline, "torch/torch.h and fabric.hpp, precompiled", optimised == "-O0" ? 15 : 5, report);
      fs::remove(precompiled);
    };
    for (const std::string& compiler : compilers) {
      for (const char* optimised : {"-O0", "-O2"}) one_entry(compiler, optimised);
    }
  }
  report.write(arguments.json);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "compile_time: {}\n", error.what());
  return 1;
}
