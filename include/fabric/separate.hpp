// SPDX-License-Identifier: Apache-2.0
#pragma once

// fabric/fabric.hpp for programs of many sources. What no policy changes (the connector, the launchers, the meeting of
// the ranks, the base of class Fabric) and what the strategies of a menu share (which modules are set up, the engine of
// DDP) is compiled once, in the source that includes fabric/separate_source.hpp, and not in each; so another
// combination costs little more than its own loop. The same code runs, but the compiler cannot see through these calls,
// of which a step makes a few.

#include "fabric/fabric.hpp"

namespace fabric {

extern template Selection resolve_here<detail::WholeHost>(const Flags&, const Registry&, detail::WholeHost&&);
extern template World join_world<void>(const Selection&, at::Device, const LaunchOptions&);
extern template class FabricBase<>;
extern template class DdpModule<false>;
extern template class DdpModule<true>;

namespace optim {

extern template void follow_parameters<void>(torch::optim::Optimizer&);

}  // namespace optim

namespace detail {

extern template void leave_process_group<void>(World&) noexcept;
extern template void rethrow_naming_collective<void>(const World&);
extern template void drop_gradients<void>(torch::optim::Optimizer&, bool);
extern template class KnownModules<DdpModule<false>>;
extern template class KnownModules<DdpModule<true>>;
extern template class KnownModules<Engine<Cpu, SingleDevice>::ModuleState>;
extern template class KnownModules<Engine<Cuda, SingleDevice>::ModuleState>;

}  // namespace detail
}  // namespace fabric
