// SPDX-License-Identifier: Apache-2.0
//
// From strings to one of the types that the program has.
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <boost/hana/equal.hpp>
#include <boost/hana/size.hpp>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
namespace hana = boost::hana;

/// Sets variables for a scope. Those of a launcher or a user are out of the way meanwhile.
class SetVariables {
 public:
  explicit SetVariables(const std::map<std::string, std::string>& set) {
    for (const char* name :
         {"LT_CLI_USED", "LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION"}) {
      if (const char* value = std::getenv(name)) before_[name] = value;
      unsetenv(name);
      names_.emplace_back(name);
    }
    for (const auto& [name, value] : set) setenv(name.c_str(), value.c_str(), 1);
  }
  ~SetVariables() {
    for (const std::string& name : names_) {
      const auto old = before_.find(name);
      old == before_.end() ? unsetenv(name.c_str()) : setenv(name.c_str(), old->second.c_str(), 1);
    }
  }
  SetVariables(const SetVariables&) = delete;
  SetVariables& operator=(const SetVariables&) = delete;

 private:
  std::vector<std::string> names_;
  std::map<std::string, std::string> before_;
};

using SmallMenu = Menu<Accelerators<Cpu>, Strategies<SingleDevice>, Precisions<F32, F64>>;

/// The policies that were dispatched to.
const auto name_of_fabric = [](auto& fabric) {
  return name_of(PoliciesOf<std::remove_cvref_t<decltype(fabric)>>::combination);
};

Flags parse(std::vector<std::string> words) {
  Flags flags;
  CLI::App app;
  add_flags(app, flags);
  std::reverse(words.begin(), words.end());  // CLI11 takes them from the back
  app.parse(words);
  return flags;
}

}  // namespace

// A menu has exactly the legal combinations, in the order of its lists. [issue-3.7]
using Wide = Menu<Accelerators<Cpu, Mps>, Strategies<SingleDevice, Ddp>, Precisions<F32, F64, F16Mixed>>;
static_assert(
    Wide::entries ==
    hana::tuple_t<Fabric<Cpu, SingleDevice, F32>, Fabric<Cpu, SingleDevice, F64>, Fabric<Cpu, Ddp, F32>,
                  Fabric<Cpu, Ddp, F64>, Fabric<Mps, SingleDevice, F32>, Fabric<Mps, SingleDevice, F16Mixed>>);
static_assert(hana::size(Menu<Accelerators<Mps>, Strategies<Ddp>, Precisions<F32>>::entries) == hana::size_c<0>);

TEST_CASE("[issue-3.7] flags pick an entry of the menu") {
  const SetVariables none({});
  CHECK(dispatch<SmallMenu>(Flags{.accelerator = "cpu"}, name_of_fabric) == "Fabric<Cpu, SingleDevice, F32>");
  CHECK(dispatch<SmallMenu>(Flags{.accelerator = "cpu", .precision = "64-true"}, name_of_fabric) ==
        "Fabric<Cpu, SingleDevice, F64>");
  CHECK(dispatch<SmallMenu>(Flags{.accelerator = "cpu", .precision = 64}, name_of_fabric) ==
        "Fabric<Cpu, SingleDevice, F64>");
}

TEST_CASE("[issue-3.7] LT_ variables pick an entry of the menu") {
  const SetVariables variables({{"LT_CLI_USED", "1"}, {"LT_ACCELERATOR", "cpu"}, {"LT_PRECISION", "64-true"}});
  CHECK(dispatch<SmallMenu>(Flags{}, name_of_fabric) == "Fabric<Cpu, SingleDevice, F64>");
}

TEST_CASE("[issue-3.7] a program adjusts the options of the entry that was chosen") {
  const SetVariables none({});
  struct Counter : Logger {
    int rows = 0;
    void log_metrics(const Metrics& /*metrics*/, std::optional<std::int64_t> /*step*/) override { ++rows; }
  };
  const auto counter = std::make_shared<Counter>();
  const auto log = [](auto& fabric) { fabric.log("loss", 1.0); };
  dispatch<SmallMenu>(Flags{.accelerator = "cpu"}, log, [&](auto& options) { options.loggers = {counter}; });
  dispatch<SmallMenu>(Flags{.accelerator = "cpu"}, log, {counter});
  const std::vector<std::shared_ptr<Logger>> loggers{counter};
  dispatch<SmallMenu>(Flags{.accelerator = "cpu"}, log, loggers);
  CHECK(counter->rows == 3);
}

TEST_CASE("[issue-3.7] a selection outside the menu is refused with the list of what is on it") {
  const SetVariables none({});
  CHECK_THROWS_WITH(dispatch<SmallMenu>(Flags{.accelerator = "cpu", .precision = "bf16-mixed"}, name_of_fabric),
                    ContainsSubstring("Fabric<Cpu, SingleDevice, BF16Mixed>") &&
                        ContainsSubstring("Fabric<Cpu, SingleDevice, F32>, Fabric<Cpu, SingleDevice, F64>"));
  CHECK_THROWS_AS(dispatch<SmallMenu>(Flags{.accelerator = "cpu", .strategy = "ddp", .devices = 2}, name_of_fabric),
                  Error);
}

TEST_CASE("[issue-3.7] flags that cannot be resolved are the connector's error") {
  const SetVariables none({});
  CHECK_THROWS_AS(dispatch<SmallMenu>(Flags{.precision = "33-true"}, name_of_fabric), Error);
  CHECK_THROWS_WITH(dispatch<SmallMenu>(Flags{.precision = "33-true"}, name_of_fabric), ContainsSubstring("33-true"));
}

TEST_CASE("[issue-3.7] the entries are visited as types, without a Fabric being made") {
  const SetVariables none({});
  const auto selection = resolve_here({.accelerator = "cpu", .strategy = "ddp", .devices = 2});
  CHECK(visit_selected<Wide>(selection, [](auto entry) {
          return name_of(PoliciesOf<typename decltype(entry)::type>::combination);
        }) == "Fabric<Cpu, Ddp, F32>");
}

TEST_CASE("[issue-3.7] add_flags reads the five flags from a command line") {
  const SetVariables none({});
  const auto selection = resolve_here(parse(
      {"--accelerator", "cpu", "--strategy=ddp", "--devices", "3", "--num-nodes", "2", "--precision", "bf16-mixed"}));
  CHECK(selection.accelerator == Cpu::facts);
  CHECK(selection.strategy == Ddp::facts);
  CHECK(selection.devices.count == 3);
  CHECK(selection.num_nodes == 2);
  CHECK(selection.precision == BF16Mixed::facts);
  CHECK(resolve_here(parse({"--accelerator", "cpu"})).strategy == SingleDevice::facts);
}

TEST_CASE("[issue-3.2] Fabric resolves its own options by the same rules as flags") {
  const SetVariables none({});
  Fabric<Cpu, SingleDevice, F64> fabric;
  CHECK(fabric.selection().accelerator == Cpu::facts);
  CHECK(fabric.selection().strategy == SingleDevice::facts);
  CHECK(fabric.selection().precision == F64::facts);
  using OnCpu = Fabric<Cpu, SingleDevice, F32>;
  CHECK_THROWS_AS(OnCpu({.devices = 0}), Error);
}

TEST_CASE("[issue-3.7] a Fabric refuses a selection of other policies and names both") {
  const SetVariables none({});
  const auto foreign = resolve_here({.accelerator = "cpu", .precision = "64-true"});
  using OnCpu = Fabric<Cpu, SingleDevice, F32>;
  CHECK_THROWS_WITH(OnCpu(foreign), ContainsSubstring("Fabric<Cpu, SingleDevice, F32>") &&
                                        ContainsSubstring("Fabric<Cpu, SingleDevice, F64>"));
}
