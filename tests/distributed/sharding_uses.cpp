// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// ranks: 2
//
// What programs do besides the usual loop: they look at weights and change some, evaluate in between, freeze layers,
// keep gradients, and go on after an exception.
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/sharding.hpp"
#include "support/parts.hpp"
#include "support/ranks.hpp"
#include "support/sharded_policies.hpp"

namespace {

using namespace fabric;
using tests::make_net;
using tests::Net;
using tests::on_ranks;
using tests::Part;
using tests::same_on_all_ranks;
using tests::Sharded;
using tests::Zero;

const Units by_part = Units::by_type<Part>();

template <class F>
at::Tensor batch(const F& fabric, int step) {
  torch::manual_seed(static_cast<std::uint64_t>(100 * step + fabric.global_rank()));
  return torch::randn({4, 8});
}

/// This rank's parts of the masters, as they are now.
std::vector<at::Tensor> masters_of(const ShardedModule& state) {
  std::vector<at::Tensor> masters;
  for (const auto& [name, master] : state.masters()) masters.push_back(master.detach().clone());
  return masters;
}
bool equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!a[i].equal(b[i])) return false;
  }
  return a.size() == b.size();
}

/// Trains for some steps, with `between(fabric, model, net)` after each, and returns the masters.
template <class F>
std::vector<at::Tensor> train(F& fabric,
                              const std::function<void(int, std::function<at::Tensor(at::Tensor)>)>& between) {
  Net net = make_net();
  auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    fabric.backward(model(batch(fabric, step)).pow(2).mean());
    between(step, [&, &model = model](const at::Tensor& x) { return model(x); });
    optimizer.step();
  }
  return masters_of(*model.state());
}

}  // namespace

TEST_CASE("[issue-8.5] looking at whole parameters leaves the masters' digits alone; what is changed is kept") {
  const auto look = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 1e-4));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(batch(fabric, step)).to(torch::kFloat).pow(2).mean());
      optimizer.step();
    }
    auto& state = *model.state();
    const auto before = masters_of(state);
    state.with_full_parameters([&] { (void)net->part(0).up->weight.sum(); });
    REQUIRE(equal(masters_of(state), before));
    state.with_full_parameters([&] {
      state.with_full_parameters([&] { (void)net->part(1).up->weight.sum(); });
      const torch::NoGradGuard no_grad;
      net->part(0).up->bias.fill_(0.5);
    });
    std::size_t i = 0;
    for (const auto& [name, master] : state.masters()) {
      const bool filled = name == "parts.0.up.bias";
      REQUIRE((filled ? master.eq(0.5).all().template item<bool>() : master.equal(before[i])));
      ++i;
    }
    (void)model(batch(fabric, 0));
  };
  on_ranks<BF16Mixed, DeepSpeed<3>>({.units = by_part}, look);
  on_ranks<BF16Mixed, DeepSpeed<2>>({.units = by_part}, look);
}

TEST_CASE("[issue-8.2] a change in place that the next step would undo is refused, whatever is divided") {
  const auto change = [](auto& fabric) {
    Net net = make_net();
    auto model = fabric.setup(net);
    const auto spoil = [&] {
      const torch::NoGradGuard no_grad;
      net->part(1).down->weight.mul_(2);
      (void)model(batch(fabric, 0));
    };
    REQUIRE_THROWS_WITH(spoil(), ContainsSubstring("parts.1.down.weight") && ContainsSubstring("with_full_parameters"));
  };
  on_ranks<F32, Zero<1>>({.units = by_part}, change);
  on_ranks<F32, Sharded>({.sharding = Sharding::none, .units = by_part}, change);
  on_ranks<F32, Zero<3>>({.units = by_part}, change);
}

TEST_CASE("[issue-8.2] an evaluation between backward and step, in any mode, changes nothing") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    const auto expected = train(fabric, [](int, const auto&) {});
    for (const bool inference : {true, false}) {
      const auto masters = train(fabric, [&](int step, const auto& forward) {
        const c10::InferenceMode mode(inference);
        const torch::NoGradGuard no_grad;
        REQUIRE_FALSE(forward(batch(fabric, 50 + step)).requires_grad());
      });
      REQUIRE(equal(masters, expected));
    }
  });
}

TEST_CASE("[issue-8.2] after an exception in backward, training goes on as if that batch had not been") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    const auto expected = train(fabric, [](int, const auto&) {});
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      const auto y = model(batch(fabric, 70 + step));
      auto half = net->part(0).up->weight.sum();  // whose gradient comes late
      const auto loss = y.pow(2).mean() + half;
      half.register_hook([](const at::Tensor&) -> at::Tensor { throw std::runtime_error("out of paper"); });
      REQUIRE_THROWS_WITH(fabric.backward(loss), ContainsSubstring("out of paper"));
      for (const auto& unit : model.state()->units()) {
        REQUIRE(unit->state() == fabric::detail::FlatUnit::State::released);
      }
      optimizer.zero_grad();
      fabric.backward(model(batch(fabric, step)).pow(2).mean());
      optimizer.step();
    }
    REQUIRE(equal(masters_of(*model.state()), expected));
  });
}

TEST_CASE("[issue-8.5] loss.backward() serves once per step, for clipping too; a second one is refused") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    const auto norm = [&](bool plain) {
      Net net = make_net();
      auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
      const auto loss = model(batch(fabric, 0)).pow(2).mean();
      if (plain) {
        loss.backward();
      } else {
        fabric.backward(loss);
      }
      const double clipped = fabric.clip_gradients(model, ClipNorm{.max_norm = 0.1}).template item<double>();
      optimizer.step();
      return std::pair(clipped, masters_of(*model.state()));
    };
    const auto [ours, masters] = norm(false);
    const auto [plain, plain_masters] = norm(true);
    REQUIRE(ours == plain);
    REQUIRE(equal(masters, plain_masters));

    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    model(batch(fabric, 0)).pow(2).mean().backward();
    const auto again = model(batch(fabric, 1)).pow(2).mean();
    REQUIRE_THROWS_WITH(again.backward(), ContainsSubstring("call fabric.backward"));
    model.state()->abandon_backward();
  });
}

TEST_CASE("[issue-8.2] a layer may be frozen after setup; to train one that was frozen is refused") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    Net net = make_net();
    net->part(4).up->weight.requires_grad_(false);
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.1));
    net->part(1).up->weight.requires_grad_(false);
    const auto before = masters_of(*model.state());
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      fabric.backward(model(batch(fabric, step)).pow(2).mean());
      optimizer.step();
    }
    std::size_t i = 0;
    for (const auto& [name, master] : model.state()->masters()) {
      const bool frozen = name == "parts.1.up.weight" || name == "parts.4.up.weight";
      if (master.numel() > 0) REQUIRE(master.equal(before[i]) == frozen);
      ++i;
    }
    net->part(4).up->weight.requires_grad_(true);
    REQUIRE_THROWS_WITH(model(batch(fabric, 0)), ContainsSubstring("parts.4.up.weight was frozen at setup"));
  });
}

TEST_CASE("[issue-8.2] gradients that the program keeps stay as they were") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    const auto gradients = [&, &model = model, &optimizer = optimizer](int step) {
      optimizer.zero_grad();
      fabric.backward(model(batch(fabric, step)).pow(2).mean());
      std::vector<at::Tensor> kept;
      for (const auto& [name, master] : model.state()->masters()) kept.push_back(master.grad());
      return kept;
    };
    const auto first = gradients(0);
    std::vector<at::Tensor> copies;
    copies.reserve(first.size());
    for (const at::Tensor& gradient : first) copies.push_back(gradient.clone());
    (void)gradients(1);
    REQUIRE(equal(first, copies));
  });
}

TEST_CASE("[issue-8.2] ranks that use other parameters agree step after step, and nobody waits for ever") {
  const auto run = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.05));
    for (int step = 0; step < 5; ++step) {
      optimizer.zero_grad();
      // Rank 0 goes through all parts, the others through one, each step another.
      const auto y = model.state()->forward([&] {
        const at::Tensor x = batch(fabric, step);
        return fabric.is_global_zero() ? net(x) : net->part(static_cast<std::size_t>(step)).forward(x);
      });
      fabric.backward(y.pow(2).mean());
      optimizer.step();
    }
    model.state()->with_full_parameters([&] {
      for (const auto& parameter : net->parameters()) {
        REQUIRE(same_on_all_ranks(fabric.world(), parameter.detach()));
        REQUIRE(parameter.isfinite().all().template item<bool>());
      }
    });
  };
  on_ranks<F32, Zero<2>>({.units = by_part, .find_unused_parameters = true}, run);
  on_ranks<F32, Sharded>({.sharding = Sharding::none, .units = by_part, .find_unused_parameters = true}, run);
}

TEST_CASE("[issue-8.2] an optimizer's zero_grad leaves what another gathers under no_backward_sync") {
  const auto run = [](auto& fabric) {
    Net net = make_net();
    std::vector<at::Tensor> front;
    std::vector<at::Tensor> back;
    for (std::size_t i = 0; i < 5; ++i) {
      for (const at::Tensor& parameter : net->part(i).parameters()) (i < 2 ? front : back).push_back(parameter);
    }
    auto [model, first, second] = fabric.setup(net, optim::SGD(front, 0.05), optim::SGD(back, 0.05));
    for (int step = 0; step < 3; ++step) {
      first.zero_grad();
      second.zero_grad();
      {
        const auto guard = fabric.no_backward_sync(model);
        fabric.backward(model(batch(fabric, 2 * step)).pow(2).mean());
      }
      first.zero_grad();
      REQUIRE_THROWS_WITH(second.step(), ContainsSubstring("no_backward_sync"));
      fabric.backward(model(batch(fabric, 2 * step + 1)).pow(2).mean());
      first.step();
      second.step();
    }
    std::vector<at::Tensor> all;
    const auto keep = [&, &net = net] {
      for (const at::Tensor& parameter : net->parameters()) all.push_back(parameter.detach().clone());
    };
    const auto state = model.state();
    if constexpr (requires { state->with_full_parameters(keep); }) {
      state->with_full_parameters(keep);
    } else {
      keep();
    }
    return all;
  };
  std::vector<at::Tensor> expected;
  on_ranks<F32>([&](auto& fabric) { expected = run(fabric); });
  const auto compare = [&](auto& fabric) {
    const auto ours = run(fabric);
    REQUIRE(ours.size() == expected.size());
    for (std::size_t i = 0; i < ours.size(); ++i) REQUIRE(at::allclose(ours[i], expected[i], 1e-5, 1e-6));
  };
  on_ranks<F32, Sharded>({.units = by_part}, compare);
  on_ranks<F32, Zero<2>>({.units = by_part}, compare);
}

TEST_CASE("[issue-8.2] two sharded modules in one graph, with one optimizer each, as in adversarial training") {
  const auto run = [](auto& fabric) {
    torch::manual_seed(3);
    Net g;
    Net d;
    auto [generator, discriminator, g_optimizer, d_optimizer] =
        fabric.setup(g, d, optim::SGD(g->parameters(), 0.05), optim::SGD(d->parameters(), 0.05));
    for (int step = 0; step < 4; ++step) {
      g_optimizer.zero_grad();
      d_optimizer.zero_grad();
      fabric.backward(discriminator(generator(batch(fabric, step))).pow(2).mean());
      g_optimizer.step();
      d_optimizer.step();
    }
    std::vector<at::Tensor> all;
    const auto keep = [&](Net& net) {
      for (const at::Tensor& parameter : net->parameters()) all.push_back(parameter.detach().clone());
    };
    const auto of_generator = generator.state();
    const auto of_discriminator = discriminator.state();
    if constexpr (requires { of_generator->with_full_parameters([] {}); }) {
      of_generator->with_full_parameters([&] { keep(g); });
      of_discriminator->with_full_parameters([&] { keep(d); });
    } else {
      keep(g);
      keep(d);
    }
    return all;
  };
  std::vector<at::Tensor> expected;
  on_ranks<F32>([&](auto& fabric) { expected = run(fabric); });
  on_ranks<F32, Sharded>({.units = by_part}, [&](auto& fabric) {
    const auto ours = run(fabric);
    REQUIRE(ours.size() == expected.size());
    for (std::size_t i = 0; i < ours.size(); ++i) REQUIRE(at::allclose(ours[i], expected[i], 1e-5, 1e-6));
  });
}

namespace {

struct NormedImpl : torch::nn::Module {
  torch::nn::Linear in{register_module("in", torch::nn::Linear(8, 8))};
  torch::nn::BatchNorm1d norm{register_module("norm", torch::nn::BatchNorm1d(8))};
  at::Tensor forward(const at::Tensor& x) { return norm(in(x)); }
};
TORCH_MODULE(Normed);

}  // namespace

TEST_CASE("[issue-8.2] BatchNorm takes two forwards before one backward, under Ddp too") {
  const auto run = [](auto& fabric) {
    torch::manual_seed(4);
    Normed net;
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      const auto first = model(batch(fabric, step));
      const auto second = model(batch(fabric, 10 + step));
      fabric.backward((first - second).pow(2).mean());
      optimizer.step();
      REQUIRE(same_on_all_ranks(fabric.world(), net->norm->running_mean));
    }
  };
  on_ranks<F32>(run);
  on_ranks<F32, Sharded>(run);
}

TEST_CASE("[issue-8.1] the engine of Fsdp, which as a strategy needs GPUs, on the ranks of a CPU") {
  on_ranks<F32, ModelParallel>({.units = by_part}, [](auto& fabric) {
    const auto expected = [&] {
      Net net = make_net();
      auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
      for (int step = 0; step < 3; ++step) {
        optimizer.zero_grad();
        fabric.backward(model(batch(fabric, step)).pow(2).mean());
        fabric.clip_gradients(model, ClipNorm{0.5});
        optimizer.step();
      }
      return masters_of(*model.state());
    }();
    using FsdpEngine = fabric::detail::ShardedEngine<Cuda, Fsdp>;
    FsdpEngine engine({.units = by_part});
    const auto state = std::make_shared<ShardedModule>();
    Net net = make_net();
    engine.setup(*state, *net, fabric.world(), strategy_precision_v<Fsdp, F32>);
    optim::SGD optimizer(net->parameters(), 0.1);
    FsdpEngine::adopt(optimizer, {state});
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      FsdpEngine::after_zero_grad(*state, optimizer);
      FsdpEngine::forward(*state, [&] { return net(batch(fabric, step)); }).pow(2).mean().backward();
      FsdpEngine::after_backward(*state);
      FsdpEngine::clip_gradients({state}, optimizer, ClipNorm{0.5});
      FsdpEngine::before_step(*state);
      FsdpEngine::step({state}, optimizer, [&] { return optimizer.step(); });
      FsdpEngine::after_step(*state);
    }
    REQUIRE(equal(masters_of(*state), expected));
    REQUIRE_THROWS_WITH(FsdpEngine({.tensor_parallel_size = 2}), ContainsSubstring("only ModelParallel"));
  });
}

TEST_CASE("[issue-8.1] slices of a module that was divided by hand are refused") {
  on_ranks<F32, Sharded>([](auto& fabric) {
    torch::nn::Linear net(8, 8);
    parallelize_module(*net, fabric.world(), {{"", Rowwise{.split_input = true}}});
    REQUIRE_THROWS_WITH(fabric.setup(net), ContainsSubstring("'weight'") || ContainsSubstring("weight is a slice"));
  });
}
