// SPDX-License-Identifier: Apache-2.0
//
// [issue-5.6] Quantised weights need a GPU, and their int8 modes half floats.
// expect: refused<.*Fabric<.*Cpu, .*SingleDevice, .*Bitsandbytes.*bitsandbytes_needs_cuda
// expect: Bitsandbytes computes in F16 or BF16, and its int8 modes in F16 only
#include <fabric/policy/diagnose.hpp>
using Mode = fabric::BitsandbytesMode;
#ifdef FABRIC_TWIN
static_assert(fabric::diagnose<fabric::Cuda, fabric::SingleDevice, fabric::Bitsandbytes<Mode::nf4>>());
static_assert(fabric::Bitsandbytes<Mode::int8, fabric::F16>::facts.compute == fabric::Scalar::f16);
#else
static_assert(fabric::diagnose<fabric::Cpu, fabric::SingleDevice, fabric::Bitsandbytes<Mode::nf4>>());
static_assert(fabric::Bitsandbytes<Mode::int8, fabric::BF16>::facts.compute == fabric::Scalar::bf16);
#endif
