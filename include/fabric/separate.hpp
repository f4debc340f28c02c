// SPDX-License-Identifier: Apache-2.0
#pragma once

// fabric/fabric.hpp for programs of many sources. What no policy changes (the connector, the launchers, the meeting of
// the ranks) and what the strategies of a menu share (the engine of DDP) is compiled once, in the source that includes
// fabric/separate_source.hpp, and not in each; so another combination costs little more than its own loop. The same
// code runs, but the compiler cannot see through these calls, none of which a step makes more than once.

#include "fabric/fabric.hpp"

namespace fabric {

extern template Selection resolve_here<detail::WholeHost>(const Flags&, const Registry&, detail::WholeHost&&);
extern template World join_world<void>(const Selection&, at::Device, const LaunchOptions&);
extern template class DdpModule<false>;
extern template class DdpModule<true>;

namespace detail {

extern template void leave_process_group<void>(World&) noexcept;

}  // namespace detail
}  // namespace fabric
