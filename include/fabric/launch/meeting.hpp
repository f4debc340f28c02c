// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <ifaddrs.h>
#include <netdb.h>
#include <unistd.h>

#include "fabric/connector/environment.hpp"
#include "fabric/error.hpp"
#include "fabric/launch/hub.hpp"
#include "fabric/launch/link.hpp"

namespace fabric::detail {

/// Where the ranks of a job find rank 0.
struct Meeting {
  std::string address;     ///< Of rank 0's host.
  std::vector<int> ports;  ///< That rank 0 tries in this order, and so do the others; {0}: any, told to children.
  bool fixed = false;      ///< The one port is the user's, or a parent's.
  std::string run;         ///< Tells this job and this attempt of it from others.
  std::chrono::milliseconds timeout{};
};

/// The process that started this one; 0 where that cannot be known.
inline int parent_of(int process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string text;
  std::getline(file, text);
  const auto end = text.rfind(") ");  // of the program's name
  return end == std::string::npos || end + 4 >= text.size() ? 0 : std::atoi(text.c_str() + end + 4);
}

/// MPICH's processes get no name of their job, but all of them descend from proxies of the same mpiexec, to which these
/// are told how to connect. Empty without such an ancestor.
inline std::string mpich_control_port() {
  for (int process = getppid(); process > 1; process = parent_of(process)) {
    std::ifstream ancestor("/proc/" + std::to_string(process) + "/cmdline", std::ios::binary);
    for (std::string word; std::getline(ancestor, word, '\0');) {
      if (word == "--control-port" && std::getline(ancestor, word, '\0')) return word;
    }
  }
  return {};
}

/// What tells this job from others that may run on the same hosts, equal on all its ranks: from the launcher's
/// variables.
inline std::string run_identity(EnvironmentKind kind, const Variables& variables) {
  std::string run(variables.get("FABRIC_RUN_ID"));
  const auto add = [&](std::initializer_list<std::string_view> names) {
    for (const std::string_view name : names) run.append("/").append(variables.get(name));
  };
  switch (kind) {
    // Not its TORCHELASTIC_RESTART_COUNT: each agent counts the failures of its own processes.
    case EnvironmentKind::torchelastic: add({"TORCHELASTIC_RUN_ID"}); break;
    case EnvironmentKind::slurm: add({"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"}); break;
    case EnvironmentKind::lsf: add({"LSB_JOBID"}); break;
    case EnvironmentKind::mpi: {
      add({"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"});
      const std::string port = mpich_control_port();
      if (!port.empty()) run.append("/").append(port);
      break;
    }
    default: break;
  }
  return run;
}

/// The ports in which a job may meet whose launcher names none: `first`, and others for when that is taken.
inline std::vector<int> candidate_ports(int first, const std::string& run) {
  std::vector<int> ports{first};
  constexpr int more = 7;
  for (int i = 0; i < more; ++i) {
    std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a
    for (const char c : run + static_cast<char>('a' + i)) {
      hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
    }
    constexpr int lowest = 10'000;  // up to where systems take ports for outgoing connections
    constexpr int highest = 32'000;
    ports.push_back(lowest + static_cast<int>(hash % (highest - lowest)));
  }
  return ports;
}

/// Introduces itself to whoever listens at that port. An accepted link, or a closed one and why in `answer`.
inline Link greet(const Meeting& meeting, int port, Hello hello, std::string& answer) {
  constexpr int patience = 2000;
  Link link = connect_to(meeting.address, port, patience);
  if (!link.open()) {
    answer = std::strerror(errno);
    return {};
  }
  if (hello.device.empty() && hello.rank != 0) hello.device = address_of(link.fd());
  link.send({.kind = Message::hello, .text = hello.text()});
  const auto reply = link.wait(Clock::now() + std::chrono::milliseconds(patience));
  if (reply && reply->kind == Message::accepted) {
    const auto first = Hello::from(reply->text);
    if (!first || first->chosen_by.empty() || first->network == hello.network) return link;
    const std::string reason = Hello::why_unreachable(*first, port);
    if (reason.empty()) return link;
    link.send({Message::failed, hello.rank, 1, reason});
    throw Error("fabric: launch: " + reason);
  }
  if (reply && reply->kind == Message::refused) throw Error("fabric: launch: " + reply->text);
  answer = reply && reply->kind == Message::other_run ? "another job meets there" : "another program is there";
  return {};
}

/// Rank 0 takes the first port that is free, for good. Throws fabric::Error when there is none, or when another process
/// of this job has done so.
inline int take_port(const Meeting& meeting, const Hello& hello) {
  constexpr auto patience = std::chrono::seconds(3);  // an earlier job may be about to leave
  const auto deadline = Clock::now() + patience;
  for (;;) {
    for (const int port : meeting.ports) {
      const int listener = listen_on(meeting.address, port);
      if (listener >= 0) return listener;
      std::string answer;
      greet(meeting, port, hello, answer);  // throws if it is one of us
    }
    if (Clock::now() > deadline) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  const std::string port = std::to_string(meeting.ports.front());
  throw Error("fabric: launch: MASTER_PORT " + port + " is taken on " + host_name() +
              ", by another job or program: unset MASTER_PORT to have a free one chosen, or name another");
}

/// The other ranks look for rank 0, which may come later than they. `look_up()` is called before each attempt, and may
/// correct where to look and for whom. Throws fabric::Error when they do not find it within the timeout, or when
/// somebody else is where it should be.
template <class LookUp>
Link find_rank_0(const Meeting& meeting, const Hello& hello, int node_rank, LookUp&& look_up) {
  const auto start = Clock::now();
  bool told = false;
  Clock::time_point others_since{};
  for (auto pause = std::chrono::milliseconds(10);; pause = std::min(2 * pause, std::chrono::milliseconds(200))) {
    look_up();
    std::string answer = meeting.ports.empty() ? "it has not said where it listens" : "";
    bool others = false;
    for (const int port : meeting.ports) {
      std::string why;
      if (Link link = greet(meeting, port, hello, why); link.open()) return link;
      others = others || why.starts_with("another");
      if (answer.empty() || others) answer = why;
    }
    const auto now = Clock::now();
    const std::string port = meeting.ports.empty() ? "" : ":" + std::to_string(meeting.ports.front());
    const std::string failure = "fabric: launch: rank " + std::to_string(hello.rank) + " on " + hello.host +
                                " finds no rank 0 at " + meeting.address + port +
                                " (MASTER_ADDR, MASTER_PORT): " + answer;
    if (!others) others_since = {};
    if (others && others_since == Clock::time_point{}) others_since = now;
    if (others && meeting.fixed && now - others_since > std::chrono::seconds(8)) throw Error(failure);
    const auto lone = std::min<std::chrono::milliseconds>(meeting.timeout, std::chrono::seconds(20));
    if (is_loopback(meeting.address) && node_rank > 0 && now - start > lone) {
      throw Error(failure + ". MASTER_ADDR " + meeting.address +
                  " is this host itself, but this is another node than rank 0's: name rank 0's host");
    }
    if (now - start > meeting.timeout) {
      throw Error(failure + ". It did not come within " + std::to_string(meeting.timeout.count() / 1000) + " s");
    }
    if (!told && now - start > std::chrono::seconds(15)) {
      told = true;
      std::fprintf(stderr, "%s; still trying\n", failure.c_str());
    }
    std::this_thread::sleep_for(pause);
  }
}

/// The address of a network interface. Throws fabric::Error, which lists those that there are.
inline std::string address_of_interface(const std::string& name) {
  ifaddrs* all = nullptr;
  std::string names;
  std::string found;
  if (getifaddrs(&all) != 0) return found;
  for (const ifaddrs* each = all; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr) continue;
    const int family = each->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    if ((", " + names + ",").find(std::string(", ") + each->ifa_name + ",") == std::string::npos) {
      names += (names.empty() ? "" : ", ") + std::string(each->ifa_name);
    }
    // The first one of IPv4, as gloo takes it.
    if (name != each->ifa_name || (!found.empty() && (family == AF_INET6 || found.find(':') == std::string::npos)))
      continue;
    char text[NI_MAXHOST] = "";
    const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    if (getnameinfo(each->ifa_addr, size, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0) found = text;
  }
  freeifaddrs(all);
  if (found.empty()) {
    throw Error("fabric: launch: GLOO_SOCKET_IFNAME " + name + " is no interface of " + host_name() +
                " with an address: it has " + names);
  }
  return found;
}

}  // namespace fabric::detail
