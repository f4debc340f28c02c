// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "fabric/comm/process_group.hpp"
#include "fabric/policy/diagnose.hpp"
#include "fabric/precision/precision_plugin.hpp"
#include "fabric/precision/true_precision.hpp"
#include "fabric/strategy/engine.hpp"
#include "fabric/strategy/single_device.hpp"

namespace fabric {

/// Never defined: naming it makes the compiler say that `Given` is legal, but the library has no engine for its
/// strategy on its accelerator yet.
template <class Given, class Instead>
struct engine_not_written_yet;

/// Never defined: likewise for the precision.
template <class Given, class Instead>
struct precision_not_written_yet;

/// Never defined: the precision's code is in a header that fabric.hpp leaves out: include
/// <fabric/precision/transformer_engine.hpp>, before the first use of such a Fabric.
template <class Given>
struct include_fabric_precision_transformer_engine_hpp;

/// Never defined: likewise <fabric/precision/bitsandbytes.hpp>.
template <class Given>
struct include_fabric_precision_bitsandbytes_hpp;

/// Never defined: likewise <fabric/sharding.hpp>.
template <class Given>
struct include_fabric_sharding_hpp;

/// Never defined: the engine exists, but this program is built without NCCL. Configure with a CUDA LibTorch.
template <class Given>
struct built_without_nccl;

namespace detail {

/// Processes on GPUs talk by NCCL.
template <class A, class S>
inline constexpr bool needs_nccl = A::facts.device == DeviceType::cuda&& S::facts.built_in &&
                                   (S::facts.family == StrategyFamily::ddp || is_sharded(S::facts));

/// The code behind policies; a stand-in for policies that are refused, so that the message is not buried under errors
/// that follow from it.
template <class A, class S, class P>
struct CodeFor {
  using Engine = fabric::Engine<Cpu, SingleDevice>;
  using Plugin = PrecisionPlugin<F32>;
};
template <class A, class S, class P>
requires HasEngine<A, S> && HasPrecisionPlugin<P>
struct CodeFor<A, S, P> {
  using Engine = fabric::Engine<A, S>;
  using Plugin = PrecisionPlugin<P>;
};
template <class A, class S, class P>
requires HasEngine<A, S> && HasPrecisionPlugin<P> && requires { typename fabric::Engine<A, S>::template Plugin<P>; }
struct CodeFor<A, S, P> {
  using Engine = fabric::Engine<A, S>;
  using Plugin = typename Engine::template Plugin<P>;
};

template <class A, class S, class P, class E>
inline constexpr bool is_offered = HasEngine<A, S>&& first_refusal(combination_v<A, S, P, E>) == RuleId::none;

/// What to use where a strategy has no code: `Ddp` on the same accelerator, on CPUs, or there in 32 bits, whichever is
/// there first.
template <class A, class P, class E>
using NearestOffer = std::conditional_t<
    is_offered<A, Ddp, P, E>, Fabric<A, Ddp, P, E>,
    std::conditional_t<is_offered<Cpu, Ddp, P, E>, Fabric<Cpu, Ddp, P, E>, Fabric<Cpu, Ddp, F32, E>>>;

}  // namespace detail

/// True if there is code for these policies; else the compiler stops at a type that says what is missing.
template <class A, class S, class P, class E>
constexpr bool diagnose_engine() {
  // NOLINTNEXTLINE(bugprone-branch-clone): each stops at a type of its own
  if constexpr (first_refusal(combination_v<A, S, P, E>) != RuleId::none) {
    return true;  // already refused by a rule
  } else if constexpr (!HasEngine<A, S>) {
    if constexpr (detail::needs_nccl<A, S> && !built_with_nccl) {
      return sizeof(built_without_nccl<Fabric<A, S, P, E>>) != 0;
    } else if constexpr (S::facts.built_in && is_sharded(S::facts)) {
      return sizeof(include_fabric_sharding_hpp<Fabric<A, S, P, E>>) != 0;
    } else {
      return sizeof(engine_not_written_yet<Fabric<A, S, P, E>, use_instead<detail::NearestOffer<A, P, E>>>) != 0;
    }
  } else if constexpr (!HasPrecisionPlugin<P>) {
    if constexpr (P::facts.kind == PrecisionKind::transformer_engine) {
      return sizeof(include_fabric_precision_transformer_engine_hpp<Fabric<A, S, P, E>>) != 0;
    } else if constexpr (P::facts.kind == PrecisionKind::bitsandbytes) {
      return sizeof(include_fabric_precision_bitsandbytes_hpp<Fabric<A, S, P, E>>) != 0;
    } else {
      return sizeof(precision_not_written_yet<Fabric<A, S, P, E>, use_instead<Fabric<A, S, BF16Mixed, E>>>) != 0;
    }
  } else {
    return true;
  }
}

}  // namespace fabric
