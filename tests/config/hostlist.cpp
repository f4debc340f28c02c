// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/hostlist.hpp"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "support/catch.hpp"
#include "support/lines.hpp"

using namespace fabric;

namespace {

std::string expanded(const std::string& text) {
  const Expected<HostList> list = HostList::parse(text);
  if (!list) return "error";
  std::string hosts;
  for (const HostName& host : *list) hosts.append(hosts.empty() ? "" : " ").append(host.view());
  return hosts;
}

/// A list that may have any form of the grammar, and sometimes none.
class RandomLists {
 public:
  std::string list() {
    std::string text = item();
    for (int more = below(4); more > 0; --more) text += "," + item();
    return text;
  }

 private:
  int below(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }
  std::string number() {
    std::string digits = std::to_string(below(below(2) == 0 ? 12 : 1200));
    if (below(3) == 0) digits.insert(0, static_cast<std::size_t>(below(3)), '0');
    return digits;
  }
  std::string bracket() {
    std::string text = "[";
    for (int ranges = below(3); ranges >= 0; --ranges) {
      const std::string first = number();
      text += first;
      if (below(2) == 0) text += "-" + std::to_string(std::stoi(first) + below(12) - (below(20) == 0 ? 3 : 0));
      if (ranges > 0) text += ",";
    }
    return text + "]";
  }
  std::string name() {
    constexpr const char* names[]{"n", "node", "gpu-a", "rack", "h0", "a.b", "x_y", "10.0.0.", ""};
    return names[below(9)];
  }
  std::string item() {
    constexpr const char* odd[]{"a[b]",    "n[]",    "n[1:2]", "n[,1]",   "n[1,]",
                                "n[1-2]]", "a[[1]]", "n[-1]",  "n[1--2]", "n[1]x"};
    switch (below(10)) {
      case 0: return "login" + number();
      case 1: return below(3) == 0 ? odd[below(10)] : "c" + bracket();
      case 2:
      case 3: return name() + bracket() + name() + bracket();
      case 4: return name() + bracket() + name() + bracket() + name() + bracket();
      default: return name() + bracket();
    }
  }

  std::mt19937 random_{20260131};
};

}  // namespace

// The grammar is read at compile time too.
static_assert(HostList::parse("rack[1-2]n[3-4]")->size() == 4);
static_assert(HostList::parse("n[08-11,20]")->front() == "n08");
static_assert((*HostList::parse("n[098-102]"))[4] == "n102");
static_assert(HostList::parse("")->empty());

TEST_CASE("host lists expand as Slurm expands them", "[issue-4.5][hostlist]") {
  const auto file = std::filesystem::path(__FILE__).parent_path() / "data" / "hostlist.tsv";
  int rows = 0;
  for (const auto& [list, hosts] : tests::read_pairs(file)) {
    INFO(list);
    CHECK(expanded(list) == hosts);
    ++rows;
  }
  CHECK(rows == 19);
}

TEST_CASE("several brackets run in Slurm's order: the last, then the first", "[issue-4.5][hostlist]") {
  CHECK(expanded("a[1-2]b[1-2]c[1-2]") == "a1b1c1 a1b1c2 a2b1c1 a2b1c2 a1b2c1 a1b2c2 a2b2c1 a2b2c2");
}

TEST_CASE("a host list that is none says where", "[issue-4.5][hostlist]") {
  const auto detail = [](std::string_view list) { return std::string(HostList::parse(list).problem.detail.view()); };
  CHECK(detail("ok,n[3-1]") == "at position 6: the range runs backwards");
  CHECK(detail("n[1-3") == "at position 2: '[' without ']'");
  CHECK(detail("n[1-2]]") == "at position 7: ']' without '['");
  CHECK(detail("n[1]x") == "at position 5: text after the last ']'");
  CHECK(detail("n[1-70000]") == "at position 3: the range has more than 65536 hosts");
  CHECK(detail("n[99999999999999999999]") == "at position 22: a number is missing or too large");
  CHECK(HostList::parse("n[3-1]").problem.code == Code::hostlist_invalid);
}

TEST_CASE("a list written by hand may have spaces and suffixes", "[issue-4.5][hostlist]") {
  CHECK(HostList::parse("node[001-010]-gpu", HostListGrammar::lenient)->front() == "node001-gpu");
  CHECK(HostList::parse("1.2.3.[089, 100-110]", HostListGrammar::lenient)->front() == "1.2.3.089");
}

TEST_CASE("generated lists expand as scontrol expands them", "[issue-4.5][hostlist]") {
  if (std::system("command -v scontrol > /dev/null") != 0) {
    WARN("scontrol (package slurm-client) is not installed: not compared");
    return;
  }
  const auto folder = std::filesystem::temp_directory_path() / ("fabric-hostlist-" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  std::ofstream(folder / "slurm.conf") << "ClusterName=none\nSlurmctldHost=localhost\n";
  RandomLists lists;
  int refused = 0;
  for (int i = 0; i < 150; ++i) {
    const std::string list = lists.list();
    const std::string command =
        "SLURM_CONF='" + (folder / "slurm.conf").string() + "' scontrol show hostnames '" + list + "' 2>&1";
    std::FILE* pipe = popen(command.c_str(), "r");
    REQUIRE(pipe != nullptr);
    std::string answer;
    char block[4096];
    while (const std::size_t n = std::fread(block, 1, sizeof block, pipe)) answer.append(block, n);
    pclose(pipe);
    std::string hosts;
    if (answer.find("Invalid") != std::string::npos) {
      hosts = "error";
      ++refused;
    } else {
      for (const char c : answer) hosts += c == '\n' ? ' ' : c;
      while (!hosts.empty() && hosts.back() == ' ') hosts.pop_back();
    }
    INFO(list);
    CHECK(expanded(list) == hosts);
  }
  CHECK(refused > 0);
  std::filesystem::remove_all(folder);
}

TEST_CASE("a list of 10,000 nodes is walked through once", "[issue-4.5][hostlist]") {
  // One bracket with 10,000 numbers: walking must not read the bracket again for each host.
  std::string list = "n[0";
  for (int i = 1; i < 10000; ++i) list += "," + std::to_string(2 * i);
  list += "]";
  const Expected<HostList> hosts = HostList::parse(list);
  REQUIRE(hosts);
  CHECK(hosts->size() == 10000);
  std::size_t bytes = 0;
  HostName last;
  for (const HostName& host : *hosts) {
    bytes += host.view().size();
    last = host;
  }
  CHECK(last == "n19998");
  CHECK(bytes == 54445);
}
