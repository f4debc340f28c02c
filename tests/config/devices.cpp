// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/devices.hpp"

#include <string>

#include "support/catch.hpp"

using namespace fabric;

namespace {

constexpr Host eight_gpus{.cuda_devices = 8};
constexpr Host one_gpu{.cuda_devices = 1};

constexpr Expected<DeviceList> cuda(const DevicesFlag& flag, const Host& host = eight_gpus) {
  return parse_devices(flag, DeviceType::cuda, host, {});
}
constexpr Expected<DeviceList> cpu(const DevicesFlag& flag) { return parse_devices(flag, DeviceType::cpu, Host{}, {}); }
constexpr Expected<DeviceList> tpu(const DevicesFlag& flag) {
  return parse_devices(flag, DeviceType::xla, Host{.tpu_devices = 4}, {});
}

}  // namespace

// The same function at compile time.
static_assert(cuda(2)->count == 2 && !cuda(2)->listed);
static_assert(cuda("3,1")->listed && cuda("3,1")->indices[0] == 3);
static_assert(cuda({0, 2})->indices[1] == 2);
static_assert(cuda(-1)->count == 8);
static_assert(cuda({}) && cuda(DevicesFlag{})->count == 8);
static_assert(cpu("4")->count == 4);
static_assert(cpu(100'000)->count == 100'000);  // a count needs no room

// A flag's value can be a template argument.
template <DevicesFlag Flag>
struct Chosen {
  static constexpr int count = cuda(Flag)->count;
};
static_assert(Chosen<DevicesFlag("0,1,2")>::count == 3);

TEST_CASE("a devices flag has every form and keeps them apart", "[issue-4.6][devices]") {
  using Form = DevicesFlag::Form;
  CHECK(DevicesFlag{}.form == Form::unset);
  CHECK(DevicesFlag(2).form == Form::integer);
  CHECK(DevicesFlag("2").form == Form::text);
  CHECK(DevicesFlag(true).form == Form::boolean);
  CHECK(DevicesFlag(nullptr).form == Form::null);
  CHECK(DevicesFlag({0, 1}).form == Form::list);
  CHECK(DevicesFlag("auto").automatic());
  CHECK_FALSE(DevicesFlag("AUTO").automatic());
  for (const DevicesFlag& none :
       {DevicesFlag(0), DevicesFlag("0"), DevicesFlag(false), DevicesFlag::list(nullptr, 0)}) {
    CHECK(is_zero_like(none));
  }
  CHECK_FALSE(is_zero_like(" 0"));
}

TEST_CASE("auto is every GPU, and one process on a CPU", "[issue-4.6][devices]") {
  CHECK(cuda("auto")->count == 8);
  CHECK(cpu("auto")->count == 1);
  CHECK(tpu("auto")->count == 4);
  CHECK(parse_devices("auto", DeviceType::mps, Host{.mps = true}, {})->count == 1);
}

TEST_CASE("texts are read as integers are written anywhere", "[issue-4.6][devices]") {
  CHECK(cuda(" 2 ")->count == 2);
  CHECK(cuda("+2")->count == 2);
  CHECK(cuda("1,,2")->indices.count == 2);
  CHECK(cuda("0,")->listed);          // one index
  CHECK_FALSE(cuda("1")->listed);     // a count
  CHECK(cuda("\u0661")->count == 1);  // an Arabic-Indic one
}

TEST_CASE("a refused devices value says what is legal and what was meant", "[issue-4.6][devices]") {
  const auto nearest = [](const char* text) { return std::string(cuda(text).problem.nearest.view()); };
  CHECK(nearest("AUTO") == "auto");
  CHECK(nearest("[0,1]") == "0,1");
  CHECK(nearest("1 2") == "1,2");
  CHECK(nearest("2.0") == "2");
  CHECK(nearest("abc").empty());

  const Problem text = cuda("0,x").problem;
  CHECK(text.code == Code::devices_text_not_int);
  CHECK(text.flag == "devices");
  CHECK(text.names == "'x'");
  CHECK(text.detail.view().find("a count, -1 for all") == 0);

  const Problem absent = cuda({0, 9}).problem;
  CHECK(absent.code == Code::gpu_not_on_machine);
  CHECK(absent.names == "[0, 9]");
  CHECK(absent.detail == "this machine has GPUs 0 to 7");

  CHECK(cuda("1,1").problem.code == Code::gpu_ids_not_unique);
  CHECK(cuda(-2).problem.code == Code::gpus_none_available);
  CHECK(cuda(" 0").problem.code == Code::gpu_devices_resolved_to_none);
  CHECK(cuda(true).problem.code == Code::device_ids_type);
  CHECK(cuda(nullptr).problem.code == Code::device_ids_type);
  CHECK(cpu("0,1").problem.code == Code::cpu_devices_not_positive_int);
  CHECK(cpu({0, 1}).problem.nearest == "2");
  CHECK(cpu("\u00b2").problem.code == Code::cpu_devices_odd_digit);
  CHECK(tpu(2).problem.code == Code::tpu_devices_invalid);
  CHECK(tpu("x").problem.code == Code::tpu_devices_text_invalid);
}

TEST_CASE("each rank uses its device of the list", "[issue-4.6][devices]") {
  const DeviceList list = *cuda({5, 3});
  CHECK(list.index_for(0) == 5);
  CHECK(list.index_for(1) == 3);
  CHECK(list.index_for(2) == -1);
}

TEST_CASE("under torchrun with one visible GPU each, every rank uses GPU 0", "[issue-4.6][devices]") {
  const Variables variables;
  const Variable torchrun{"TORCHELASTIC_RUN_ID", "1"};
  const Expected<DeviceList> list = parse_devices(2, DeviceType::cuda, one_gpu, {&torchrun, 1});
  REQUIRE(list);
  CHECK(list->one_visible_each);
  CHECK(list->count == 2);
  CHECK(list->index_for(1) == 0);
  CHECK(parse_devices(2, DeviceType::cuda, one_gpu, variables).problem.code == Code::gpu_not_on_machine);
  CHECK(parse_devices("-1,0", DeviceType::cuda, one_gpu, {&torchrun, 1}).problem.code == Code::gpu_not_on_machine);
}

TEST_CASE("more devices than can be listed are a problem, not a cut list", "[issue-4.6][issue-4.9][devices]") {
  std::string text = "0";
  for (int i = 1; i < 129; ++i) text += "," + std::to_string(i % 10);
  CHECK(cuda(text.c_str()).problem.code == Code::too_many_devices);
  CHECK(cuda(std::string(600, '1').c_str()).problem.code == Code::too_many_devices);
}
