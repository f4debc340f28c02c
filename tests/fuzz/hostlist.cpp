// SPDX-License-Identifier: Apache-2.0
//
// One byte: the grammar; then a host list.
#include "fabric/connector/hostlist.hpp"

#include "fuzz/input.hpp"

using namespace fabric;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const auto grammar = input.byte() % 2 == 0 ? HostListGrammar::slurm : HostListGrammar::lenient;
  const Expected<HostList> list = HostList::parse(input.rest, grammar);
  if (!list) {
    fuzz::require(list.problem.code == Code::hostlist_invalid && !list.problem.detail.empty());
    return 0;
  }
  std::uint64_t walked = 0;
  for (const HostName& host : *list) {
    fuzz::require(!host.empty() && !host.truncated);
    if (++walked == 2000) break;
  }
  fuzz::require(walked == 2000 ? list->size() >= 2000 : walked == list->size());
  return 0;
}
