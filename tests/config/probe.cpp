// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/probe.hpp"

#include <stdlib.h>  // NOLINT(modernize-deprecated-headers): setenv is POSIX
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "support/catch.hpp"

using namespace fabric;

TEST_CASE("captured variables are a copy of the environment", "[issue-4.5][probe]") {
  setenv("FABRIC_TEST_VARIABLE", "a=b", 1);
  const CapturedVariables captured = capture_variables();
  setenv("FABRIC_TEST_VARIABLE", "changed", 1);
  const Variables variables = captured;
  CHECK(variables.get("FABRIC_TEST_VARIABLE") == "a=b");
  CHECK(variables.has("PATH"));
  CHECK_FALSE(variables.has("FABRIC_TEST_NO_SUCH_VARIABLE"));
  unsetenv("FABRIC_TEST_VARIABLE");
}

TEST_CASE("the probe says what this machine is", "[issue-4.6][probe]") {
  const CapturedVariables variables = capture_variables();
  const ProbedHost probed = probe_host(variables);
  const Host& host = probed;
  char name[256]{};
  REQUIRE(gethostname(name, sizeof name - 1) == 0);
  CHECK(host.hostname == name);
  CHECK(host.cuda_devices <= static_cast<int>(probed.gpu_uuids().size()));
  CHECK_FALSE(host.interactive);  // a compiled program can be started again
  CHECK(host.fork);
}

TEST_CASE("no GPU is visible when CUDA_VISIBLE_DEVICES is empty", "[issue-4.6][probe]") {
  CHECK(probe_host({{"CUDA_VISIBLE_DEVICES", ""}}).host().cuda_devices == 0);
}

TEST_CASE("the probe looks for srun on PATH and reads LSF's rank file", "[issue-4.5][probe]") {
  const auto folder = std::filesystem::temp_directory_path() / ("fabric-probe-" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  const std::string path = "/nowhere:" + folder.string();
  const std::string ranks = (folder / "ranks").string();
  const Variable set[]{{"PATH", path}, {"LSB_DJOB_RANKFILE", ranks}};
  CHECK_FALSE(probe_host({set, 2}).host().srun);
  CHECK_FALSE(probe_host({set, 2}).host().file(ranks));

  std::ofstream(folder / "srun") << "#!/bin/sh\n";
  std::filesystem::permissions(folder / "srun", std::filesystem::perms::owner_all);
  std::ofstream(ranks) << "batch\nh0\n";
  const ProbedHost probed = probe_host({set, 2});
  CHECK(probed.host().srun);
  REQUIRE(probed.host().file(ranks));
  CHECK(probed.host().file(ranks)->text == "batch\nh0\n");
  std::filesystem::remove_all(folder);
}
