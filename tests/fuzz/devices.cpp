// SPDX-License-Identifier: Apache-2.0
//
// One byte: the accelerator; one byte: how many devices the host has; then CUDA_VISIBLE_DEVICES on a line; then the
// value of --devices.
#include "fabric/connector/devices.hpp"

#include "fuzz/input.hpp"

using namespace fabric;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const unsigned char kind = input.byte();
  const int devices = input.byte() % 16;
  const auto type = static_cast<DeviceType>(kind % 4);
  const Host host{.cuda_devices = devices, .mps = devices > 0, .tpu_devices = devices};
  const Variable variables[]{{"CUDA_VISIBLE_DEVICES", input.line()}, {"TORCHELASTIC_RUN_ID", "1"}};
  const Variables visible(variables, kind >= 128 ? 2 : 1);

  constexpr std::string_view uuids[]{"GPU-0a", "GPU-0b", "GPU-1c"};
  const Expected<VisibleGpus> gpus = visible_gpus(visible, 3, uuids);
  fuzz::require(gpus ? gpus->count >= 0 && gpus->count <= 3 : !gpus.problem.names.empty());

  const DevicesFlag flag(input.rest);
  const Expected<DeviceList> list = parse_devices(flag, type, host, visible);
  if (!list) {
    fuzz::require(!list.problem.flag.empty() && !list.problem.detail.empty());
    return 0;
  }
  fuzz::require(list->count >= 0 && (!list->listed || list->count <= max_listed_devices));
  fuzz::require(list->index_for(list->count) == -1);
  if (type == DeviceType::cuda && list->count > 0) {
    const int last = list->index_for(list->count - 1);
    fuzz::require(last >= 0 && last < devices);
  }
  return 0;
}
