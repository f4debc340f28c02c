// SPDX-License-Identifier: Apache-2.0
// What the connector promises, by example. Thousands of flag sets more: tests/oracle.
#include <string>

#include "fabric/config.hpp"
#include "support/catch.hpp"

using namespace fabric;

namespace {
constexpr Host eight_gpus{.cuda_devices = 8};
}

// [issue-4.2] The whole connector runs during compilation.
static_assert(resolve({.strategy = "ddp", .devices = 2, .precision = "bf16-mixed"}, {}, Host{.cuda_devices = 8})
                  .strategy == Ddp::facts);
static_assert(resolve({.accelerator = "cpu", .strategy = "ddp", .devices = 4}).world_size.value == 4);
static_assert(resolve({.strategy = "ddp"}, {{"LT_DEVICES", "3"}}).devices.count == 3);
static_assert(resolve({.accelerator = Cuda{}, .precision = BF16Mixed{}}, {}, Host{.cuda_devices = 1}).precision ==
              BF16Mixed::facts);

TEST_CASE("auto takes the best accelerator that is there", "[issue-4.1]") {
  CHECK(resolve({}).accelerator == Cpu::facts);
  CHECK(resolve({}, {}, eight_gpus).accelerator == Cuda::facts);
  CHECK(resolve({}, {}, Host{.mps = true}).accelerator == Mps::facts);
  CHECK(resolve({}, {}, Host{.cuda_devices = 8, .tpu_devices = 4}).accelerator == Xla::facts);
  CHECK(resolve({.accelerator = "gpu"}).code() == Code::no_gpu_backend);
  CHECK(resolve({.accelerator = "cuda"}).code() == Code::accelerator_unavailable);
}

TEST_CASE("auto takes one process for one device, ddp for several or for several nodes", "[issue-4.1]") {
  CHECK(resolve({}).strategy == SingleDevice::facts);
  CHECK(resolve({.devices = 2}).strategy == Ddp::facts);
  CHECK(resolve({.num_nodes = 2}).strategy == Ddp::facts);
  CHECK(resolve({.devices = 2}, {}, Host{.interactive = true}).strategy == DdpFork::facts);
  CHECK(resolve({}, {}, Host{.tpu_devices = 8}).strategy == XlaDdp::facts);
  CHECK(resolve({}, {}, Host{.tpu_devices = 1}).strategy == SingleDeviceXla::facts);
}

TEST_CASE("strategies ignore letter case, accelerators and precisions do not", "[issue-4.1]") {
  CHECK(resolve({.strategy = "DeepSpeed_Stage_3"}).strategy == DeepSpeed<3>::facts);
  CHECK(resolve({.accelerator = "CPU"}).code() == Code::invalid_accelerator_name);
  CHECK(resolve({.precision = "BF16-mixed"}).code() == Code::invalid_precision);
}

TEST_CASE("numbers and texts are both precisions", "[issue-4.1]") {
  CHECK(resolve({.precision = 64}).precision == F64::facts);
  CHECK(resolve({.precision = "64"}).precision == F64::facts);
  CHECK(resolve({.precision = 16}, {}, eight_gpus).precision == F16Mixed::facts);
  CHECK(resolve({.precision = 16}, {}, eight_gpus).notes.has(Note::precision_alias_discouraged));
  CHECK(resolve({.precision = 8}).code() == Code::invalid_precision);
}

TEST_CASE("fallbacks say what they did", "[issue-4.1]") {
  const Resolution half = resolve({.accelerator = "cpu", .precision = "16-mixed"});
  CHECK(half.precision == BF16Mixed::facts);
  CHECK(half.precision_flag == "16-mixed");
  CHECK(half.sources.precision == Source::fallback);
  CHECK(half.notes.has(Note::fp16_amp_cpu_to_bf16));
  const Resolution dp = resolve({.accelerator = "cpu", .strategy = "dp"});
  CHECK(dp.strategy == Ddp::facts);
  CHECK(dp.notes.has(Note::dp_on_cpu_to_ddp));
  CHECK(resolve({.accelerator = "tpu", .strategy = "fsdp"}, {}, Host{.tpu_devices = 8}).strategy == XlaFsdp::facts);
}

TEST_CASE("an LT_ variable wins over code, unless it came from the command line and contradicts it", "[issue-4.1]") {
  CHECK(resolve({.strategy = "ddp"}, {{"LT_STRATEGY", "ddp_spawn"}}).strategy == DdpSpawn::facts);
  CHECK(resolve({.strategy = "ddp"}, {{"LT_STRATEGY", "ddp_spawn"}}).sources.strategy == Source::variable);
  const Resolution conflict = resolve({.strategy = "ddp"}, {{"LT_STRATEGY", "ddp_spawn"}, {"LT_CLI_USED", "1"}});
  CHECK(conflict.code() == Code::cli_conflict);
  CHECK(conflict.stage == Stage::env_args);
  CHECK(resolve({.strategy = "ddp"}, {{"LT_STRATEGY", "ddp"}, {"LT_CLI_USED", "1"}}).ok());
}

TEST_CASE("a strategy object brings its own accelerator, precision, environment and devices", "[issue-4.1]") {
  StrategyObject object{.facts = Ddp::facts};
  object.has_accelerator = true;
  object.accelerator = Cuda::facts;
  object.has_precision = true;
  object.precision = F64{};
  object.environment = Kubeflow{};
  object.devices = {.type = DeviceType::cuda, .count = 2};
  const Resolution r = resolve({.strategy = object}, {{"RANK", "1"}, {"WORLD_SIZE", "2"}}, eight_gpus);
  REQUIRE(r.ok());
  CHECK(r.accelerator == Cuda::facts);
  CHECK(r.precision == F64::facts);
  CHECK(r.environment == Kubeflow::facts);
  CHECK(r.devices.count == 2);
  CHECK(r.sources.devices == Source::strategy);
  CHECK(r.global_rank.value == 1);
  CHECK(resolve({.accelerator = "cuda", .strategy = object}, {}, eight_gpus).code() ==
        Code::accelerator_flag_and_strategy);
  CHECK(resolve({.strategy = object, .plugins = {F32{}}}, {}, eight_gpus).code() ==
        Code::precision_plugin_and_strategy);
}

TEST_CASE("plugins: one of each kind, and no precision twice", "[issue-4.1]") {
  const Resolution both = resolve({.plugins = {BF16Mixed{}, Slurm{}}});
  CHECK(both.precision == BF16Mixed::facts);
  CHECK(both.environment == Slurm::facts);
  CHECK(resolve({.plugins = {F32{}, F64{}}}).code() == Code::duplicate_plugins);
  CHECK(resolve({.precision = "64-true", .plugins = {F32{}}}).code() == Code::precision_flag_and_plugin);
  CHECK(resolve({.strategy = "fsdp", .plugins = {CheckpointKind::torch}}, {}, eight_gpus).code() ==
        Code::checkpoint_io_not_supported);
  CHECK(resolve({.plugins = {Bitsandbytes<BitsandbytesMode::nf4>{}}}).code() == Code::bnb_needs_cuda);
}

TEST_CASE("interactive hosts refuse what starts the program again; hosts without fork refuse forks", "[issue-4.1]") {
  CHECK(resolve({.strategy = "ddp", .devices = 2}, {}, Host{.interactive = true}).code() ==
        Code::interactive_incompatible);
  CHECK(resolve({.strategy = "ddp_notebook", .devices = 2}, {}, Host{.interactive = true}).ok());
  CHECK(resolve({.strategy = "ddp_fork"}, {}, Host{.fork = false}).code() == Code::fork_unsupported);
}

TEST_CASE("the environment decides who launches, and disagreement with it is kept for launching", "[issue-4.1]") {
  CHECK(resolve({.strategy = "ddp", .devices = 2}).launcher == Launcher::subprocess);
  const Resolution joined =
      resolve({.strategy = "ddp", .devices = 2},
              {{"TORCHELASTIC_RUN_ID", "1"}, {"WORLD_SIZE", "4"}, {"RANK", "3"}, {"LOCAL_RANK", "1"}});
  CHECK(joined.external_launch);
  CHECK(joined.global_rank.value == 3);
  CHECK(joined.world_size.value == 4);
  CHECK(joined.settings.code == Code::torchelastic_world_size_mismatch);
  CHECK(resolve({.strategy = "ddp", .devices = 2, .environment = "local"},
                {{"TORCHELASTIC_RUN_ID", "1"}, {"WORLD_SIZE", "4"}, {"RANK", "3"}, {"LOCAL_RANK", "0"}})
            .environment == Local::facts);
}

TEST_CASE("independent problems are reported together, in the order in which they matter", "[issue-4.4]") {
  const Resolution r =
      resolve({.accelerator = "xpu", .strategy = "dpd", .devices = 0, .num_nodes = 0, .precision = "bf16-mixd"});
  REQUIRE(r.problems.size() == 5);
  CHECK(r.problems[0].code == Code::invalid_strategy_name);
  CHECK(r.problems[1].code == Code::invalid_accelerator_name);
  CHECK(r.problems[2].code == Code::invalid_precision);
  CHECK(r.problems[3].code == Code::invalid_num_nodes);
  CHECK(r.problems[4].code == Code::zero_devices);
  CHECK(r.stage == Stage::config_flags);
}

TEST_CASE("did you mean, by edit distance", "[issue-4.4]") {
  CHECK(resolve({.strategy = "dpd"}).problems[0].nearest == "ddp");
  CHECK(resolve({.strategy = "deepspeed_stag_3"}).problems[0].nearest == "deepspeed_stage_3");
  CHECK(resolve({.strategy = "zzzzzzzzzz"}).problems[0].nearest.empty());
  CHECK(resolve({.accelerator = "GPU"}).problems[0].nearest == "gpu");
  CHECK(resolve({.accelerator = "cdua"}).problems[0].nearest == "cuda");
  CHECK(resolve({.precision = "bf16mixed"}).problems[0].nearest == "bf16-mixed");
}

TEST_CASE("single_device by name takes one device and refuses several", "[issue-4.1]") {
  CHECK(resolve({.strategy = "single_device"}, {}, eight_gpus).devices.count == 1);
  CHECK(resolve({.strategy = "single_device", .devices = 2}, {}, eight_gpus).code() == Code::strategy_needs_one_device);
}

TEST_CASE("options of strategies", "[issue-4.1]") {
  CHECK(resolve({.strategy = "deepspeed_stage_3_offload_nvme"}).strategy.parameter_offload == Offload::nvme);
  CHECK(resolve({.strategy = "ddp_find_unused_parameters_true"}).strategy.find_unused_parameters);
  CHECK(resolve({.strategy = "fsdp_cpu_offload"}, {}, eight_gpus).strategy.parameter_offload == Offload::cpu);
  CHECK(resolve({.strategy = "ddp_spawn"}).start_method == StartMethod::spawn);
}

TEST_CASE("values without sense are refused, never a crash", "[issue-4.9]") {
  const std::string long_text(100000, 'x');
  CHECK(resolve({.strategy = std::string_view(long_text)}).code() == Code::invalid_strategy_name);
  CHECK(resolve({.accelerator = std::string_view(long_text)}).code() == Code::invalid_accelerator_name);
  CHECK(resolve({.precision = std::string_view(long_text)}).code() == Code::invalid_precision);
  CHECK(resolve({.num_nodes = "99999999999999999999"}).problems.size() <= 1);
  CHECK(resolve({}, {{"LT_STRATEGY", ""}}).code() == Code::invalid_strategy_name);
}
