// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "fabric/comm/process_group.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/connector/environment.hpp"
#include "fabric/connector/message.hpp"
#include "fabric/connector/probe.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/children.hpp"
#include "fabric/launch/job.hpp"
#include "fabric/launch/meeting.hpp"
#include "fabric/launch/options.hpp"
#include "fabric/launch/supervise.hpp"
#include "fabric/launch/threads.hpp"

namespace fabric {
namespace detail {

template <class T>
T value_or_throw(const Expected<T>& expected) {
  if (!expected) throw Error(message(expected.problem));
  return expected.value;
}

/// Of this process, at this time.
inline std::string unique_identity() {
  return std::to_string(getpid()) + "-" + std::to_string(std::chrono::system_clock::now().time_since_epoch().count());
}

/// This process's place in its job, and where the job meets.
struct Place {
  World world;
  int local_size = 1;
  bool external = false;      ///< Somebody else started all processes; otherwise this one starts the others.
  bool agent_serves = false;  ///< The store is there already: torchrun's.
  Meeting meeting;
};

/// Reads the place from the selection and this process's variables. Throws fabric::Error for variables that are missing
/// or contradict the flags.
inline Place find_place(const Selection& selection, std::chrono::milliseconds timeout) {
  const CapturedVariables captured = capture_variables();
  const Variables variables = captured;
  const ProbedHost probed = probe_host(variables);
  const Host& host = probed;
  const EnvironmentKind kind = selection.environment.kind;
  auto environment = value_or_throw(construct_environment(kind, variables, host));

  Place place;
  World& world = place.world;
  const int local_size = place.local_size = selection.devices.count;
  world.node_rank = value_or_throw(environment.node_rank());
  world.local_rank = value_or_throw(environment.local_rank());
  environment.set_world_size(local_size * selection.num_nodes);
  environment.set_global_rank(world.node_rank * local_size + world.local_rank);
  world.size = value_or_throw(environment.world_size());
  world.global_rank = value_or_throw(environment.global_rank());
  const bool custom = kind == EnvironmentKind::custom;
  if (custom) {
    world.size = selection.world_size.value;
    world.global_rank = selection.global_rank.value;
    world.local_rank = selection.local_rank.value;
    world.node_rank = selection.node_rank.value;
  }
  place.external = custom ? selection.external_launch : environment.creates_processes_externally();
  const Problem mismatch = environment.validate_settings(local_size, selection.num_nodes);
  if (mismatch.code != Code::none) throw Error(message(mismatch));

  // Nobody else compares these: a custom environment, and a second Fabric in a job that a first one started.
  int started = custom ? world.size : local_size * selection.num_nodes;
  if (kind == EnvironmentKind::local && place.external && variables.has("WORLD_SIZE")) {
    started = std::atoi(std::string(variables.get("WORLD_SIZE")).c_str());
  }
  if (started != local_size * selection.num_nodes) {
    throw Error("fabric: " + std::to_string(started) + " processes were started, but " + std::to_string(local_size) +
                " devices on " + std::to_string(selection.num_nodes) + " nodes are selected: make both agree");
  }

  Meeting& meeting = place.meeting;
  meeting.address = std::string(value_or_throw(environment.main_address()).view());
  meeting.run = run_identity(kind, variables);
  meeting.timeout = timeout;
  const int port = value_or_throw(environment.main_port());
  if (kind == EnvironmentKind::local && selection.num_nodes > 1 && port == 0) {
    throw Error(
        "fabric: launch: " + std::to_string(selection.num_nodes) +
        " nodes, but nothing says how they find each other: set MASTER_ADDR, MASTER_PORT and NODE_RANK on each, or "
        "use a launcher (torchrun, srun, mpirun). Slurm counts as one if the job's name is not bash or interactive, as "
        "it is in salloc: name the job, or set LT_ENVIRONMENT=slurm");
  }
  const bool derived = !variables.has("MASTER_PORT") &&
                       (kind == EnvironmentKind::slurm || kind == EnvironmentKind::lsf || kind == EnvironmentKind::mpi);
  meeting.ports = derived ? candidate_ports(port, meeting.run) : std::vector<int>{port};
  meeting.fixed = !derived && port != 0;
  place.agent_serves = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True";
  if (!place.external && selection.num_nodes == 1 && meeting.run.empty()) meeting.run = unique_identity();
  return place;
}

/// What the process of that local rank is to know.
inline std::vector<Children::Setting> settings_of(const Place& place, int local_rank, int port) {
  std::vector<Children::Setting> settings{{"MASTER_ADDR", place.meeting.address},
                                          {"MASTER_PORT", std::to_string(port)},
                                          {"NODE_RANK", std::to_string(place.world.node_rank)},
                                          {"LOCAL_RANK", std::to_string(local_rank)},
                                          {"WORLD_SIZE", std::to_string(place.world.size)},
                                          {"FABRIC_RUN_ID", place.meeting.run}};
  if (place.local_size > 1 && !threads_are_chosen()) {
    settings.emplace_back("OMP_NUM_THREADS", std::to_string(threads_each(place.local_size)));
  }
  return settings;
}

inline std::vector<Children::Plan> plans(const Place& place, int first_local_rank, int port, bool labels) {
  std::vector<Children::Plan> plans;
  for (int local_rank = first_local_rank; local_rank < place.local_size; ++local_rank) {
    const int rank = place.world.node_rank * place.local_size + local_rank;
    plans.push_back({.rank = rank, .settings = settings_of(place, local_rank, port), .label = labels && rank != 0});
  }
  return plans;
}

/// Starts this node's other ranks, which live and die with this process.
inline void start_children(const Place& place, int port, bool labels) {
  Children::of_this_process().start(plans(place, 1, port, labels), [](const Children::Failure& failure) {
    if (!Job::of_this_process().fail(failure.reason, failure.code, failure.rank)) {
      std::fprintf(stderr, "fabric: rank %d (process %d) %s\n", failure.rank, static_cast<int>(failure.pid),
                   failure.reason.c_str());
    }
    Job::leave(failure.code);
  });
  for (const auto& [name, value] : settings_of(place, 0, port)) setenv(name.c_str(), value.c_str(), 1);
}

inline c10::intrusive_ptr<c10d::Store> open_store(const Meeting& meeting, int port, bool serves) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(port);
  options.isServer = serves;
  options.waitWorkers = false;
  options.timeout = meeting.timeout;
  return c10::make_intrusive<c10d::TCPStore>(meeting.address, options);
}

/// Gathers the ranks: starts children if this process is to, comes to the meeting, and waits for all. Returns the
/// address at which other hosts reach this one, if any do.
inline std::string come_together(Place& place, const LaunchOptions& options, int console) {
  Job& job = Job::of_this_process();
  Meeting& meeting = place.meeting;
  const World& world = place.world;
  const bool first = world.global_rank == 0;
  Hello hello{.run = meeting.run,
              .rank = world.global_rank,
              .size = world.size,
              .pid = getpid(),
              .network = network_identity(),
              .host = host_name()};
  if (const char* interface = std::getenv("GLOO_SOCKET_IFNAME")) {
    hello.device = address_of_interface(interface);
    hello.chosen_by = std::string("GLOO_SOCKET_IFNAME=") + interface;
  }
  // An elastic agent's store outlives the processes that it starts again: each attempt has an identity of its own.
  const std::string key = "fabric/" + meeting.run + "/rank_0";
  if (place.agent_serves) {
    job.store = open_store(meeting, meeting.ports.front(), false);
    if (first) hello.run = meeting.run += "/" + unique_identity();
  }
  int port = meeting.ports.front();
  if (first) {
    const Upbringing& mine = Upbringing::of_this_process();
    int listener = mine.listener;
    if (listener < 0 && place.agent_serves) listener = listen_on(meeting.address, 0);
    if (listener < 0) listener = take_port(meeting, hello);
    port = port_of(listener);
    if (!place.agent_serves) job.store = open_store(meeting, 0, true);
    const auto* served = dynamic_cast<const c10d::TCPStore*>(job.store.get());
    job.serve(listener, {.own = hello,
                         .store_port = served->getPort(),
                         .timeout = meeting.timeout,
                         .has_children = !place.external && place.local_size > 1,
                         .output = mine.reason >= 0 ? mine.reason : console});
    if (place.agent_serves) job.store->set(key, std::to_string(port) + " " + meeting.run);
  }
  if (!place.external && place.local_size > 1) start_children(place, port, options.log_dir.empty());
  int tried = -1;
  if (!first) {
    if (!hello.chosen_by.empty()) {
      tried = listen_on({}, 0);
      hello.listens_at = tried < 0 ? 0 : port_of(tried);
    }
    if (place.agent_serves) meeting.ports.clear();
    job.connect(find_rank_0(meeting, hello, world.node_rank, [&] {
      if (!place.agent_serves || !job.store->check({key})) return;
      // What an earlier attempt has left there is replaced when rank 0 is back.
      std::istringstream said(job.store->get_to_str(key));
      (said >> port).ignore(1);
      std::getline(said, meeting.run);
      meeting.ports = {port};
      hello.run = meeting.run;
    }));
  }
  const Message welcome = job.join(hello, world.local_rank, !first);
  if (tried >= 0) close(tried);
  if (!first && !place.agent_serves) job.store = open_store(meeting, welcome.number, false);
  return welcome.text.empty() ? job.own_address() : welcome.text;
}

/// Starts all ranks of this node and waits for them. Throws fabric::Error where that cannot be.
inline Supervised supervise_ranks(const Selection& selection, const Place& place, const LaunchOptions& options) {
  const bool forks = selection.start_method == StartMethod::fork;
  if (Job::of_this_process().joined()) {
    throw Error("fabric: launch: this process is a rank of a job already, and cannot start another job");
  }
  if (forks && selection.environment.kind == EnvironmentKind::custom) {
    throw Error("fabric: launch: forked processes cannot ask a custom environment who they are: use ddp_spawn or ddp");
  }
  int listener = -1;
  int port = place.meeting.ports.front();
  if (place.world.node_rank == 0) {
    listener = take_port(place.meeting, {.run = place.meeting.run, .size = place.world.size, .pid = getpid()});
    port = port_of(listener);
  }
  return supervise(plans(place, 0, port, options.log_dir.empty()), forks, listener);
}

/// Processes on one host that may use the same cores share them evenly, unless somebody has divided them already. Some
/// launchers give each process cores of its own.
inline void divide_threads_of_launcher(const std::string& key, c10d::Store& store) {
  if (!threads_are_chosen()) divide_threads(static_cast<int>(store.add(key, 0)));
}

}  // namespace detail

/// Brings this process into the world that `selection` describes: as a process that a launcher (torchrun, srun, ...) or
/// a parent started, or as one that starts the others. Then makes the process group. Where the strategy's processes are
/// spawned or forked, the calling process supervises them instead, and ends as they do.
///
/// Throws fabric::Error for variables that are missing or contradict the flags, and when the other ranks do not come
/// within the timeout.
template <class = void>
[[nodiscard]] World join_world(const Selection& selection, at::Device device, const LaunchOptions& given = {}) {
  Children::join_parent();
  const LaunchOptions options = detail::with_variables(given);
  detail::Place place = detail::find_place(selection, options.timeout);
  if (!place.external && selection.start_method != StartMethod::popen) {
    const detail::Supervised job = detail::supervise_ranks(selection, place, options);
    if (!job.in_rank) {
      std::fputs(job.failure.c_str(), stderr);
      std::exit(job.code);
    }
    place = detail::find_place(selection, options.timeout);
  }

  World& world = place.world;
  detail::Job& job = detail::Job::of_this_process();
  static std::string address;
  static std::string run;  // with the attempt's own identity, where a store outlives attempts
  static std::string cores;
  const bool comes = !job.joined();
  if (comes) {
    int console = STDERR_FILENO;
    if (!options.log_dir.empty()) {
      console = detail::write_own_log(options.log_dir, world.global_rank);
      job.has_own_log();
    }
    if (!place.external) detail::divide_threads(place.local_size);  // before that is settled for the children
    address = detail::come_together(place, options, console);
    run = place.meeting.run;
    cores = "fabric/" + place.meeting.run + "/cores/" + detail::network_identity() + "/" + detail::usable_cores();
    if (place.external) job.store->add(cores, 1);
  } else if (job.size() != world.size) {
    throw Error("fabric: launch: this process is in a job of " + std::to_string(job.size()) +
                " already, and cannot be in one of " + std::to_string(world.size));
  }
  static int groups = 0;  // ranks make their groups in the same order, so that equal numbers meet
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  world.group = make_process_group(world, device,
                                   {.store = job.store,
                                    .name = "fabric/" + run + "/" + std::to_string(groups++),
                                    .device = interface != nullptr ? interface : address,
                                    .device_is_interface = interface != nullptr,
                                    .timeout = options.timeout,
                                    .detect_desync = options.detect_desync});
  if (comes && place.external) detail::divide_threads_of_launcher(cores, *job.store);
  return world;
}

namespace detail {

/// Gives up this process's part in a group, in which it needs nothing more. A connection that closes may take along
/// what the other side has not read yet: so each rank first waits for the others, but not for long, since they may be
/// in trouble.
template <class = void>
void leave_process_group(World& world) noexcept {
  if (std::uncaught_exceptions() > 0) return;  // the job is to hear the reason first
  const auto group = std::exchange(world.group, nullptr);
  Job& job = Job::of_this_process();
  if (!group || world.size < 2 || !job.joined() || job.has_left()) return;
  try {
    const auto store = group->getStore();
    if (store->add("left", 1) == world.size) store->set("all_left", std::vector<std::uint8_t>{1});
    store->wait({"all_left"}, std::chrono::seconds(5));
    if (world.device.is_cuda()) group->shutdown();
  } catch (const std::exception&) {
    somebody_is_gone() = true;  // which is watched elsewhere
  }
}

/// Calls `run`; an exception that leaves it is told to the job, and goes on.
template <class Run>
decltype(auto) telling_failures(Run&& run) {
  try {
    return std::forward<Run>(run)();
  } catch (...) {
    Job::of_this_process().fail();
    throw;
  }
}

template <class Result>
Result unpack(std::string_view bytes) {
  if constexpr (!std::is_void_v<Result>) return Travel<Result>::get(bytes);
}

inline int next_launch() {
  static int launches = 0;
  return launches++;
}

/// Runs `run`, which launches and calls the user's function, in processes that are spawned or forked for it; returns
/// rank 0's result. Where somebody else has started the processes, runs it in this one. Throws fabric::Error with the
/// reason when a rank fails.
template <class Result, class Run>
Result launch_function(const Selection& selection, const LaunchOptions& given, Run&& run) {
  static_assert(std::is_void_v<Result> || CanTravel<Result>,
                "fabric: what launch(function) brings back from another process are numbers, texts, tensors, and "
                "vectors, pairs, tuples and optionals of these");
  Children::join_parent();
  const int launch = next_launch();
  const int mine = Upbringing::of_this_process().call;
  auto& past = PastResults::of_this_process().bytes;
  if (mine >= 0 && !Job::of_this_process().joined()) {  // a fresh process, which has come to where it is needed
    if (launch < mine) return unpack<Result>(past.at(static_cast<std::size_t>(launch)));
    run_as_rank<Result>(false, run);
  }
  const LaunchOptions options = with_variables(given);
  const Place place = find_place(selection, options.timeout);
  if (place.external) return telling_failures(run);
  Supervised job = supervise_ranks(selection, place, options);
  if (job.in_rank) run_as_rank<Result>(true, run);
  if (job.code == preempted_exit_code) std::exit(job.code);
  if (job.code != 0) throw Error(job.failure.substr(0, job.failure.find_last_not_of('\n') + 1));
  past.push_back(std::move(job.result));
  return unpack<Result>(past.back());
}

}  // namespace detail
}  // namespace fabric
