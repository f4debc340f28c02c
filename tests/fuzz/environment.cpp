// SPDX-License-Identifier: Apache-2.0
//
// A line for LT_ENVIRONMENT, then NAME=VALUE lines, an empty line, then the text of LSF's rank file.
#include "fabric/connector/environment.hpp"

#include <vector>

#include "fuzz/input.hpp"

using namespace fabric;

namespace {

template <class T>
void require_told(const Expected<T>& read) {
  fuzz::require(read || !read.problem.flag.empty());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const Expected<EnvironmentChoice> choice = parse_environment_choice(input.line());
  fuzz::require(choice || !choice.problem.detail.empty());
  std::vector<Variable> set;
  while (!input.rest.empty()) {
    const std::string_view line = input.line();
    if (line.empty()) break;
    const std::size_t equals = line.find('=');
    if (equals == std::string_view::npos) continue;
    set.push_back({line.substr(0, equals), line.substr(equals + 1)});
  }
  const Variables variables(set.data(), set.size());
  const HostFile file{variables.get("LSB_DJOB_RANKFILE"), input.rest};
  const Host host{.srun = set.size() % 2 == 0, .hostname = "h1", .files = &file, .file_count = 1};

  for (unsigned kind = 0; kind <= static_cast<unsigned>(EnvironmentKind::custom); ++kind) {
    EnvironmentKind made = static_cast<EnvironmentKind>(kind);
    if (made == EnvironmentKind::detected) made = detect_environment(variables, host, choice.value);
    const Expected<Environment> environment = construct_environment(made, variables, host);
    require_told(environment);
    if (!environment) continue;
    require_told(environment->main_address());
    require_told(environment->main_port());
    require_told(environment->world_size());
    require_told(environment->global_rank());
    require_told(environment->local_rank());
    require_told(environment->node_rank());
    const Problem contradiction = environment->contradiction();
    fuzz::require(contradiction.code == Code::none || !contradiction.names.empty());
    (void)environment->validate_settings(2, 2);
    (void)environment->warnings();
    (void)environment->job_id();
  }
  return 0;
}
