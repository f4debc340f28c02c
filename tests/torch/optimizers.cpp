// SPDX-License-Identifier: Apache-2.0
//
// fabric::optim as optimizers of LibTorch: groups, schedulers, closures, setup, state.
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
using torch::optim::OptimizerParamGroup;

static_assert(TakesStepScale<optim::AdamW> && TakesStepScale<optim::Adam> && TakesStepScale<optim::SGD> &&
              TakesStepScale<optim::Adagrad> && !TakesStepScale<torch::optim::AdamW>);

torch::nn::Sequential make_net() {
  torch::manual_seed(1);
  return torch::nn::Sequential(torch::nn::Linear(6, 5), torch::nn::ReLU(), torch::nn::Linear(5, 2));
}

/// Some steps of a regression; returns the parameters, flat. `after_step` runs after each step.
template <class O, class AfterStep>
at::Tensor train(torch::nn::Sequential& net, O& optimizer, int steps, AfterStep after_step) {
  torch::manual_seed(2);
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    const at::Tensor x = torch::randn({8, 6});
    torch::mse_loss(net->forward(x), x.slice(1, 0, 2)).backward();
    optimizer.step();
    after_step();
  }
  return torch::nn::utils::parameters_to_vector(net->parameters()).detach();
}
template <class O>
at::Tensor train(torch::nn::Sequential& net, O& optimizer, int steps) {
  return train(net, optimizer, steps, [] {});
}

at::Tensor parameter_with_gradient(double value = 1, double gradient = 1) {
  at::Tensor parameter = at::full({3}, value).requires_grad_();
  parameter.mutable_grad() = at::full({3}, gradient);
  return parameter;
}

std::string message_of_load(torch::optim::Optimizer& optimizer, const Value& value) {
  try {
    static_cast<optim::AdamW&>(optimizer).load_state_dict(value);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("[issue-5.3] each optimizer trains as LibTorch's own of the same name, with the same options") {
  const auto compare = [](auto&& ours, auto&& theirs) {
    auto a = make_net();
    auto b = make_net();
    auto our_optimizer = ours(a->parameters());
    auto their_optimizer = theirs(b->parameters());
    const at::Tensor moved = train(a, our_optimizer, 20);
    CHECK(moved.allclose(train(b, their_optimizer, 20), 1e-4, 1e-6));
    CHECK_FALSE(moved.allclose(torch::nn::utils::parameters_to_vector(make_net()->parameters()), 1e-2, 1e-3));
  };
  const auto adamw = optim::AdamWOptions(0.01).weight_decay(0.1).amsgrad(true);
  compare([&](auto parameters) { return optim::AdamW(parameters, adamw); },
          [&](auto parameters) { return torch::optim::AdamW(parameters, adamw); });
  const auto adam = optim::AdamOptions(0.01).weight_decay(0.1).betas({0.8, 0.9});
  compare([&](auto parameters) { return optim::Adam(parameters, adam); },
          [&](auto parameters) { return torch::optim::Adam(parameters, adam); });
  const auto sgd = optim::SGDOptions(0.05).momentum(0.9).nesterov(true).weight_decay(0.01);
  compare([&](auto parameters) { return optim::SGD(parameters, sgd); },
          [&](auto parameters) { return torch::optim::SGD(parameters, sgd); });
  const auto adagrad = optim::AdagradOptions(0.05).lr_decay(0.01).initial_accumulator_value(0.1);
  compare([&](auto parameters) { return optim::Adagrad(parameters, adagrad); },
          [&](auto parameters) { return torch::optim::Adagrad(parameters, adagrad); });
}

TEST_CASE("[issue-5.3] LibTorch's schedulers set the learning rate") {
  auto a = make_net();
  auto b = make_net();
  optim::AdamW ours(a->parameters(), optim::AdamWOptions(0.02));
  torch::optim::AdamW theirs(b->parameters(), torch::optim::AdamWOptions(0.02));
  torch::optim::StepLR our_schedule(ours, 3, 0.1);
  torch::optim::StepLR their_schedule(theirs, 3, 0.1);
  const at::Tensor moved = train(a, ours, 10, [&] { our_schedule.step(); });
  CHECK(moved.allclose(train(b, theirs, 10, [&] { their_schedule.step(); }), 1e-4, 1e-6));
  CHECK(ours.param_groups()[0].options().get_lr() == Approx(0.02e-3));
}

TEST_CASE("[issue-5.3] a closure is run with gradients enabled and its loss returned") {
  const at::Tensor parameter = torch::ones({2}, torch::requires_grad());
  optim::SGD optimizer({parameter}, optim::SGDOptions(0.5));
  const at::NoGradGuard no_grad;
  const at::Tensor loss = optimizer.step([&] {
    optimizer.zero_grad();
    at::Tensor result = (parameter * parameter).sum();
    result.backward();
    return result;
  });
  CHECK(loss.item<double>() == 2);
  CHECK(parameter.eq(0).all().item<bool>());
}

TEST_CASE("[issue-5.3] zero_grad drops the gradients and their memory") {
  const at::Tensor parameter = parameter_with_gradient();
  optim::AdamW optimizer({parameter});
  optimizer.step();
  CHECK(parameter.grad().use_count() == 1);  // nothing inside the optimizer holds it
  optimizer.zero_grad();
  CHECK_FALSE(parameter.grad().defined());
}

TEST_CASE("[issue-5.3] a group has options of its own and may come later") {
  const at::Tensor first = parameter_with_gradient();
  const at::Tensor second = parameter_with_gradient();
  const at::Tensor third = parameter_with_gradient();
  optim::SGD optimizer({first}, optim::SGDOptions(0.25));
  optimizer.step();
  optimizer.add_param_group({{second}, std::make_unique<optim::SGDOptions>(0.5)});
  optimizer.add_param_group({{third}, std::make_unique<optim::Maximize<optim::SGDOptions>>(optim::SGDOptions(0.5))});
  optimizer.step();
  CHECK(first.eq(0.5).all().item<bool>());
  CHECK(second.eq(0.5).all().item<bool>());
  CHECK(third.eq(1.5).all().item<bool>());  // climbs
}

TEST_CASE("[issue-5.3] maximize of the defaults holds for groups that do not say") {
  const at::Tensor first = parameter_with_gradient();
  const at::Tensor second = parameter_with_gradient();
  optim::SGD optimizer(std::vector<OptimizerParamGroup>{{{first}}}, optim::Maximize(optim::SGDOptions(0.5)));
  optimizer.add_param_group({{second}, std::make_unique<optim::SGDOptions>(0.25)});
  optimizer.step();
  CHECK(first.eq(1.5).all().item<bool>());
  CHECK(second.eq(1.25).all().item<bool>());
}

TEST_CASE("[issue-5.3] options out of range are refused, all at once") {
  const std::vector<at::Tensor> parameters{parameter_with_gradient()};
  CHECK_THROWS_WITH(optim::AdamW(parameters, optim::AdamWOptions(-1).betas({0.9, 1.0}).eps(-2).weight_decay(-3)),
                    ContainsSubstring("AdamW") && ContainsSubstring("lr is -1") && ContainsSubstring("betas is 1.0") &&
                        ContainsSubstring("eps is -2") && ContainsSubstring("weight_decay is -3"));
  CHECK_THROWS_WITH(optim::SGD(parameters, optim::SGDOptions(1).nesterov(true)), ContainsSubstring("nesterov needs"));
  optim::SGD optimizer(parameters, optim::SGDOptions(1));
  CHECK_THROWS_WITH(optimizer.add_param_group({{at::zeros({1})}, std::make_unique<optim::SGDOptions>(-1)}),
                    ContainsSubstring("the group's options"));
  CHECK_THROWS_WITH(optimizer.add_param_group({{at::zeros({1})}, std::make_unique<optim::AdamWOptions>(1)}),
                    ContainsSubstring("options of another optimizer: use SGDOptions"));
  CHECK(optimizer.param_groups().size() == 1);
}

TEST_CASE("[issue-5.3] parameters that a fused kernel would spoil are refused by name") {
  const at::Tensor fine = parameter_with_gradient();
  const auto refused = [&](const at::Tensor& parameter) {
    CHECK_THROWS_WITH(optim::AdamW({fine, parameter}), ContainsSubstring("parameter 1"));
  };
  refused(fine);                                               // twice
  refused(at::zeros({3}, at::kLong));                          // whole numbers
  refused(at::zeros({3}, at::kComplexFloat));                  // complex
  refused(at::zeros({4, 4}).slice(1, 0, 2));                   // gaps in memory
  refused(at::zeros({2, 2}).to_sparse());                      // sparse
  refused(at::zeros({1}).expand({3}));                         // several elements in one place
  CHECK_NOTHROW(optim::AdamW({fine, at::zeros({4, 4}).t()}));  // dense all the same
}

TEST_CASE("[issue-5.3] a gradient that is laid out otherwise than its parameter is used in the right order") {
  const at::Tensor parameter = at::zeros({2, 3}).requires_grad_();
  const at::Tensor gradient = at::arange(6, at::kFloat).view({3, 2}).t();
  parameter.mutable_grad() = gradient;
  optim::SGD optimizer({parameter}, optim::SGDOptions(1));
  optimizer.step();
  CHECK(parameter.eq(-gradient).all().item<bool>());
}

TEST_CASE("[issue-5.3] gradients that cannot be used are refused before any parameter has changed") {
  const at::Tensor fine = parameter_with_gradient();
  const at::Tensor bad = at::zeros({3}).requires_grad_();
  optim::SGD optimizer(std::vector<OptimizerParamGroup>{{{fine}}, {{bad}}}, optim::SGDOptions(1));
  for (const at::Tensor& gradient : {at::ones({3}).to_sparse(), at::ones({3}, at::kDouble), at::ones({1})}) {
    bad.mutable_grad() = gradient;
    CHECK_THROWS_WITH(optimizer.step(), ContainsSubstring("dense gradients of the parameter's dtype"));
    CHECK(fine.eq(1).all().item<bool>());
  }
}

TEST_CASE("[issue-5.3] the state follows a module to another dtype, before the first step and later") {
  for (const int steps_before : {0, 2}) {
    auto net = make_net();
    optim::Adagrad optimizer(net->parameters());
    train(net, optimizer, steps_before);
    optimizer.zero_grad();
    net->to(at::kDouble);
    for (const at::Tensor& parameter : net->parameters()) parameter.mutable_grad() = at::ones_like(parameter);
    optimizer.step();
    const Value state = optimizer.state_dict();
    const Dict& first = state.as<Dict>("").at("state").as<Dict>("").at(std::int64_t{0}).as<Dict>("");
    CHECK(first.at("sum").as<at::Tensor>("").scalar_type() == at::kDouble);
    CHECK(first.at("step").as<at::Tensor>("").item<double>() == steps_before + 1);
  }
}

TEST_CASE("[issue-5.3] without its state an optimizer starts again") {
  const at::Tensor parameter = parameter_with_gradient();
  optim::AdamW optimizer({parameter}, optim::AdamWOptions(0.1).weight_decay(0));
  optimizer.step();
  optimizer.state().clear();
  parameter.mutable_grad().neg_();
  optimizer.step();  // Adam's first step is lr in the direction of the gradient
  CHECK(parameter.allclose(at::ones({3})));
}

TEST_CASE("[issue-5.3] a skipped first step leaves no momentum") {
  const at::Tensor parameter = parameter_with_gradient(1, 2);
  optim::SGD optimizer({parameter}, optim::SGDOptions(0.5).momentum(0.9).dampening(0.5));
  const at::Tensor scale = at::full({}, 2.0F);
  optimizer.step({.grad_scale = scale, .found_inf = at::ones({})});
  CHECK(parameter.eq(1).all().item<bool>());
  CHECK(optimizer.state().empty());
  optimizer.step({.grad_scale = scale, .found_inf = at::zeros({})});
  CHECK(parameter.eq(0.5).all().item<bool>());  // undampened, as any first step
  CHECK(parameter.grad().eq(1).all().item<bool>());
}

TEST_CASE("[issue-5.3] saved and loaded, training goes on bit by bit as if nothing had been") {
  auto net = make_net();
  optim::AdamW optimizer(net->parameters(), optim::Maximize(optim::AdamWOptions(0.03).amsgrad(true), false));
  train(net, optimizer, 5);
  optimizer.param_groups()[0].options().set_lr(0.01);
  auto copy = make_net();
  optim::AdamW other(copy->parameters());
  {
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < net->parameters().size(); ++i) copy->parameters()[i].copy_(net->parameters()[i]);
  }
  other.load_state_dict(optimizer.state_dict());
  CHECK(train(net, optimizer, 5).equal(train(copy, other, 5)));  // and the two share no tensor
}

TEST_CASE("[issue-5.3] entries that only Python knows survive") {
  const at::Tensor parameter = parameter_with_gradient();
  optim::AdamW optimizer({parameter});
  optimizer.step();
  Value state = optimizer.state_dict();
  Dict& group =
      std::get<Dict>(std::get<List>(std::get<Dict>(state.data()).find("param_groups")->data()).items[0].data());
  group["initial_lr"] = 0.5;
  group["foreach"] = true;
  group["fused"] = Value();
  optimizer.load_state_dict(state);
  const Value again = optimizer.state_dict();
  const Dict& loaded = again.as<Dict>("").at("param_groups").as<List>("").items[0].as<Dict>("");
  CHECK(loaded.at("initial_lr").as<double>("") == 0.5);
  CHECK(loaded.at("foreach").is_none());  // how Python would compute is not ours
  CHECK(loaded.at("fused").as<bool>(""));
}

TEST_CASE("[issue-5.3] a state that does not fit is refused with everything that is wrong, and changes nothing") {
  const at::Tensor parameter = parameter_with_gradient();
  optim::AdamW optimizer({parameter}, optim::AdamWOptions(0.1));
  optimizer.step();
  const at::Tensor before = parameter.detach().clone();
  const auto entry = [](const at::Tensor& average) {
    return Dict{{"step", at::ones({})}, {"exp_avg", average}, {"exp_avg_sq", at::zeros({3})}};
  };
  const auto group = [](double lr) {
    return Dict{{"lr", lr},
                {"betas", List{{0.9, 0.999}, true}},
                {"eps", 1e-8},
                {"params", List{{std::int64_t{0}}}},
                {"weight_decay", 0.0}};
  };
  const auto state = [&](Dict states, Dict own_group) {
    return Dict{{"state", std::move(states)}, {"param_groups", List{{std::move(own_group)}}}};
  };
  const std::int64_t zero = 0;
  CHECK(message_of_load(optimizer, 1).find("the state is an integer, not a dict") != std::string::npos);
  CHECK(message_of_load(optimizer, Dict{}).find("'param_groups' is missing\n  'state' is missing") !=
        std::string::npos);
  const std::string all = message_of_load(
      optimizer, state({{zero, entry(at::zeros({2}))}, {std::int64_t{7}, Dict{}}, {"x", Dict{}}}, group(-1)));
  CHECK_THAT(all, ContainsSubstring("'exp_avg' of parameter 0 has the shape [2], the parameter [3]") &&
                      ContainsSubstring("lr is -1") && ContainsSubstring("the state of '7'") &&
                      ContainsSubstring("the state of 'x'") && ContainsSubstring("AdamW"));
  Dict amsgrad = group(0.1);
  amsgrad["amsgrad"] = true;
  CHECK_THAT(message_of_load(optimizer, state({{zero, entry(at::zeros({3}))}}, amsgrad)),
             ContainsSubstring("parameter 0 has no 'max_exp_avg_sq'"));
  Dict several = group(0.1);
  several["params"] = List{{std::int64_t{0}, std::int64_t{1}}};
  several["eps"] = "small";
  CHECK_THAT(message_of_load(optimizer, state({}, several)),
             ContainsSubstring("2 parameters, where this optimizer has 1") && ContainsSubstring("'eps' is a text"));
  Dict groups{{"state", Dict{}}, {"param_groups", List{{group(1), group(1)}}}};
  CHECK_THAT(message_of_load(optimizer, groups), ContainsSubstring("2 parameter groups, where this optimizer has 1"));

  CHECK(optimizer.param_groups()[0].options().get_lr() == 0.1);
  optim::AdamW same({parameter}, optim::AdamWOptions(0.1));
  CHECK(message_of_load(optimizer, state({{zero, entry(at::zeros({3}))}}, group(0.2))).empty());
  CHECK(optimizer.param_groups()[0].options().get_lr() == 0.2);
  CHECK(parameter.equal(before));
}

TEST_CASE("[issue-5.3] AdamW's state is no Adam's") {
  const at::Tensor parameter = parameter_with_gradient();
  optim::Adam adam({parameter});
  CHECK_THROWS_WITH(adam.load_state_dict(optim::AdamW({parameter}).state_dict()),
                    ContainsSubstring("this is the state of an AdamW"));
}

TEST_CASE("[issue-5.3] LibTorch's archives are refused with a word about what to use") {
  optim::AdamW optimizer({parameter_with_gradient()});
  torch::serialize::OutputArchive archive;
  CHECK_THROWS_WITH(archive << optimizer, ContainsSubstring("state_dict()"));
}

TEST_CASE("[issue-5.3] setup takes them by value, by reference and by pointer") {
  Fabric<Cpu, SingleDevice, F32> fabric;
  const auto trains = [&](auto&& make_optimizer) {
    auto net = make_net();
    const at::Tensor before = torch::nn::utils::parameters_to_vector(net->parameters()).detach().clone();
    auto&& optimizer_argument = make_optimizer(net->parameters());
    auto [model, optimizer] = fabric.setup(net, std::forward<decltype(optimizer_argument)>(optimizer_argument));
    for (int i = 0; i < 3; ++i) {
      optimizer.zero_grad();
      fabric.backward(model(torch::ones({4, 6})).pow(2).sum());
      fabric.clip_gradients(optimizer, ClipNorm{1.0});
      optimizer.step();
    }
    CHECK_FALSE(before.equal(torch::nn::utils::parameters_to_vector(net->parameters())));
  };
  trains([](auto parameters) { return optim::AdamW(parameters); });
  trains([](auto parameters) { return std::make_shared<optim::Adam>(parameters); });
  trains([](auto parameters) { return std::make_unique<optim::SGD>(parameters); });
  std::unique_ptr<optim::Adagrad> owner;
  trains([&](auto parameters) -> optim::Adagrad& { return *(owner = std::make_unique<optim::Adagrad>(parameters)); });
}
