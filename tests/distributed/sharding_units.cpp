// SPDX-License-Identifier: Apache-2.0
// labels: distributed sharding
// ranks: 8
//
// Units: when they are whole, what they hold and send, and what is refused.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/module/deferred_init.hpp"
#include "fabric/shard/traffic.hpp"
#include "fabric/sharding.hpp"
#include "support/parts.hpp"
#include "support/ranks.hpp"
#include "support/sharded_policies.hpp"
#include "support/socket_count.hpp"

namespace {

using namespace fabric;
using tests::on_ranks;
using tests::same_on_all_ranks;
using tests::Sharded;
using tests::Zero;

using tests::make_net;
using tests::Net;
using tests::PartImpl;

const Units by_part = Units::by_type<PartImpl>();

/// How many units have memory for whole parameters.
std::int64_t whole(const ShardedModule& state) {
  return std::count_if(state.units().begin(), state.units().end(),
                       [](const auto& unit) { return unit->state() != fabric::detail::FlatUnit::State::released; });
}

at::Tensor batch(int seed) {
  torch::manual_seed(static_cast<std::uint64_t>(seed));
  return torch::randn({4, 8});
}

}  // namespace

TEST_CASE("[issue-8.2] units are whole only while they are used, and never more than may be in flight") {
  for (const bool prefetch : {true, false}) {
    for (const int limit : {1, 2, 3}) {
      on_ranks<F32, Sharded>({.units = by_part, .prefetch = prefetch, .units_in_flight = limit}, [&](auto& fabric) {
        Net net = make_net();
        auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.01));
        REQUIRE(model.state()->units().size() == 5);
        REQUIRE(whole(*model.state()) == 0);
        std::int64_t most = 0;
        std::int64_t most_in_backward = 0;
        for (std::size_t i = 0; i < 5; ++i) {
          net->part(i).inside = [&, &model = model] { most = std::max(most, whole(*model.state())); };
          net->part(i).inside_backward = [&, &model = model] {
            most_in_backward = std::max(most_in_backward, whole(*model.state()));
          };
        }
        for (int step = 0; step < 4; ++step) {
          most = most_in_backward = 0;
          optimizer.zero_grad();
          auto loss = model(batch(step)).pow(2).mean();
          REQUIRE(whole(*model.state()) == 0);  // between forward and backward
          fabric.backward(loss);
          REQUIRE(whole(*model.state()) == 0);
          optimizer.step();
          REQUIRE(most == limit);
          REQUIRE(most_in_backward <= limit);
        }
      });
    }
  }
}

TEST_CASE("[issue-8.3] from the second step on, the next unit is fetched while one computes, in backward too") {
  using State = fabric::detail::FlatUnit::State;
  for (const bool prefetch : {true, false}) {
    on_ranks<F32, Sharded>({.units = by_part, .prefetch = prefetch, .units_in_flight = 2}, [&](auto& fabric) {
      Net net = make_net();
      auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.01));
      std::vector<std::size_t> forward;
      std::vector<std::size_t> backward;
      const auto fetched = [&, &model = model](std::size_t i) {
        return i < 5 && model.state()->units()[i]->state() != State::released;
      };
      for (std::size_t i = 0; i < 5; ++i) {
        net->part(i).inside = [&, i] {
          if (fetched(i + 1)) forward.push_back(i + 1);
        };
        net->part(i).inside_backward = [&, i] {
          if (i > 0 && fetched(i - 1)) backward.push_back(i - 1);
        };
      }
      for (int step = 0; step < 3; ++step) {
        forward.clear();
        backward.clear();
        optimizer.zero_grad();
        fabric.backward(model(batch(step)).pow(2).mean());
        optimizer.step();
        const bool knows = prefetch && step > 0;
        REQUIRE(forward == (knows ? std::vector<std::size_t>{1, 2, 3, 4} : std::vector<std::size_t>{}));
        REQUIRE(backward == (knows ? std::vector<std::size_t>{3, 2, 1, 0} : std::vector<std::size_t>{}));
      }
    });
  }
}

TEST_CASE("[issue-8.3] with reshard_after_forward false, and as grad-op, units stay whole from forward to backward") {
  const auto test = [](ShardingOptions options) {
    options.units = by_part;
    on_ranks<F32, Sharded>(options, [&](auto& fabric) {
      Net net = make_net();
      auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.01));
      auto loss = model(batch(0)).pow(2).mean();
      REQUIRE(whole(*model.state()) == 5);
      fabric.backward(loss);
      REQUIRE(whole(*model.state()) == 0);
    });
  };
  test({.reshard_after_forward = false});
  test({.sharding = Sharding::grad_op});
}

TEST_CASE("[issue-8.2] an exception in forward leaves no unit whole, and the next step is as if it had not been") {
  on_ranks<F32, Sharded>({.units = by_part}, [&](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.01));
    (void)model(batch(0));
    net->part(2).inside = [] { throw std::runtime_error("no more paper"); };
    REQUIRE_THROWS_WITH(model(batch(0)), "no more paper");
    REQUIRE(whole(*model.state()) == 0);
    net->part(2).inside = [] {};
    fabric.backward(model(batch(fabric.global_rank())).pow(2).mean());
    optimizer.step();
  });
}

TEST_CASE("[issue-8.2] several forwards before one backward, inference and a frozen layer") {
  const auto train = [](auto& fabric) {
    Net net = make_net();
    net->part(1).up->weight.set_requires_grad(false);
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    at::Tensor seen;
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const auto first = model(batch(10 * step + fabric.global_rank()));
      {
        const torch::NoGradGuard no_grad;
        seen = model(batch(99));
      }
      const auto second = model(batch(1000 + 10 * step + fabric.global_rank()));
      fabric.backward((first * second).mean());
      optimizer.step();
    }
    return seen;
  };
  at::Tensor expected;
  on_ranks<F32>([&](auto& fabric) { expected = train(fabric); });
  const auto compare = [&](auto& fabric) {
    const at::Tensor seen = train(fabric);
    REQUIRE(same_on_all_ranks(fabric.world(), seen));
    REQUIRE((seen - expected).abs().max().template item<float>() < 1e-5F);
  };
  on_ranks<F32, Sharded>({.units = by_part}, compare);
  on_ranks<F32, Sharded>({.units = by_part, .reshard_after_forward = false}, compare);
  on_ranks<F32, Zero<2>>(compare);
}

TEST_CASE("[issue-8.4] stages 1, 2 and 3 hold different bytes of optimizer state, gradients and parameters") {
  struct Held {
    std::int64_t parameters, gradients, peak, states;
  };
  const auto measure = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
    Held held{};
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      auto loss = model(batch(step)).pow(2).mean();
      fabric.backward(loss);
      held.gradients = model.state()->memory().gradients;
      optimizer.step();
    }
    held.parameters = model.state()->memory().parameters + model.state()->memory().masters;
    for (auto& [key, state] : optimizer->state()) {
      optim::each_state_tensor(*state,
                               [&](const at::Tensor& t) { held.states += static_cast<std::int64_t>(t.nbytes()); });
    }
    return held;
  };
  std::vector<Held> held;
  std::int64_t all = 0;
  on_ranks<F32, Zero<1>>({.units = by_part}, [&](auto& fabric) { held.push_back(measure(fabric)); });
  on_ranks<F32, Zero<2>>({.units = by_part}, [&](auto& fabric) { held.push_back(measure(fabric)); });
  on_ranks<F32, Zero<3>>({.units = by_part}, [&](auto& fabric) {
    held.push_back(measure(fabric));
    for (const auto& parameter : make_net()->parameters()) all += static_cast<std::int64_t>(parameter.nbytes());
  });
  const int ranks = tests::ranks();
  // Parameters: whole in stages 1 and 2.
  REQUIRE(held[0].parameters >= all);
  REQUIRE(held[1].parameters == held[0].parameters);
  REQUIRE(held[2].parameters * ranks == held[0].parameters);
  // Gradients at the end of backward: the buckets are kept in stage 1 alone.
  REQUIRE(held[0].gradients == held[0].parameters + held[0].parameters / ranks);
  REQUIRE(held[1].gradients == held[0].parameters / ranks);
  REQUIRE(held[2].gradients == held[1].gradients);
  // State: two moments of this rank's part, without padding.
  REQUIRE(held[0].states <= 2 * held[0].parameters / ranks);
  REQUIRE(held[1].states == held[0].states);
  REQUIRE(held[2].states == held[0].states);
}

TEST_CASE("[issue-8.accept] messages and bytes of a step are those of the formulae") {
  const auto count = [](auto& fabric, int stage) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.01));
    Traffic expected;
    for (const auto& unit : model.state()->units()) {
      expected = expected + sharded_step(stage, static_cast<std::uint64_t>(unit->parameter_bytes()),
                                         static_cast<std::uint64_t>(unit->gradient_bytes()),
                                         static_cast<std::uint64_t>(fabric.world_size()));
    }
    for (int step = 0; step < 4; ++step) {
      fabric.barrier();
      const auto before = tests::socket_count();
      optimizer.zero_grad();
      fabric.backward(model(batch(step)).pow(2).mean());
      optimizer.step();
      const auto sent = tests::socket_count() - before;
      if (step < 2) continue;  // in the first the order is agreed on
      REQUIRE(sent.payload == expected.bytes);
      REQUIRE(sent.messages == expected.messages);
    }
    fabric.barrier();
  };
  on_ranks<F32, Zero<1>>({.units = by_part}, [&](auto& fabric) { count(fabric, 1); });
  on_ranks<F32, Zero<2>>({.units = by_part}, [&](auto& fabric) { count(fabric, 2); });
  on_ranks<F32, Zero<3>>({.units = by_part}, [&](auto& fabric) { count(fabric, 3); });
  on_ranks<F32, Zero<3>>({.units = by_part, .prefetch = false}, [&](auto& fabric) { count(fabric, 3); });
}

TEST_CASE("[issue-8.accept] the formulae from 2 to 4,096 ranks: twice the gradients, and three times in stage 3") {
  constexpr std::uint64_t bytes = 1U << 30U;
  for (std::uint64_t ranks = 2; ranks <= 4096; ranks *= 2) {
    REQUIRE(sharded_step(1, bytes, bytes, ranks).bytes == 2 * (bytes - bytes / ranks));
    REQUIRE(sharded_step(2, bytes, bytes, ranks).bytes == 2 * (bytes - bytes / ranks));
    REQUIRE(sharded_step(3, bytes, bytes, ranks).bytes == 3 * (bytes - bytes / ranks));
    REQUIRE(sharded_step(3, bytes, bytes, ranks).messages == 3 * (ranks - 1));
  }
}

TEST_CASE("[issue-8.2] what would be lost or wrong is refused, by name") {
  on_ranks<F32, Zero<3>>({.units = by_part}, [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.5));
    {
      const torch::NoGradGuard no_grad;
      REQUIRE_THROWS_WITH(net->part(1).down->bias.fill_(3),
                          ContainsSubstring("aten::fill_ would change the parameter parts.1.down.bias"));
    }
    {  // changed where that is allowed
      model.state()->with_full_parameters([&] {
        const torch::NoGradGuard no_grad;
        net->part(1).down->bias.fill_(3);
      });
      at::Tensor bias;
      model.state()->with_full_parameters([&] { bias = net->part(1).down->bias.detach().clone(); });
      REQUIRE(bias.equal(torch::full({8}, 3.0)));
    }
    {  // a part of the module alone
      fabric.backward(net->part(0).forward(batch(0)).sum());
      REQUIRE_THROWS_WITH(optimizer.step(), ContainsSubstring("took no part in the loss") &&
                                                ContainsSubstring("parts.4.up.weight") &&
                                                !ContainsSubstring("parts.0.up.weight"));
      optimizer.zero_grad();
    }
    {
      const auto guard = fabric.no_backward_sync(model);
      fabric.backward(model(batch(fabric.global_rank())).sum());
    }
    REQUIRE_THROWS_WITH(optimizer.step(), ContainsSubstring("not averaged"));
    optimizer.zero_grad();
    net->to(torch::kDouble);
    REQUIRE_THROWS_WITH(model(batch(0)), ContainsSubstring("parts.0.up.weight") && ContainsSubstring("before setup"));
  });
  const auto with = [](ShardingOptions options) {
    return [options] { Fabric<Cpu, DeepSpeed<3>, F32> fabric({.devices = 2, .strategy = options}); };
  };
  REQUIRE_THROWS_WITH(with({.sharding = Sharding::none, .units_in_flight = 0})(),
                      ContainsSubstring("DeepSpeed's stage") && ContainsSubstring("units_in_flight: 0"));
}

TEST_CASE(
    "[issue-8.2] with find_unused_parameters, parameters that no rank used keep their values and have no gradient") {
  const auto run = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.1));
    Net before = make_net();
    // Rank 0 uses parts 0 and 1, the others part 0; nobody uses the rest.
    auto x = model.state()->forward([&] {
      auto y = net->part(0).forward(batch(0));
      return fabric.is_global_zero() ? net->part(1).forward(y) : y;
    });
    fabric.backward(x.pow(2).sum());
    optimizer.step();
    model.state()->with_full_parameters([&] {
      for (std::size_t i = 0; i < 5; ++i) {
        const bool same = net->part(i).up->weight.detach().equal(before->part(i).up->weight.detach());
        REQUIRE(same == (i > 1));
      }
    });
  };
  on_ranks<F32, Zero<2>>({.units = by_part, .find_unused_parameters = true}, run);
}

TEST_CASE("[issue-8.2] find_unused_parameters: what a backward before this one has used counts, and is not lost") {
  const auto run = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const auto part = [&, &model = model](std::size_t i, int seed) {
        const at::Tensor x = batch(seed + fabric.global_rank());
        return model.state()->forward([&] { return net->part(i).forward(x).pow(2).mean(); });
      };
      {
        const auto guard = fabric.no_backward_sync(model);
        fabric.backward(part(0, 10 * step));
      }
      fabric.backward(part(1, 10 * step + 5));  // which nobody's first part has part in
      optimizer.step();
    }
    std::vector<at::Tensor> all;
    const auto keep = [&] {
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
  on_ranks<F32, DdpFindUnusedParameters>([&](auto& fabric) { expected = run(fabric); });
  const auto compare = [&](auto& fabric) {
    const auto ours = run(fabric);
    for (std::size_t i = 0; i < ours.size(); ++i) REQUIRE(at::allclose(ours[i], expected[i], 1e-5, 1e-6));
    REQUIRE_FALSE(ours[0].equal(make_net()->parameters()[0].detach()));
  };
  on_ranks<F32, Zero<2>>({.units = by_part, .find_unused_parameters = true}, compare);
  on_ranks<F32, Sharded>({.units = by_part, .find_unused_parameters = true}, compare);
}

TEST_CASE(
    "[issue-8.6] a module that was made without memory gets its values unit by unit, as if it had been made whole") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    torch::manual_seed(5);
    auto net = fabric.init_module([] { return Net(); }, InitOptions{.empty = true});
    REQUIRE(net->part(0).up->weight.is_meta());
    auto model = fabric.setup(net);
    Net expected = make_net();
    model.state()->with_full_parameters([&] {
      for (std::size_t i = 0; i < net->parameters().size(); ++i) {
        REQUIRE(net->parameters()[i].detach().equal(expected->parameters()[i].detach()));
      }
    });
    fabric.backward(model(batch(fabric.global_rank())).pow(2).mean());
  });
}

TEST_CASE("[issue-8.6] sharded_model is a scope in which modules are made without memory") {
  on_ranks<F32, Sharded>({.units = by_part}, [](auto& fabric) {
    Net net{nullptr};
    torch::manual_seed(5);
    {
      const auto scope = fabric.sharded_model();
      net = Net();
    }
    REQUIRE(net->part(0).up->weight.is_meta());
    REQUIRE_FALSE(torch::zeros({1}).is_meta());
    auto model = fabric.setup(net);
    Net expected = make_net();
    model.state()->with_full_parameters([&] {
      for (std::size_t i = 0; i < net->parameters().size(); ++i) {
        REQUIRE(net->parameters()[i].detach().equal(expected->parameters()[i].detach()));
      }
    });

    Net late{nullptr};
    {
      const auto scope = fabric.sharded_model();
      const auto buffer = torch::empty({4});
      auto* const memory = buffer.data_ptr<float>();
      late = Net();
      late->register_buffer("late", buffer);
      *memory = 1;  // after other operators, where it cannot be seen in time
    }
    REQUIRE_THROWS_WITH(fabric.setup(late), ContainsSubstring("by data_ptr"));
  });
  on_ranks<F32>([](auto& fabric) {  // which does not shard
    const auto scope = fabric.sharded_model();
    REQUIRE_FALSE(torch::nn::Linear(2, 2)->weight.is_meta());
  });
}

TEST_CASE("[issue-8.5] mixed precision: computed in bfloat16, stepped in 32 bits") {
  on_ranks<BF16Mixed, DeepSpeed<3>>({.units = by_part}, [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 1e-4));
    REQUIRE(net->part(0).up->weight.scalar_type() == torch::kBFloat16);
    for (const Shard& shard : model.state()->shards()) REQUIRE(shard.master.scalar_type() == torch::kFloat);
    // Steps too small for bfloat16 add up in the masters.
    const at::Tensor before = model.state()->shards()[0].master.detach().clone();
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const auto output = model(batch(fabric.global_rank()));
      REQUIRE(output.scalar_type() == torch::kFloat);
      fabric.backward(output.pow(2).mean());
      optimizer.step();
    }
    const at::Tensor moved = (model.state()->shards()[0].master.detach() - before).abs();
    if (moved.numel() > 0) {
      REQUIRE(moved.max().template item<float>() > 0);
      REQUIRE(moved.max().template item<float>() < 4e-4F);
    }
  });
}

TEST_CASE("[issue-8.5] under no_backward_sync gradients add up with the digits with which they are reduced") {
  on_ranks<BF16Mixed, DeepSpeed<2>>({.reduce_dtype = at::kFloat}, [](auto& fabric) {
    torch::nn::Linear net(1, 1);
    auto [model, optimizer] = fabric.setup(net, optim::SGD(net->parameters(), 0.1));
    const at::Tensor x = torch::ones({1, 1});
    constexpr int batches = 300;  // bfloat16 counts to 256
    for (int i = 0; i < batches; ++i) {
      const auto guard = fabric.no_backward_sync(model, i + 1 < batches);
      fabric.backward(model(x).sum());
    }
    for (const Shard& shard : model.state()->shards()) {
      if (shard.master.numel() > 0) REQUIRE(shard.master.grad().eq(batches).all().template item<bool>());
    }
    optimizer.zero_grad();
  });
}

TEST_CASE("[issue-8.5] 16-mixed: an overflow in one rank's part skips the step on all, and shrinks everyone's factor") {
  const auto run = [](auto& fabric) {
    Net net = make_net();
    auto [model, optimizer] = fabric.setup(net, optim::AdamW(net->parameters(), 0.01));
    const double factor = fabric.scaler().get_scale();
    const auto masters = [&, &model = model] {
      std::vector<at::Tensor> all;
      for (const Shard& shard : model.state()->shards()) all.push_back(shard.master.detach().clone());
      return all;
    };
    for (int step = 0; step < 3; ++step) {
      const auto before = masters();
      optimizer.zero_grad();
      const auto loss = model(batch(step + fabric.global_rank())).pow(2).mean() / 64;
      // A gradient that only one rank's part of the parameters has.
      fabric.backward(loss);
      if (step == 1 && fabric.global_rank() == 1) {
        for (const Shard& shard : model.state()->shards()) {
          if (shard.master.numel() > 0) shard.master.mutable_grad().fill_(std::numeric_limits<float>::infinity());
        }
      }
      const bool stepped = static_cast<bool>(optimizer.step());
      REQUIRE(stepped == (step != 1));
      const auto after = masters();
      for (std::size_t i = 0; i < after.size(); ++i) {
        if (after[i].numel() > 0) REQUIRE(after[i].equal(before[i]) == !stepped);
      }
    }
    REQUIRE(fabric.scaler().get_scale() == factor / 2);
  };
  on_ranks<F16Mixed, DeepSpeed<2>>({.units = by_part}, run);
  on_ranks<F16Mixed, DeepSpeed<3>>({.units = by_part}, run);
}

TEST_CASE("[issue-8.accept] and all of this on four ranks") { tests::again_on_ranks(4); }
TEST_CASE("[issue-8.accept] and on eight") { tests::again_on_ranks(8); }
