// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include <boost/hana/first.hpp>
#include <boost/hana/for_each.hpp>
#include <boost/hana/second.hpp>
#include <boost/hana/string.hpp>

#include "fabric/config.hpp"
#include "fabric/connector/message.hpp"
#include "fabric/policy/by_flag.hpp"
#include "support/catch.hpp"

using namespace fabric;

namespace {

/// A strategy and an accelerator of a program's own.
struct Gossip {
  static constexpr StrategyFacts facts{
      .name = "Gossip", .flag = "gossip", .start_method = StartMethod::popen, .built_in = false};
};
struct Npu {
  static constexpr AcceleratorFacts facts{
      .name = "Npu", .flag = "npu", .device = DeviceType::cpu, .built_in = false, .own_devices = 2};
};
constexpr const Registry& mine = registry_with<Gossip, Npu>;

}  // namespace

// [issue-4.3] User-defined policies resolve by name, at compile time and as types.
static_assert(resolve({.strategy = "gossip", .devices = 2}, {}, {}, mine).strategy == Gossip::facts);
static_assert(resolve({.accelerator = "npu", .strategy = "gossip"}, {}, {}, mine).devices.count == 2);
static_assert(std::is_same_v<fabric_t<"npu", "gossip", "32-true", Gossip, Npu>, Fabric<Npu, Gossip, F32>>);

TEST_CASE("the library does not know a program's strategy until it is told", "[issue-4.3]") {
  CHECK(resolve({.strategy = "gossip"}).code() == Code::invalid_strategy_name);
  const Resolution r = resolve({.strategy = "gossip", .devices = 3}, {}, {}, mine);
  REQUIRE(r.ok());
  CHECK(r.launcher == Launcher::subprocess);
  CHECK(r.world_size.value == 3);
  CHECK(resolve({.accelerator = "npu", .devices = "x"}, {}, {}, mine).code() == Code::custom_devices_type);
}

TEST_CASE("messages list a program's names too", "[issue-4.3][issue-4.4]") {
  const Resolution r = resolve({.strategy = "gosip"}, {}, {}, mine);
  CHECK(r.problems[0].nearest == "gossip");
  CHECK(message(r.problems, mine).find("gossip") != std::string::npos);
  CHECK(message(r.problems, mine).find("deepspeed_stage_2") != std::string::npos);
}

TEST_CASE("Hana maps lead from flag names to policies", "[issue-4.3]") {
  constexpr const auto& map = by_flag<Ddp, Fsdp, Gossip>;
  constexpr auto ddp = BOOST_HANA_STRING("ddp");
  constexpr auto gossip = BOOST_HANA_STRING("gossip");
  STATIC_REQUIRE(map[ddp] == boost::hana::type_c<Ddp>);
  STATIC_REQUIRE(map[gossip] == boost::hana::type_c<Gossip>);
}

TEST_CASE("the Hana maps and the registry name the same policies", "[issue-4.3]") {
  std::size_t strategies = 0;
  boost::hana::for_each(strategies_by_flag<Gossip>, [&](auto entry) {
    const char* flag = boost::hana::first(entry).c_str();
    INFO(flag);
    REQUIRE(mine.has_strategy(flag));
    CHECK(mine.strategy(flag) == decltype(+boost::hana::second(entry))::type::facts);
    ++strategies;
  });
  CHECK(strategies == mine.strategy_count);
  boost::hana::for_each(accelerators_by_flag<Npu>,
                        [&](auto entry) { CHECK(mine.has_accelerator(boost::hana::first(entry).c_str())); });
}

TEST_CASE("types from strings", "[issue-4.2]") {
  STATIC_REQUIRE(std::is_same_v<fabric_t<"cuda", "ddp", "bf16-mixed">, Fabric<Cuda, Ddp, BF16Mixed>>);
  STATIC_REQUIRE(std::is_same_v<fabric_t<"cpu", "single_device", "64">, Fabric<Cpu, SingleDevice, F64>>);
  STATIC_REQUIRE(std::is_same_v<fabric_t<"tpu", "single_xla", "32-true">, Fabric<Xla, SingleDeviceXla, F32>>);
  STATIC_REQUIRE(std::is_same_v<fabric_t<"cuda", "deepspeed", "16-true">, Fabric<Cuda, DeepSpeed<2>, F16>>);
  STATIC_REQUIRE(
      std::is_same_v<fabric_t<"cpu", "ddp", "transformer-engine-float16">, Fabric<Cpu, Ddp, TransformerEngine<F16>>>);
}

TEST_CASE("the type of any constexpr selection", "[issue-4.2]") {
  constexpr Selection selection = resolve({.devices = 2, .precision = "bf16-mixed"}, {}, Host{.cuda_devices = 8});
  STATIC_REQUIRE(std::is_same_v<fabric_of<selection>, Fabric<Cuda, Ddp, BF16Mixed>>);
}
