// SPDX-License-Identifier: Apache-2.0
//
// [issue-5.6] So is bitsandbytes' code.
// needs: torch
// expect: include_fabric_precision_bitsandbytes_hpp<fabric::Fabric<fabric::Cuda, fabric::SingleDevice, fabric::Bitsandbytes
#include <fabric/fabric.hpp>
#ifdef FABRIC_TWIN
#include <fabric/precision/bitsandbytes.hpp>
#endif
void use() {
  using Mode = fabric::BitsandbytesMode;
  fabric::Fabric<fabric::Cuda, fabric::SingleDevice, fabric::Bitsandbytes<Mode::nf4>> fabric(
      {.precision = {.ignore_modules = {"lm_head"}}});
}
