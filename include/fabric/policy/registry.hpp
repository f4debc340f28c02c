// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>

#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/precision.hpp"
#include "fabric/policy/strategy.hpp"

namespace fabric {

/// Every policy of the library, in the order in which messages list them.
inline constexpr auto built_in_accelerators = boost::hana::tuple_t<Cpu, Cuda, Mps, Xla>;
inline constexpr auto built_in_strategies =
    boost::hana::tuple_t<SingleDevice, Ddp, DdpFindUnusedParameters, DdpSpawn, DdpFork, DdpNotebook, DataParallel, Fsdp,
                         FsdpCpuOffload, DeepSpeed<1>, DeepSpeed<1, Offload::cpu>, DeepSpeed<2>,
                         DeepSpeed<2, Offload::cpu>, DeepSpeed<3>, DeepSpeed<3, Offload::cpu>,
                         DeepSpeed<3, Offload::nvme>, ModelParallel, SingleDeviceXla, XlaDdp, XlaFsdp>;
inline constexpr auto built_in_precisions =
    boost::hana::tuple_t<F32, F64, F16, BF16, F16Mixed, BF16Mixed, TransformerEngine<BF16>, TransformerEngine<F16>,
                         Bitsandbytes<BitsandbytesMode::nf4>, Bitsandbytes<BitsandbytesMode::nf4_dq>,
                         Bitsandbytes<BitsandbytesMode::fp4>, Bitsandbytes<BitsandbytesMode::fp4_dq>,
                         Bitsandbytes<BitsandbytesMode::int8>, Bitsandbytes<BitsandbytesMode::int8_training>>;

}  // namespace fabric
