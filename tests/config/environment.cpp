// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/environment.hpp"

#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace fabric;

namespace {

/// Variables that live as long as the test.
class Set {
 public:
  Set(std::initializer_list<Variable> list) : variables_(list) {}
  operator Variables() const { return {variables_.data(), variables_.size()}; }  // NOLINT
  [[nodiscard]] Set with(Variable more) const {
    Set all = *this;
    all.variables_.push_back(more);
    return all;
  }

 private:
  std::vector<Variable> variables_;
};

const Host plain{};
const Set torchrun{{"TORCHELASTIC_RUN_ID", "1"}, {"WORLD_SIZE", "4"},     {"RANK", "3"},
                   {"LOCAL_RANK", "1"},          {"GROUP_RANK", "1"},     {"LOCAL_WORLD_SIZE", "2"},
                   {"MASTER_ADDR", "10.0.0.1"},  {"MASTER_PORT", "29501"}};
const Set slurm{
    {"SLURM_NTASKS", "4"},       {"SLURM_PROCID", "3"},          {"SLURM_LOCALID", "1"},
    {"SLURM_NODEID", "1"},       {"SLURM_NTASKS_PER_NODE", "2"}, {"SLURM_NNODES", "2"},
    {"SLURM_JOB_ID", "1234567"}, {"SLURM_JOB_NAME", "train"},    {"SLURM_JOB_NODELIST", "rack[1-2]n[07-09],login"}};
const Set lsf{{"LSB_JOBID", "1234"},
              {"LSB_DJOB_RANKFILE", "/ranks"},
              {"JSM_NAMESPACE_LOCAL_RANK", "1"},
              {"JSM_NAMESPACE_SIZE", "4"},
              {"JSM_NAMESPACE_RANK", "3"}};
const Set open_mpi{{"OMPI_COMM_WORLD_RANK", "3"},
                   {"OMPI_COMM_WORLD_SIZE", "4"},
                   {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                   {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
const Set hydra{{"PMI_RANK", "3"}, {"PMI_SIZE", "4"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};
const Set intel{{"PMI_RANK", "3"}, {"PMI_SIZE", "4"}, {"I_MPI_LOCAL_RANK", "1"}, {"I_MPI_LOCAL_SIZE", "2"}};
const Set pmix{{"PMIX_RANK", "3"}, {"PMIX_SIZE", "4"}, {"PMIX_LOCAL_RANK", "1"}, {"PMIX_LOCAL_SIZE", "2"}};

Environment made(const Variables& variables, const Host& host = plain) {
  const Expected<Environment> environment = construct_environment(detect_environment(variables, host), variables, host);
  REQUIRE(environment);
  return *environment;
}

void check_ranks(const Environment& environment, int world, int global, int local, int node) {
  CHECK(*environment.world_size() == world);
  CHECK(*environment.global_rank() == global);
  CHECK(*environment.local_rank() == local);
  CHECK(*environment.node_rank() == node);
}

}  // namespace

// Detection and values are constant expressions.
static_assert(detect_environment({{"TORCHELASTIC_RUN_ID", "1"}}, Host{}) == EnvironmentKind::torchelastic);
static_assert(*construct_environment(EnvironmentKind::slurm, {{"SLURM_NODELIST", "a[1-2]b[3-4]"}}, Host{})
                   ->main_address() == "a1b3");
static_assert(parse_environment_choice("-slurm,-mpi")->is_off(EnvironmentKind::mpi));

TEST_CASE("the launchers are told by their variables, in a fixed order", "[issue-4.5][environment]") {
  CHECK(detect_environment(torchrun, plain) == EnvironmentKind::torchelastic);
  CHECK(detect_environment(slurm, plain) == EnvironmentKind::slurm);
  CHECK(detect_environment(lsf, plain) == EnvironmentKind::lsf);
  for (const Set& mpi : {open_mpi, hydra, intel, pmix}) CHECK(detect_environment(mpi, plain) == EnvironmentKind::mpi);
  CHECK(detect_environment({}, plain) == EnvironmentKind::local);
  CHECK(detect_environment(slurm.with({"TORCHELASTIC_RUN_ID", "1"}), plain) == EnvironmentKind::torchelastic);
  CHECK(detect_environment(slurm.with({"OMPI_COMM_WORLD_SIZE", "4"}), plain) == EnvironmentKind::slurm);
}

TEST_CASE("a stray variable is no launcher", "[issue-4.5][environment]") {
  for (const char* name :
       {"RANK", "NODE_RANK", "WORLD_SIZE", "GROUP_RANK", "SLURM_JOB_ID", "LSB_JOBID", "MASTER_ADDR"}) {
    const Variable stray{name, "1"};
    const Variables variables(&stray, 1);
    INFO(name);
    CHECK(detect_environment(variables, plain) == EnvironmentKind::local);
    CHECK_FALSE(Environment(EnvironmentKind::local, variables, plain).creates_processes_externally());
  }
  // A single rank under mpirun is not a job.
  CHECK(detect_environment({{"OMPI_COMM_WORLD_SIZE", "1"}, {"OMPI_COMM_WORLD_RANK", "0"}}, plain) ==
        EnvironmentKind::local);
}

TEST_CASE("an environment can be forced or turned off", "[issue-4.5][environment]") {
  const auto choose = [](std::string_view text, const Variables& variables) {
    return detect_environment(variables, plain, *parse_environment_choice(text));
  };
  CHECK(choose("-slurm", slurm) == EnvironmentKind::local);
  CHECK(choose("-torchelastic", slurm.with({"TORCHELASTIC_RUN_ID", "1"})) == EnvironmentKind::slurm);
  CHECK(choose("kubeflow", slurm) == EnvironmentKind::kubeflow);
  CHECK(choose("torchrun", {}) == EnvironmentKind::torchelastic);
  CHECK(choose("auto", slurm) == EnvironmentKind::slurm);
  CHECK(choose("", slurm) == EnvironmentKind::slurm);

  CHECK(parse_environment_choice("slrum").problem.code == Code::unknown_environment);
  CHECK(parse_environment_choice("slrum").problem.nearest == "slurm");
  CHECK(parse_environment_choice("-lfs").problem.nearest == "-lsf");
  CHECK(parse_environment_choice("slrum", "LT_ENVIRONMENT").problem.flag == "LT_ENVIRONMENT");
  CHECK(parse_environment_choice("slurm,mpi").problem.detail == "only one can be forced");
  CHECK(parse_environment_choice("slurm,-slurm").problem.detail == "forced and turned off at once");
  CHECK_FALSE(parse_environment_choice("-local"));
}

TEST_CASE("torchrun says everything", "[issue-4.5][environment]") {
  const Environment environment = made(torchrun);
  check_ranks(environment, 4, 3, 1, 1);
  CHECK(*environment.main_address() == "10.0.0.1");
  CHECK(*environment.main_port() == 29501);
  CHECK(environment.creates_processes_externally());
  CHECK(environment.validate_settings(2, 2).code == Code::none);
  CHECK(environment.validate_settings(2, 1).code == Code::torchelastic_world_size_mismatch);
}

TEST_CASE("Slurm: the first host of the list, a port from the job's number", "[issue-4.5][environment]") {
  const Environment environment = made(slurm);
  check_ranks(environment, 4, 3, 1, 1);
  CHECK(*environment.main_address() == "rack1n07");
  CHECK(*environment.main_port() == 15000 + 4567);
  CHECK(environment.job_id() == 1234567);
  CHECK(environment.validate_settings(4, 2).code == Code::slurm_devices_mismatch);
  CHECK(environment.validate_settings(2, 1).code == Code::slurm_num_nodes_mismatch);
  // A step on some of the job's nodes: rank 0 is on the step's first.
  CHECK(*made(slurm.with({"SLURM_STEP_NODELIST", "rack2n08"})).main_address() == "rack2n08");

  const Expected<HostName> bad = made(Set{{"SLURM_NTASKS", "1"}, {"SLURM_NODELIST", "n[3-1]"}}).main_address();
  CHECK(bad.problem.code == Code::hostlist_invalid);
  CHECK(bad.problem.flag == "SLURM_NODELIST");
}

TEST_CASE("LSF: hosts of the rank file or of LSB_MCPU_HOSTS", "[issue-4.5][environment]") {
  const HostFile ranks{"/ranks", "batch\n\nh0\nh0\n h1 \nh1\nh0\nh2\n"};
  const auto on = [&](std::string_view name) { return Host{.hostname = name, .files = &ranks, .file_count = 1}; };
  const Host h1 = on("h1");
  check_ranks(made(lsf, h1), 4, 3, 1, 1);
  CHECK(*made(lsf, h1).main_address() == "h0");
  CHECK(*made(lsf, h1).main_port() == 10234);
  const Host h2 = on("h2.cluster.local");  // the file has short names
  CHECK(*made(lsf, h2).node_rank() == 2);  // h0 came twice and counts once
  const Host other = on("h9");
  CHECK(construct_environment(EnvironmentKind::lsf, lsf, other).problem.code == Code::lsf_host_not_in_rankfile);

  const Set short_form{{"LSB_JOBID", "7"},
                       {"LSB_MCPU_HOSTS", "batch 1 h0 4 h1 4 "},
                       {"JSM_NAMESPACE_LOCAL_RANK", "1"},
                       {"JSM_NAMESPACE_SIZE", "8"},
                       {"JSM_NAMESPACE_RANK", "5"}};
  CHECK(detect_environment(short_form, h1) == EnvironmentKind::lsf);
  CHECK(*made(short_form, h1).main_address() == "h0");
  CHECK(*made(short_form, h1).node_rank() == 1);
  // The launch node may be the first worker too.
  CHECK(LsfHosts::from_mcpu_hosts("h0 4 h1 4").main_host() == "h0");
  CHECK(LsfHosts::from_mcpu_hosts("h0 4 h1 4").node_rank("h1") == 1);
  CHECK(LsfHosts::from_mcpu_hosts("h0 1").main_host().empty());
}

TEST_CASE("MPI needs no library: Open MPI, MPICH, Intel MPI, PMIx", "[issue-4.5][environment]") {
  for (const Set& mpi : {open_mpi, hydra, intel, pmix}) {
    const Set variables = mpi.with({"MASTER_ADDR", "h0"});
    check_ranks(made(variables), 4, 3, 1, 1);
    CHECK(*made(variables).main_address() == "h0");
    CHECK(*made(variables).main_port() == 12910);
    // Ranks on several hosts, and nobody says where rank 0 is.
    CHECK(made(mpi).main_address().problem.code == Code::env_var_missing);
    CHECK(made(mpi).main_address().problem.flag == "MASTER_ADDR");
  }
  // All on this machine.
  const Set one_host{{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};
  CHECK(*made(one_host).main_address() == "127.0.0.1");
  // Inside a Slurm job that is turned off, or under LSF, the job's hosts are known.
  CHECK(*made(open_mpi.with({"SLURM_JOB_NODELIST", "n[3-4]"})).main_address() == "n3");
  CHECK(*made(open_mpi.with({"LSB_MCPU_HOSTS", "batch 1 h5 4"})).main_address() == "h5");
  // Ranks dealt out node by node.
  CHECK(*made(Set{{"PMI_RANK", "2"}, {"PMI_SIZE", "4"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}})
             .node_rank() == 0);
  CHECK(construct_environment(EnvironmentKind::mpi, {}, plain).problem.code == Code::missing_mpi4py);
}

TEST_CASE("Kubeflow is forced, never detected", "[issue-4.5][environment]") {
  const Set variables{{"MASTER_ADDR", "1.2.3.4"}, {"MASTER_PORT", "500"}, {"WORLD_SIZE", "20"}, {"RANK", "1"}};
  CHECK(detect_environment(variables, plain) == EnvironmentKind::local);
  check_ranks(Environment(EnvironmentKind::kubeflow, variables, plain), 20, 1, 0, 1);
}

TEST_CASE("a local environment takes the strategy's world size", "[issue-4.5][environment]") {
  Environment environment(EnvironmentKind::local, {}, plain);
  CHECK_FALSE(environment.creates_processes_externally());
  CHECK(*environment.main_address() == "127.0.0.1");
  CHECK(*environment.main_port() == 0);  // any free one
  environment.set_world_size(5);
  environment.set_global_rank(3);
  check_ranks(environment, 5, 3, 0, 0);
  CHECK(Environment(EnvironmentKind::local, {{"LOCAL_RANK", "1"}}, plain).creates_processes_externally());
}

TEST_CASE("a user's MASTER_ADDR and MASTER_PORT win everywhere", "[issue-4.5][environment]") {
  const HostFile ranks{"/ranks", "batch\nh0\n"};
  const Host host{.hostname = "h0", .files = &ranks, .file_count = 1};
  for (const EnvironmentKind kind : {EnvironmentKind::torchelastic, EnvironmentKind::slurm, EnvironmentKind::lsf,
                                     EnvironmentKind::mpi, EnvironmentKind::kubeflow, EnvironmentKind::local}) {
    const Set variables{{"SLURM_NODELIST", "n[1-2]"},    {"SLURM_JOB_ID", "1"},         {"LSB_JOBID", "1"},
                        {"LSB_DJOB_RANKFILE", "/ranks"}, {"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "2"},
                        {"MASTER_ADDR", "mine"},         {"MASTER_PORT", "4321"}};
    const Expected<Environment> environment = construct_environment(kind, variables, host);
    INFO(flag_name(kind));
    REQUIRE(environment);
    CHECK(*environment->main_address() == "mine");
    CHECK(*environment->main_port() == 4321);
  }
}

TEST_CASE("half-set variables: one problem names all that are missing", "[issue-4.5][environment]") {
  const Problem torch = made(Set{{"TORCHELASTIC_RUN_ID", "1"}, {"LOCAL_RANK", "x"}}).world_size().problem;
  CHECK(torch.code == Code::env_var_missing);
  CHECK(torch.flag == "WORLD_SIZE");
  CHECK(torch.detail == "missing: WORLD_SIZE, RANK; not integers: LOCAL_RANK");

  const Problem task = made(Set{{"SLURM_NTASKS", "1"}, {"SLURM_LOCALID", "0"}}).global_rank().problem;
  CHECK(task.detail == "missing: SLURM_PROCID, SLURM_NODEID");

  const Problem mpi = made(Set{{"PMI_RANK", "1"}}).world_size().problem;
  CHECK(mpi.flag == "PMI_SIZE");
  CHECK(mpi.detail == "missing: PMI_SIZE, MPI_LOCALRANKID");

  const Problem kube = Environment(EnvironmentKind::kubeflow, {}, plain).main_address().problem;
  CHECK(kube.detail == "missing: MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK");
}

TEST_CASE("variables that contradict each other: one problem names them with their values",
          "[issue-4.5][environment]") {
  const Problem rank = made(Set{{"TORCHELASTIC_RUN_ID", "1"}, {"WORLD_SIZE", "2"}, {"RANK", "5"}}).contradiction();
  CHECK(rank.code == Code::environment_half_set);
  CHECK(rank.names == "RANK=5 and WORLD_SIZE=2");
  CHECK(made(slurm.with({"OMPI_COMM_WORLD_RANK", "0"})).contradiction().names ==
        "OMPI_COMM_WORLD_RANK=0 and SLURM_PROCID=3");
  CHECK(made(Set{{"PMI_RANK", "4"}, {"PMI_SIZE", "4"}}).contradiction().code == Code::environment_half_set);
  for (const Set& good : {torchrun, slurm, open_mpi, hydra, intel, pmix}) {
    CHECK(made(good).contradiction().code == Code::none);
  }
}

TEST_CASE("only rank 0 warns", "[issue-4.5][environment]") {
  const Set id_only{{"TORCHELASTIC_RUN_ID", "1"}};
  CHECK(made(id_only).warnings() == 3);
  CHECK(made(id_only.with({"RANK", "1"})).warnings() == 0);
  CHECK(srun_not_used({}, Host{.srun = true}));
  CHECK_FALSE(srun_not_used(slurm, Host{.srun = true}));
}
