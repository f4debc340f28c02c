// SPDX-License-Identifier: Apache-2.0
//
// Environments as `resolve` uses them: chosen by flag and by variable, and refused when they cannot be true.
#include <vector>

#include "fabric/config.hpp"
#include "support/catch.hpp"

using namespace fabric;

namespace {

const std::vector<Variable> slurm{{"SLURM_NTASKS", "2"},    {"SLURM_NTASKS_PER_NODE", "2"}, {"SLURM_PROCID", "1"},
                                  {"SLURM_LOCALID", "1"},   {"SLURM_NODEID", "0"},          {"SLURM_JOB_ID", "77"},
                                  {"SLURM_NODELIST", "n7"}, {"SLURM_JOB_NAME", "train"}};

Resolution resolved(std::vector<Variable> variables, std::string_view environment = {}) {
  return resolve({.accelerator = "cpu", .strategy = "ddp", .devices = 2, .environment = environment},
                 {variables.data(), variables.size()});
}

std::vector<Variable> with(std::vector<Variable> variables, Variable more) {
  variables.push_back(more);
  return variables;
}

}  // namespace

TEST_CASE("--environment forces an environment or turns one off", "[issue-4.5][environment]") {
  CHECK(resolved(slurm).environment.kind == EnvironmentKind::slurm);
  CHECK(resolved(slurm).external_launch);
  CHECK(resolved(slurm, "-slurm").environment.kind == EnvironmentKind::local);
  CHECK_FALSE(resolved(slurm, "-slurm").external_launch);
  CHECK(resolved(slurm, "local").environment.kind == EnvironmentKind::local);
  CHECK(resolved(slurm, "torchelastic").code() == Code::env_var_missing);
}

TEST_CASE("LT_ENVIRONMENT does the same", "[issue-4.5][environment]") {
  CHECK(resolved(with(slurm, {"LT_ENVIRONMENT", "-slurm"})).environment.kind == EnvironmentKind::local);
  const Resolution typo = resolved(with(slurm, {"LT_ENVIRONMENT", "slrum"}));
  CHECK(typo.code() == Code::unknown_environment);
  CHECK(typo.problems.front().nearest == "slurm");
}

TEST_CASE("mpirun's variables are enough to join", "[issue-4.5][environment]") {
  const Resolution rank = resolved({{"OMPI_COMM_WORLD_RANK", "1"},
                                    {"OMPI_COMM_WORLD_SIZE", "2"},
                                    {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                    {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  REQUIRE(rank.ok());
  CHECK(rank.environment.kind == EnvironmentKind::mpi);
  CHECK(rank.external_launch);
  CHECK(rank.world_size.value == 2);
  CHECK(rank.global_rank.value == 1);
  CHECK(rank.local_rank.value == 1);
  CHECK(rank.main_address == "127.0.0.1");
}

TEST_CASE("a half-set launcher is one problem that names all that is missing", "[issue-4.5][environment]") {
  const Resolution half = resolved({{"TORCHELASTIC_RUN_ID", "1"}});
  REQUIRE(half.problems.size() == 1);
  CHECK(half.code() == Code::env_var_missing);
  CHECK(half.problems.front().detail == "missing: WORLD_SIZE, RANK, LOCAL_RANK");
}

TEST_CASE("contradicting variables are one problem that names them", "[issue-4.5][environment]") {
  const Resolution inside = resolved(with(slurm, {"OMPI_COMM_WORLD_RANK", "0"}));
  REQUIRE(inside.problems.size() == 1);
  CHECK(inside.code() == Code::environment_half_set);
  CHECK(inside.problems.front().names == "OMPI_COMM_WORLD_RANK=0 and SLURM_PROCID=1");
  CHECK(inside.problems.front().detail.view().find("LT_ENVIRONMENT=mpi") != std::string_view::npos);
}

TEST_CASE("ranks that cannot find rank 0 are refused before they wait for it", "[issue-4.5][environment]") {
  std::vector<Variable> broken = slurm;
  broken[6].value = "n[7";
  CHECK(resolved(broken).code() == Code::hostlist_invalid);
  const Resolution several_hosts =
      resolved({{"PMI_RANK", "1"}, {"PMI_SIZE", "4"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}});
  CHECK(several_hosts.code() == Code::env_var_missing);
  CHECK(several_hosts.problems.front().flag == "MASTER_ADDR");
}
