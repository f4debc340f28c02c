// SPDX-License-Identifier: Apache-2.0
//
// The main function of the tests on GPUs. Where there are fewer of them than ranks, the ranks are nodes of one device
// each, which share the first GPU: NCCL takes them for different hosts by NCCL_HOSTID, and they talk over sockets.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <c10/cuda/CUDAFunctions.h>

#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"
#include "support/ranks.hpp"

namespace {

#ifdef FABRIC_TESTS_ON_RANKS
constexpr bool on_ranks = true;
#else
constexpr bool on_ranks = false;
#endif

/// A port that nobody had a moment ago; rank 0 says so when somebody has it by then.
int free_port() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(listener, reinterpret_cast<sockaddr*>(&address), size);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  close(listener);
  return ntohs(address.sin_port);
}

void become_node(int rank) {
  setenv("NODE_RANK", std::to_string(rank).c_str(), 1);
  setenv("NCCL_HOSTID", ("node" + std::to_string(rank)).c_str(), 1);
}

/// Starts the other ranks, each with this program and its arguments.
std::vector<pid_t> start_nodes(char** argv) {
  setenv("FABRIC_TESTS_APART", std::to_string(fabric::tests::ranks()).c_str(), 1);
  setenv("MASTER_ADDR", "127.0.0.1", 1);
  setenv("MASTER_PORT", std::to_string(free_port()).c_str(), 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 1);
  unsetenv("LOCAL_RANK");
  std::vector<pid_t> nodes;
  for (int rank = 1; rank < fabric::tests::ranks(); ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      become_node(rank);
      execv("/proc/self/exe", argv);
      std::perror("execv");
      _exit(127);
    }
    nodes.push_back(pid);
  }
  become_node(0);
  return nodes;
}

}  // namespace

int main(int argc, char** argv) {
  const int devices = c10::cuda::device_count();
  if (devices == 0) {
    std::puts("skipped: there is no GPU");
    return 77;
  }
  // A test that starts this program again, on more ranks, has it start its own.
  const char* apart = std::getenv("FABRIC_TESTS_APART");
  const std::string ranks = std::to_string(fabric::tests::ranks());
  std::vector<pid_t> nodes;
  if (on_ranks && devices < fabric::tests::ranks() && (apart == nullptr || apart != ranks)) nodes = start_nodes(argv);
  int code = Catch::Session().run(argc, argv);
  for (const pid_t node : nodes) {
    int status = 0;
    waitpid(node, &status, 0);
    if (code == 0 && status != 0) code = 1;
  }
  return code;
}
