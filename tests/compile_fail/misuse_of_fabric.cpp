// SPDX-License-Identifier: Apache-2.0
//
// [issue-3.6] Mistakes with Fabric that types catch.
// needs: torch
// expect: setup takes modules \(ModuleHolder, pointer or reference to a torch::nn::Module\) and optimizers
// expect: a forward method returns what the loss is made from; this one returns nothing
// expect: setup_dataloader takes a dataset, not a loader: a loader's sampler cannot be made to deal rows to ranks
// expect: no matching .*no_backward_sync
// expect: cannot look for tensors in this type: .* adapt the type with BOOST_HANA_ADAPT_STRUCT
// expect: cannot see the members of this structure; adapt it with BOOST_HANA_ADAPT_STRUCT
#include <boost/hana/adapt_struct.hpp>
#include <torch/torch.h>

#include <fabric/fabric.hpp>

struct NetImpl : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) { return x; }
  void print(const at::Tensor& /*x*/) {}
};
TORCH_MODULE(Net);

struct Opaque {  // no aggregate
  explicit Opaque(at::Tensor value) : hidden(std::move(value)) {}
  at::Tensor hidden;
};

struct Hidden {  // an aggregate whose members cannot be counted
  at::Tensor& elsewhere;
};

using OnCpu = fabric::Fabric<fabric::Cpu, fabric::SingleDevice, fabric::F32>;
using Dataset = torch::data::datasets::TensorDataset;

#ifdef FABRIC_TWIN
BOOST_HANA_ADAPT_STRUCT(Opaque, hidden);
template <>
struct fabric::tree::Members<Hidden> {
  static void for_each(const Hidden& /*value*/, auto&& /*visit*/) {}
};

void use(OnCpu& fabric, Net& net, Dataset& dataset, Opaque& opaque) {
  auto model = fabric.setup(net);
  model.mark_forward_method (&NetImpl::forward)(torch::ones({1}));
  auto loader = fabric.setup_dataloader(dataset, {.batch_size = 2});
  auto guard = fabric.no_backward_sync(model);
  opaque = fabric.all_reduce(opaque);
  static_cast<void>(fabric.all_reduce(Hidden{opaque.hidden}));
}
#else
void use(OnCpu& fabric, Net& net, Dataset& dataset, Opaque& opaque) {
  auto [model, one] = fabric.setup(net, 1);
  fabric.setup(net).mark_forward_method (&NetImpl::print)(torch::ones({1}));
  auto loader = fabric.setup_dataloader(*torch::data::make_data_loader(dataset, 2), {.batch_size = 2});
  auto guard = fabric.no_backward_sync(net);
  opaque = fabric.all_reduce(opaque);
  static_cast<void>(fabric.all_reduce(Hidden{opaque.hidden}));
}
#endif
