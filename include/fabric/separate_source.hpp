// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the sources that include fabric/separate.hpp leave to another one: this. Included by one source of a program,
// best by one that holds nothing else.

#include "fabric/separate.hpp"

namespace fabric {

template Selection resolve_here<detail::WholeHost>(const Flags&, const Registry&, detail::WholeHost&&);
template World join_world<void>(const Selection&, at::Device, const LaunchOptions&);
template class FabricBase<>;
template class DdpModule<false>;
template class DdpModule<true>;

namespace optim {

template void follow_parameters<void>(torch::optim::Optimizer&);

}  // namespace optim

namespace detail {

template void leave_process_group<void>(World&) noexcept;
template void rethrow_naming_collective<void>(const World&);
template void drop_gradients<void>(torch::optim::Optimizer&, bool);
template class KnownModules<DdpModule<false>>;
template class KnownModules<DdpModule<true>>;
template class KnownModules<Engine<Cpu, SingleDevice>::ModuleState>;
template class KnownModules<Engine<Cuda, SingleDevice>::ModuleState>;

}  // namespace detail
}  // namespace fabric
