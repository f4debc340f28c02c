// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/cuda_visible_devices.hpp"

#include <filesystem>
#include <string>

#include "fabric/connector/devices.hpp"
#include "support/catch.hpp"
#include "support/lines.hpp"

using namespace fabric;

namespace {

constexpr std::string_view uuids[]{"GPU-0a", "GPU-1b", "GPU-2c", "GPU-3d", "GPU-4e", "GPU-5f", "GPU-60", "GPU-71"};

constexpr Expected<VisibleGpus> visible(std::string_view value) {
  const Variable variable{"CUDA_VISIBLE_DEVICES", value};
  return visible_gpus({&variable, 1}, 8, uuids);
}

}  // namespace

static_assert(visible("GPU-1b,0").value.count == 1);
static_assert(visible("2,1").value.indices[0] == 2);

TEST_CASE("CUDA_VISIBLE_DEVICES is read as CUDA reads it", "[issue-4.6][cuda]") {
  const auto file = std::filesystem::path(__FILE__).parent_path() / "data" / "cuda_visible_devices.tsv";
  int rows = 0;
  for (const auto& [value, expected] : tests::read_pairs(file)) {
    const Expected<VisibleGpus> gpus = value == "<unset>" ? visible_gpus({}, 8, uuids) : visible(value);
    std::string indices;
    for (int i = 0; i < gpus->count; ++i) {
      indices += (i > 0 ? " " : "") + std::to_string(gpus->indices[static_cast<std::size_t>(i)]);
    }
    INFO(value);
    CHECK(indices == (expected == "-" ? "" : expected == "all" ? "0 1 2 3 4 5 6 7" : expected));
    ++rows;
  }
  CHECK(rows == 12);
}

TEST_CASE("numbers are read like strtoul, UUIDs by a unique beginning", "[issue-4.6][cuda]") {
  CHECK(visible("1gpu, 2")->count == 2);
  CHECK(visible("+3")->indices[0] == 3);
  CHECK(visible("99999999999999999999")->count == 0);
  CHECK(visible("GPU-")->count == 0);          // eight GPUs begin so
  CHECK(visible("GPU-1b,GPU-1")->count == 0);  // the same GPU twice
  CHECK(visible("0,,1")->count == 1);
}

TEST_CASE("one MIG device is one device; more than one is refused with the reason", "[issue-4.6][cuda]") {
  CHECK(visible("MIG-7c1d3b3e-0000-5a1f-9a1b-000000000000")->count == 1);
  CHECK(visible("MIG-GPU-2c/1/0")->indices[0] == 2);
  const Expected<VisibleGpus> two = visible("MIG-a,MIG-b");
  CHECK(two.problem.code == Code::mig_several);
  CHECK(two.problem.flag == "CUDA_VISIBLE_DEVICES");
  CHECK(two.problem.names == "'MIG-a,MIG-b'");
  CHECK(two.problem.detail.view().find("the first one only") != std::string_view::npos);

  // The devices flag refuses it too, whatever its value; other accelerators do not care.
  CHECK(parse_devices("auto", DeviceType::cuda, Host{.cuda_devices = 1}, {{"CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b"}})
            .problem.code == Code::mig_several);
  CHECK(parse_devices(1, DeviceType::cpu, Host{}, {{"CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b"}}));
}
