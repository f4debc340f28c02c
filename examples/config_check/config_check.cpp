// SPDX-License-Identifier: Apache-2.0
// Prints what a set of flags comes down to on this machine, or what is wrong with it. Needs no LibTorch.
//
//   config_check --accelerator gpu --strategy ddp --devices 2 --precision bf16-mixed --explain
//   config_check --strategy fsdp --cuda-devices 8 --json      for a machine with eight GPUs
//   config_check hostlist 'rack[1-2]n[01-04]'                 one host a line
//
// Exit status: 0, or 2 when the flags are refused.

#include <iostream>
#include <string>

#include <CLI/CLI.hpp>

#include "fabric/connector/explain.hpp"
#include "fabric/connector/hostlist.hpp"
#include "fabric/connector/probe.hpp"

namespace {

constexpr int refused = 2;

int print_hosts(const std::string& text) {
  const auto hosts = fabric::HostList::parse(text);
  if (!hosts) {
    std::cerr << fabric::message(hosts.problem) << '\n';
    return refused;
  }
  for (const fabric::HostName& host : *hosts) std::cout << host.view() << '\n';
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  fabric::Flags flags;
  std::string hosts;
  int cuda_devices = -1;
  bool with_reasons = false, as_json = false;

  CLI::App app("What a set of flags comes down to on this machine");
  const auto add = [&](const char* name, const char* help, auto& flag) {
    app.add_option_function<std::string>(
        name, [&flag](const std::string& value) { flag = std::string_view(value); }, help);
  };
  add("--accelerator", "cpu, gpu, cuda, mps, tpu or auto", flags.accelerator);
  add("--strategy", "ddp, fsdp, deepspeed, ... or auto", flags.strategy);
  add("--devices", "a count, indices such as 0,2, -1 for all, or auto", flags.devices);
  add("--num-nodes", "how many hosts take part", flags.num_nodes);
  add("--precision", "32-true, 64-true, bf16-true, bf16-mixed, ...", flags.precision);
  add("--environment", "torchelastic, slurm, lsf, mpi, kubeflow, local; -slurm turns one off", flags.environment);
  app.add_option("--cuda-devices", cuda_devices, "answer for a machine with that many NVIDIA GPUs");
  app.add_flag("--explain", with_reasons, "say why, and what else was possible");
  app.add_flag("--json", as_json, "write JSON");
  CLI::App* hostlist = app.add_subcommand("hostlist", "expand a Slurm host list");
  hostlist->add_option("list", hosts)->required();
  CLI11_PARSE(app, argc, argv);

  if (hostlist->parsed()) return print_hosts(hosts);

  const fabric::CapturedVariables variables = fabric::capture_variables();
  const fabric::ProbedHost probed = fabric::probe_host(variables);
  fabric::Host host = probed;
  if (cuda_devices >= 0) host.cuda_devices = cuda_devices;

  fabric::Explained explained = fabric::explain(flags, variables, host);
  if (!with_reasons) {
    for (fabric::Explanation& choice : explained.choices) choice.available.clear();
  }
  if (as_json) {
    std::cout << to_json(explained) << '\n';
  } else if (explained.ok) {
    std::cout << to_text(explained);
  } else {
    std::cerr << to_text(explained);
  }
  return explained.ok ? 0 : refused;
}
