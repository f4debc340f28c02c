// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/strategy.hpp"

namespace fabric {

/// What a strategy policy does with LibTorch on an accelerator. To add a strategy, write its policy and specialise this
/// template. A specialisation has
/// - `Options`, default-constructible: what may be tuned at run time;
/// - `ModuleState`: what it keeps for each module that is set up;
/// - `Engine(Options)`;
/// - `World launch(const Selection&, at::Device)`: starts or joins the other processes;
/// - `void setup(ModuleState&, torch::nn::Module&, const World&)`: makes the replicas equal and hooks into backward;
///   one that keeps parameters in other dtypes takes the `StrategyPrecision` besides;
/// - `forward(ModuleState&, run)`: calls `run()`, which runs the module, and returns its result;
/// - `void after_backward(ModuleState&)`;
/// - `void before_step(ModuleState&)`: throws when the gradients are not what the optimizer may use;
/// - `void after_zero_grad(ModuleState&, const torch::optim::Optimizer&)`: that one has dropped its gradients;
/// - `SyncGuard no_backward_sync(ModuleState&, bool enabled)`: while alive, backward keeps gradients local;
/// and if it needs them
/// - `template <class P> Plugin`: what a precision does here, in place of `PrecisionPlugin<P>`;
/// - `moves_modules`, false if `setup` brings the module to the device by itself;
/// - `void adopt(torch::optim::Optimizer&, const std::vector<std::shared_ptr<ModuleState>>&)`: an optimizer of these
///   modules' parameters is set up, which may have to change others instead;
/// - `void abandon_backward(ModuleState&)`: an exception has left backward;
/// - `clip_gradients(states, owner, ClipNorm)`: clips what modules or an optimizer have, and returns the norm;
/// - `std::vector<at::Tensor> local_gradients(states, optimizer)`: gradients that are not averaged yet, where those are
///   not the optimizer's;
/// - `World data_world(const World&)`: the ranks among which data are divided, where that is not all;
/// - `step(states, optimizer, step)`: calls `step()`, which steps the optimizer, and returns its result, or steps it in
///   portions;
/// - `void after_step(ModuleState&)`: an optimizer has changed what it has;
/// - `at::Tensor mean_loss(const ModuleState&, const at::Tensor&)`: of the ranks' losses, for optimizers that go by it.
/// `SingleDevice`'s is the smallest example.
template <class A, class S>
class Engine;

/// Is there code for this strategy on this accelerator?
template <class A, class S>
concept HasEngine = requires {
  sizeof(Engine<A, S>);
};

}  // namespace fabric
