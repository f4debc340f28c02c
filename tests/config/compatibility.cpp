// SPDX-License-Identifier: Apache-2.0
// docs/compatibility.md is made from the rules table; FABRIC_UPDATE=1 config_tests "[compatibility]" writes it again.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <boost/hana/for_each.hpp>

#include "fabric/config.hpp"
#include "support/catch.hpp"

using namespace fabric;
namespace hana = boost::hana;

namespace {

/// A policy as programs write it.
template <class S>
std::string title(const S& facts) {
  std::string name(facts.name.view());
  if constexpr (std::is_same_v<S, StrategyFacts>) {
    if (facts.family == StrategyFamily::deepspeed) {
      name += "<" + std::to_string(facts.stage);
      if (facts.optimizer_offload != Offload::none) {
        name += facts.optimizer_offload == Offload::nvme ? ", Offload::nvme" : ", Offload::cpu";
      }
      name += ">";
    }
  }
  return name;
}

std::string compatibility() {
  std::string text =
      "# What goes together\n\n"
      "Made from the rules in `include/fabric/policy/rules.hpp`, which the types, the connector and the menus read, "
      "too.\n"
      "A cell lists the accelerators that a strategy and a precision go together with. `Bitsandbytes` stands for all "
      "of\n"
      "its modes; it needs Cuda wherever it is allowed. There is code for Cpu and Cuda, and none yet for DataParallel, "
      "Mps\n"
      "and XLA: the compiler then says `engine_not_written_yet`.\n\n| |";
  const auto each_precision = [](auto&& visit) {
    bool bitsandbytes = false;
    hana::for_each(built_in_precisions<>, [&](auto precision) {
      const PrecisionFacts facts = decltype(precision)::type::facts;
      if (facts.kind == PrecisionKind::bitsandbytes && std::exchange(bitsandbytes, true)) return;
      visit(facts);
    });
  };
  each_precision([&](const PrecisionFacts& p) { text += " `" + title(p) + "` |"; });
  text += "\n|---|";
  each_precision([&](const PrecisionFacts&) { text += "---|"; });
  text += "\n";
  hana::for_each(built_in_strategies<>, [&](auto strategy) {
    const StrategyFacts s = decltype(strategy)::type::facts;
    text += "| `" + title(s) + "` |";
    each_precision([&](const PrecisionFacts& p) {
      std::string cell;
      hana::for_each(built_in_accelerators<>, [&](auto accelerator) {
        const AcceleratorFacts a = decltype(accelerator)::type::facts;
        if (first_refusal({a, s, p, Detected::facts}) != RuleId::none) return;
        cell += (cell.empty() ? " " : ", ") + title(a);
      });
      text += (cell.empty() ? " -" : cell) + " |";
    });
    text += "\n";
  });
  text += "\n## The rules\n\nThe first one that refuses is reported.\n\n| rule | says |\n|---|---|\n";
  for (const Rule& rule : rules) {
    text += "| `" + std::string(rule.code) + "` | " + std::string(rule.sentence) + " |\n";
  }
  return text;
}

}  // namespace

TEST_CASE("docs/compatibility.md is what the rules say", "[issue-4.accept][compatibility]") {
  const auto path =
      std::filesystem::path(__FILE__).parent_path().parent_path().parent_path() / "docs" / "compatibility.md";
  const std::string now = compatibility();
  if (std::getenv("FABRIC_UPDATE") != nullptr) std::ofstream(path) << now;
  std::ifstream file(path);
  const std::string written(std::istreambuf_iterator<char>(file), {});
  CHECK(written == now);
}
