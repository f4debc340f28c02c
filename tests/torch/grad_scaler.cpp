// SPDX-License-Identifier: Apache-2.0
// labels: torch precision
//
// The gradient scaler: step for step what Python's does, and what it makes of loops that Python's gets wrong.
#include "fabric/precision/grad_scaler.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "support/catch.hpp"
#include "support/f16_mixed_on_cpu.hpp"
#include "support/gzip.hpp"

namespace {

using namespace fabric;
using Json = nlohmann::json;
using Mixed = Fabric<Cpu, SingleDevice, tests::F16MixedOnCpu>;

constexpr float infinity = std::numeric_limits<float>::infinity();

Json reference() {
  return Json::parse(tests::gunzip_lines(FABRIC_SOURCE_DIR "/tests/reference/grad_scaler.json.gz").at(0));
}

/// A tensor from numbers written as texts, "inf" and "nan" among them.
at::Tensor tensor(const Json& texts) {
  std::vector<float> numbers;
  for (const Json& text : texts) numbers.push_back(static_cast<float>(std::stod(text.get<std::string>())));
  return torch::tensor(numbers);
}
bool same(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 0, 0, true); }

at::Tensor parameter(std::vector<float> values) { return torch::tensor(values).requires_grad_(); }

GradScaler::Options options_of(const Json& settings) {
  return {.init_scale = settings["init_scale"],
          .growth_factor = settings["growth_factor"],
          .backoff_factor = settings["backoff_factor"],
          .growth_interval = settings["growth_interval"]};
}

/// A state as Python's, number for number.
void check_state(const Value& state, const Json& expected) {
  const Dict& entries = state.as<Dict>("the state");
  CHECK(entries.size() == expected.size());
  for (const auto& [key, value] : expected.items()) CHECK(entries.at(key).as_number(key) == value.get<double>());
}

/// An optimizer with one parameter of one element, whose gradient is whatever the loss is multiplied with.
struct One {
  at::Tensor weight = parameter({0});
  std::shared_ptr<torch::optim::SGD> sgd =
      std::make_shared<torch::optim::SGD>(std::vector{weight}, torch::optim::SGDOptions(1));

  [[nodiscard]] at::Tensor loss(float gradient) const { return (weight * gradient).sum(); }
  [[nodiscard]] float gradient() const { return weight.grad().item<float>(); }
  [[nodiscard]] float value() const { return weight.item<float>(); }
};

}  // namespace

TEST_CASE("[issue-5.2] the scaler is Python's, step by step, with infinities and NaNs on the way") {
  const Json data = reference();
  for (const Json& run : data["cases"]) {
    const Json& settings = run["settings"];
    INFO(settings.dump());
    const at::Tensor a = parameter({1, 1, 1});
    const at::Tensor b = parameter({1, 1});
    const auto first = std::make_shared<torch::optim::SGD>(std::vector{a}, torch::optim::SGDOptions(0.5).momentum(0.5));
    const auto second = std::make_shared<torch::optim::SGD>(std::vector{b}, torch::optim::SGDOptions(0.25));
    std::optional<GradScaler> scaler(options_of(settings));
    auto gradients_a = scaler->watch(first);
    auto gradients_b = scaler->watch(second);
    int skipped = 0;
    int step = 0;
    for (const Json& row : run["rows"]) {
      INFO("step " << step);
      if (step++ == data["reloaded"]) {
        const Value state = scaler->state_dict();
        scaler.emplace();
        gradients_a = scaler->watch(first);
        gradients_b = scaler->watch(second);
        scaler->load_state_dict(state);
      }
      first->zero_grad();
      second->zero_grad();
      const at::Tensor scaled = scaler->scale(a.dot(tensor(row["x"])) + b.dot(tensor(row["y"])));
      REQUIRE(scaler->get_scale() == row["scale"].get<double>());
      scaled.backward();
      if (row["clip"]) {
        scaler->unscale(*gradients_a);
        a.mutable_grad().mul_(0.5);
      }
      const Stepped stepped_a = scaler->step(*first, *gradients_a);
      const Stepped stepped_b = scaler->step(*second, *gradients_b);
      // Only "made or skipped" is asked of a step with zero gradients, which Python's row cannot tell.
      REQUIRE(static_cast<bool>(stepped_a) == (row["found_inf"][0] == 0));
      REQUIRE(static_cast<bool>(stepped_b) == (row["found_inf"][1] == 0));
      if (!row["stepped"][0]) CHECK_FALSE(stepped_a);
      skipped += !stepped_a + !stepped_b;
      REQUIRE(same(a, tensor(row["a"])));
      REQUIRE(same(b, tensor(row["b"])));
      REQUIRE(same(a.grad(), tensor(row["a_grad"])));
      check_state(scaler->state_dict(), row["state"]);
    }
    CHECK(skipped == 8);
  }
}

TEST_CASE("[issue-5.2] Fabric scales the loss, unscales once for clipping and step, skips, and says so") {
  Mixed fabric({.precision = {.init_scale = 8, .growth_interval = 2}});
  One one;
  auto optimizer = fabric.setup(one.sgd);
  const auto step = [&](float gradient) {
    optimizer.zero_grad();
    fabric.backward(one.loss(gradient));
    return static_cast<bool>(optimizer.step());
  };
  fabric.backward(one.loss(3));
  CHECK(one.gradient() == 24);
  CHECK(fabric.clip_gradients(optimizer, ClipNorm{.max_norm = 100}).item<float>() == 3);
  CHECK(fabric.clip_gradients(optimizer, ClipNorm{.max_norm = 100}).item<float>() == 3);
  CHECK(optimizer.step());
  CHECK(one.value() == -3);

  CHECK(step(1));
  CHECK(fabric.scaler().get_scale() == 16);
  CHECK_FALSE(step(infinity));
  CHECK(one.value() == -4);
  CHECK(fabric.scaler().get_scale() == 8);
  CHECK(step(1));
  CHECK(one.value() == -5);
}

TEST_CASE("[issue-5.2] clipping a module unscales the gradients of all its optimizers") {
  Mixed fabric({.precision = {.init_scale = 8}});
  torch::nn::Linear linear(torch::nn::LinearOptions(1, 1));
  auto model = fabric.setup(linear);
  auto weight = fabric.setup(torch::optim::SGD(std::vector{linear->weight}, 1.0));
  auto bias = fabric.setup(torch::optim::SGD(std::vector{linear->bias}, 1.0));
  const auto before = linear->bias.item<float>();
  fabric.backward(model(torch::full({1, 1}, 0.75)).sum());
  CHECK(fabric.clip_gradients(model, ClipNorm{.max_norm = 0.125}).item<float>() == 1.25F);
  CHECK(weight.step());
  CHECK(bias.step());
  CHECK(linear->bias.item<float>() == Approx(before - 0.1));
  fabric.backward(model(torch::full({1, 1}, 0.75)).sum());
  fabric.clip_gradients(model, ClipValue{.max_value = 0.5});
  CHECK(linear->weight.grad().item<float>() == 0.5F);
}

TEST_CASE("[issue-5.2] gradients that overflowed are no error of clipping, since their step is skipped") {
  Mixed fabric;
  One one;
  auto optimizer = fabric.setup(one.sgd);
  fabric.backward(one.loss(infinity));
  CHECK(std::isinf(fabric.clip_gradients(optimizer, ClipNorm{.max_norm = 1}).item<float>()));
  CHECK_FALSE(optimizer.step());
  CHECK(one.value() == 0);
}

TEST_CASE("[issue-5.2] one update for all optimizers of an iteration, each of which skips for itself") {
  Mixed fabric({.precision = {.init_scale = 8, .growth_interval = 2}});
  One a;
  One b;
  auto first = fabric.setup(a.sgd);
  auto second = fabric.setup(b.sgd);
  const auto iteration = [&](float gradient_a, float gradient_b) {
    first.zero_grad();
    second.zero_grad();
    fabric.backward(a.loss(gradient_a) + b.loss(gradient_b));
    return std::pair{static_cast<bool>(first.step()), static_cast<bool>(second.step())};
  };
  CHECK(iteration(1, 1) == std::pair{true, true});
  CHECK(fabric.scaler().get_growth_tracker() == 1);
  CHECK(iteration(1, infinity) == std::pair{true, false});
  CHECK(fabric.scaler().get_scale() == 4);  // once, though a's step was good
  CHECK(iteration(infinity, infinity) == std::pair{false, false});
  CHECK(fabric.scaler().get_scale() == 2);
  CHECK(a.value() == -2);
  CHECK(b.value() == -1);
}

TEST_CASE("[issue-5.2] two losses, each with its own step, as in adversarial training") {
  Mixed fabric({.precision = {.init_scale = 8, .growth_interval = 1}});
  One discriminator;
  One generator;
  auto first = fabric.setup(discriminator.sgd);
  auto second = fabric.setup(generator.sgd);
  for (int i = 0; i < 3; ++i) {
    first.zero_grad();
    fabric.backward(discriminator.loss(1) + generator.loss(100));  // the generator's part is not wanted
    CHECK(first.step());
    second.zero_grad();
    fabric.backward(generator.loss(1));
    CHECK(second.step());
  }
  CHECK(discriminator.value() == -3);
  CHECK(generator.value() == -3);
}

TEST_CASE("[issue-5.2] an optimizer may gather gradients over several updates of the factor") {
  Mixed fabric({.precision = {.init_scale = 8, .growth_interval = 1}});
  One often;
  One rarely;
  auto first = fabric.setup(often.sgd);
  auto second = fabric.setup(rarely.sgd);
  for (int i = 0; i < 4; ++i) {
    first.zero_grad();
    fabric.backward(often.loss(i == 2 ? infinity : 1) + rarely.loss(1));
    CHECK(static_cast<bool>(first.step()) == (i != 2));
  }
  CHECK(fabric.scaler().get_scale() == 32);  // 8, 16, 32, back to 16, 32
  CHECK(second.step());
  CHECK(rarely.value() == -4);
}

TEST_CASE("[issue-5.2] gradients that wait elsewhere follow the factor, unscaled as those of their optimizer may be") {
  GradScaler scaler({.init_scale = 8, .growth_factor = 2, .growth_interval = 1});
  One stepping;
  One gathering;
  const at::Tensor elsewhere = torch::tensor({24.0F});
  const auto gradients = scaler.watch(stepping.sgd);
  const auto gathered = scaler.watch(gathering.sgd, [&] { return std::vector{elsewhere}; });
  scaler.scale(stepping.loss(1)).backward();
  scaler.scale(gathering.loss(3)).backward();
  REQUIRE(scaler.step(*stepping.sgd, *gradients));
  scaler.unscale(*gathered);
  scaler.update();
  REQUIRE(scaler.get_scale() == 16);
  REQUIRE(gathering.gradient() == 3);
  REQUIRE(elsewhere.item<float>() == 48);
}

TEST_CASE("[issue-5.2] a backward after clipping, or after a step, adds gradients of the same scale") {
  Mixed fabric;
  One one;
  auto optimizer = fabric.setup(one.sgd);
  fabric.backward(one.loss(2));
  CHECK(fabric.clip_gradients(optimizer, ClipNorm{.max_norm = 1}).item<float>() == 2);
  fabric.backward(one.loss(1));
  CHECK(optimizer.step());
  CHECK(one.gradient() == Approx(2).epsilon(1e-6));
  CHECK(one.value() == Approx(-2).epsilon(1e-6));
  fabric.backward(one.loss(1));  // nothing was cleared
  CHECK(optimizer.step());
  CHECK(one.gradient() == Approx(3).epsilon(1e-6));
}

TEST_CASE("[issue-5.2] a loss that was not scaled, and gradients in half floats, are refused") {
  Mixed fabric;
  One one;
  auto optimizer = fabric.setup(one.sgd);
  one.loss(1).backward();
  CHECK_THROWS_WITH(optimizer.step(), ContainsSubstring("call fabric.backward(loss), not loss.backward()"));
  CHECK(one.value() == 0);
  optimizer.zero_grad();
  fabric.backward(one.loss(1));
  CHECK(optimizer.step());
  const auto stepped = one.value();
  optimizer.zero_grad();
  CHECK(optimizer.step());  // there is nothing to use
  one.loss(1).backward();
  CHECK_THROWS_WITH(optimizer.step(), ContainsSubstring("call fabric.backward(loss), not loss.backward()"));
  CHECK(one.value() == stepped);

  const at::Tensor half = torch::ones({1}, torch::kHalf).requires_grad_();
  auto of_half = fabric.setup(torch::optim::SGD(std::vector{parameter({1}), half}, 1.0));
  fabric.backward(half.to(at::kFloat).sum());
  CHECK_THROWS_WITH(of_half.step(), ContainsSubstring("(parameters 1 of the optimizer)"));
}

TEST_CASE("[issue-5.2] sparse gradients and ones in several dtypes are unscaled too") {
  Mixed fabric;
  torch::nn::Embedding embedding(torch::nn::EmbeddingOptions(4, 2).sparse(true));
  const at::Tensor wide = torch::zeros({1}, torch::kDouble).requires_grad_();
  auto optimizer = fabric.setup(torch::optim::SGD(std::vector{embedding->weight, wide}, 1.0));
  const auto before = embedding->weight.detach().clone();
  fabric.backward(embedding(torch::tensor({1, 1})).sum() + wide.sum());
  CHECK(optimizer.step());
  const auto change = torch::tensor({{0.F, 0.F}, {2.F, 2.F}, {0.F, 0.F}, {0.F, 0.F}});
  CHECK(at::allclose(before - embedding->weight.detach(), change));
  CHECK(wide.item<double>() == -1);
}

namespace {

/// An optimizer that skips by itself, as the fused ones do.
struct SkipsItself : One {
  struct Optimizer : torch::optim::SGD {
    using SGD::SGD;
    using SGD::step;
    void step(const StepScale& scale) { seen = scale; }
    StepScale seen;
  };
  std::shared_ptr<Optimizer> fused = std::make_shared<Optimizer>(std::vector{weight}, torch::optim::SGDOptions(1));
};
static_assert(TakesStepScale<SkipsItself::Optimizer> && !TakesStepScale<torch::optim::SGD> &&
              !TakesStepScale<torch::optim::Optimizer>);

}  // namespace

TEST_CASE("[issue-5.2] an optimizer that can skip by itself is told whether to, and nobody waits for the answer") {
  Mixed fabric;
  SkipsItself one;
  auto optimizer = fabric.setup(one.fused);
  for (const float gradient : {1.F, infinity}) {
    optimizer.zero_grad();
    fabric.backward(one.loss(gradient));
    const Stepped stepped = optimizer.step();
    CHECK_FALSE(one.fused->seen.grad_scale.defined());
    CHECK(one.fused->seen.found_inf.scalar_type() == at::kFloat);
    CHECK(one.fused->seen.found_inf.item<float>() == (std::isinf(gradient) ? 1 : 0));
    CHECK(one.gradient() == gradient);
    optimizer.zero_grad();
    fabric.backward(one.loss(1));  // the answer does not change with what comes next
    CHECK(static_cast<bool>(stepped) == !std::isinf(gradient));
  }
}

namespace {

/// Compiled, for machines without a GPU: the same loop in the type that is meant for them.
[[maybe_unused]] bool step_on_a_gpu(Fabric<Cuda, SingleDevice, F16Mixed>& fabric, torch::nn::Linear& linear,
                                    const at::Tensor& x) {
  auto [model, optimizer] = fabric.setup(linear, torch::optim::SGD(linear->parameters(), 0.1));
  fabric.backward(model(x).sum());
  fabric.clip_gradients(model, ClipNorm{.max_norm = 1});
  fabric.clip_gradients(optimizer, ClipValue{.max_value = 1});
  return static_cast<bool>(optimizer.step()) && fabric.scaler().get_scale() > 0;
}

}  // namespace

TEST_CASE("[issue-5.2] without a scaler a step is always made") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  One one;
  auto optimizer = fabric.setup(one.sgd);
  fabric.backward(one.loss(1));
  static_assert(std::is_same_v<decltype(optimizer.step()), bool>);
  static_assert(sizeof(decltype(optimizer)) == sizeof(std::shared_ptr<int>) + sizeof(std::vector<int>));
  CHECK(optimizer.step());
}

TEST_CASE("[issue-5.2] a state is taken whole or not at all, from Python too") {
  GradScaler scaler({.init_scale = 8});
  const Value before = scaler.state_dict();
  const auto changed = [&](const char* key, Value value) {
    Dict state = before.as<Dict>("the state");
    state[key] = std::move(value);
    return state;
  };
  scaler.load_state_dict(changed("scale", 1024));  // an integer, as JSON may have it
  CHECK(scaler.get_scale() == 1024);
  CHECK_THROWS_WITH(scaler.load_state_dict(changed("growth_factor", 0.5)), ContainsSubstring("growth_factor"));
  CHECK_THROWS_WITH(scaler.load_state_dict(changed("_growth_tracker", -1)), ContainsSubstring("_growth_tracker"));
  CHECK_THROWS_WITH(scaler.load_state_dict(changed("scale", "8")), ContainsSubstring("GradScaler's scale is a text"));
  CHECK_THROWS_WITH(scaler.load_state_dict(Dict{{"scale", 4.0}}), ContainsSubstring("growth_factor"));
  CHECK_THROWS_WITH(scaler.load_state_dict(1.5), ContainsSubstring("the state of GradScaler is a float"));
  CHECK(scaler.get_scale() == 1024);
  CHECK(scaler.options().growth_factor == 2);
}

TEST_CASE("[issue-5.2] all options that make no sense are named together") {
  CHECK_THROWS_WITH(
      Mixed({.precision = {.init_scale = 0, .growth_factor = 1, .backoff_factor = 2, .growth_interval = 0}}),
      ContainsSubstring("init_scale") && ContainsSubstring("growth_factor") && ContainsSubstring("backoff_factor") &&
          ContainsSubstring("growth_interval"));
}

TEST_CASE("[issue-5.2] a scaler outlives its optimizers, and they it") {
  One one;
  const auto optimizer_alone = [&] {
    Mixed fabric;
    auto optimizer = fabric.setup(one.sgd);
    fabric.backward(one.loss(1));
    return optimizer;
  }();
  auto optimizer = optimizer_alone;
  CHECK(optimizer.step());
  CHECK(one.value() == -1);

  Mixed fabric({.precision = {.growth_interval = 1}});
  {
    One gone;
    auto stepped = fabric.setup(gone.sgd);
    fabric.backward(gone.loss(1));
    stepped.step();
  }
  fabric.backward(one.loss(1));
  CHECK(fabric.scaler().get_scale() == 2 * 65536);
}

TEST_CASE(
    "[issue-8.5] with hysteresis, the factor shrinks at the second skipped step since it grew, to min_scale at most") {
  // What DeepSpeed's DynamicLossScaler does with scale_window 2, delayed_shift 2 and min_scale 4, from 16 on.
  GradScaler scaler({.init_scale = 16, .growth_interval = 2, .hysteresis = 2, .min_scale = 4});
  One one;
  const auto optimizer = std::make_shared<torch::optim::SGD>(std::vector{one.weight}, 0.1);
  const auto gradients = scaler.watch(optimizer);
  const auto after = [&](bool overflows) {
    optimizer->zero_grad();
    const at::Tensor loss = scaler.scale((one.weight * (overflows ? infinity : 1.0F)).sum());
    loss.backward();
    REQUIRE(static_cast<bool>(scaler.step(*optimizer, *gradients)) == !overflows);
    scaler.update();
    return scaler.get_scale();
  };
  CHECK(after(true) == 16);  // the first is forgiven
  CHECK(scaler.state_dict().as<Dict>("").at("cur_hysteresis").as<std::int64_t>("") == 1);
  CHECK(after(true) == 8);
  CHECK(after(true) == 4);  // and forgiveness is used up
  CHECK(after(true) == 4);
  CHECK(after(false) == 4);
  CHECK(after(false) == 8);  // grown: forgiveness is back
  CHECK(after(true) == 8);
  CHECK(after(true) == 4);
  GradScaler resumed({.init_scale = 16, .growth_interval = 2, .hysteresis = 2, .min_scale = 4});
  resumed.load_state_dict(scaler.state_dict());
  CHECK(resumed.state_dict().as<Dict>("").at("cur_hysteresis").as<std::int64_t>("") == 1);
  CHECK_THROWS_WITH(GradScaler({.init_scale = 2, .hysteresis = 0, .min_scale = 4}),
                    ContainsSubstring("hysteresis is 0") && ContainsSubstring("min_scale is 4"));
}
