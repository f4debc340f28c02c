// SPDX-License-Identifier: Apache-2.0
// labels: oracle
// timeout: 300
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "oracle/answer.hpp"
#include "support/catch.hpp"
#include "support/gzip.hpp"

using namespace oracle;

namespace {

const auto root = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();

/// Objects are equal whatever the order of their members.
nlohmann::json sorted(const Json& json) { return nlohmann::json::parse(json.dump()); }

/// The kinds that docs/differences.md lists, with their counts in that column of its tables.
std::map<std::string, int> listed_kinds(std::size_t column) {
  std::map<std::string, int> kinds;
  std::ifstream file(root / "docs" / "differences.md");
  const std::regex row(R"(\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| .+ \|)");
  for (std::string line; std::getline(file, line);) {
    std::smatch match;
    if (std::regex_match(line, match, row) && match[column] != "0") kinds[match[1]] = std::stoi(match[column]);
  }
  return kinds;
}

/// Compares the answers to all rows with their outcomes; every difference must be of a listed kind, and every row of a
/// listed kind must differ.
void compare(const std::string& file, std::size_t column, std::size_t rows) {
  std::map<std::string, int> kinds;
  std::size_t seen = 0;
  for (const std::string& line : fabric::tests::gunzip_lines(root / "tests" / "oracle" / "data" / file)) {
    const Json row = Json::parse(line);
    const Json answered = answer(row);
    ++seen;
    const bool equal = sorted(answered["outcome"]) == sorted(row["outcome"]);
    const bool marked = answered.contains("differs");
    if (marked) ++kinds[answered["differs"]];
    if (equal != marked) continue;
    UNSCOPED_INFO(line << "\nanswered " << answered);
    CHECK(equal != marked);
  }
  CHECK(seen == rows);
  CHECK(kinds == listed_kinds(column));
  for (const auto& [kind, count] : kinds) {
    INFO(kind);
    if (file == "connector.jsonl.gz") CHECK(count * 100.0 <= 3.0 * double(rows));
  }
}

}  // namespace

TEST_CASE("every connector row resolves as in Lightning Fabric", "[issue-4.1][issue-4.8]") {
  compare("connector.jsonl.gz", 2, 22168);
}

TEST_CASE("every devices row is replayed", "[issue-4.6][issue-4.8]") { compare("devices.jsonl.gz", 3, 1304); }

TEST_CASE("every environment row is replayed", "[issue-4.5][issue-4.8]") { compare("environments.jsonl.gz", 4, 391); }

TEST_CASE("differences are few, and each is shown by some row", "[issue-4.8]") {
  std::set<std::string> kinds;
  for (const std::size_t column : {2U, 3U, 4U}) {
    for (const auto& [kind, count] : listed_kinds(column)) kinds.insert(kind);
  }
  CHECK(kinds.size() <= 30);
  std::ifstream file(root / "docs" / "differences.md");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  const std::regex entry(R"(\n\| `(\w+)` \|)");
  for (std::sregex_iterator at(text.begin(), text.end(), entry), end; at != end; ++at) {
    INFO((*at)[1]);
    CHECK(kinds.count((*at)[1]) == 1);
  }
}

TEST_CASE("the registry's names are those of the reference", "[issue-4.3]") {
  std::ifstream file(root / "tests" / "oracle" / "data" / "registry.json");
  const Json registry = Json::parse(file);
  for (const Json& name : registry["strategy_order"]) {
    INFO(name);
    CHECK(fabric::built_in_registry.has_strategy(name.get<std::string>()));
  }
  for (const auto& [name, entry] : registry["accelerators"].items()) {
    INFO(name);
    REQUIRE(fabric::built_in_registry.has_accelerator(name));
    CHECK(class_of(fabric::built_in_registry.accelerator(name).name) == entry["class"].get<std::string>());
  }
}
