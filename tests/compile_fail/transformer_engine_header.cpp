// SPDX-License-Identifier: Apache-2.0
//
// [issue-5.5] FP8's code is in a header of its own.
// needs: torch
// expect: include_fabric_precision_transformer_engine_hpp<fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::TransformerEngine
#include <fabric/fabric.hpp>
#ifdef FABRIC_TWIN
#include <fabric/precision/transformer_engine.hpp>
#endif
void use() { fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::TransformerEngine<>> fabric; }
