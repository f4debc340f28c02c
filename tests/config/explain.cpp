// SPDX-License-Identifier: Apache-2.0
#include "fabric/connector/explain.hpp"

#include <algorithm>
#include <string>

#include "support/catch.hpp"

using namespace fabric;

namespace {

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

const Explanation& about(const Explained& explained, const std::string& what) {
  return *std::find_if(explained.choices.begin(), explained.choices.end(),
                       [&](const Explanation& choice) { return choice.what == what; });
}

}  // namespace

TEST_CASE("each policy is explained: by which flag, variable or default", "[issue-4.7]") {
  const Explained explained =
      explain({.accelerator = "cpu", .devices = 2}, {{"LT_PRECISION", "bf16-mixed"}}, Host{.cuda_devices = 2});
  REQUIRE(explained.ok);
  CHECK(about(explained, "accelerator").chosen == "Cpu");
  CHECK(about(explained, "accelerator").because == "--accelerator cpu");
  CHECK(about(explained, "strategy").chosen == "Ddp");
  CHECK(about(explained, "strategy").because == "chosen automatically");
  CHECK(contains(about(explained, "precision").because, "LT_PRECISION"));
  CHECK(about(explained, "environment").chosen == "Local");
  CHECK(contains(about(explained, "launcher").chosen, "starts the program again"));
}

TEST_CASE("rules and fallbacks that acted are named, and what else was possible", "[issue-4.7]") {
  const Explained explained = explain({.accelerator = "cpu", .strategy = "dp", .precision = "16-mixed"}, {}, Host{});
  CHECK(contains(about(explained, "strategy").rules.at(0), "ddp instead"));
  CHECK(contains(about(explained, "precision").rules.at(0), "bf16-mixed instead"));
  const auto& strategies = about(explained, "strategy").available;
  CHECK(std::count(strategies.begin(), strategies.end(), "deepspeed") == 1);
  CHECK(std::count(strategies.begin(), strategies.end(), "fsdp") == 0);
  const auto& precisions = about(explained, "precision").available;
  CHECK(std::count(precisions.begin(), precisions.end(), "64-true") == 1);
  CHECK(std::count(precisions.begin(), precisions.end(), "16-mixed") == 0);
}

TEST_CASE("an explanation as text and as JSON", "[issue-4.7]") {
  const Explained good = explain({.devices = 2}, {}, Host{});
  CHECK(contains(to_text(good), "strategy    Ddp"));
  CHECK(contains(to_text(good), "also possible:"));
  CHECK(contains(to_json(good), R"({"what": "strategy", "chosen": "Ddp", "because": "chosen automatically")"));
  const Explained bad = explain({.strategy = "d\"dp\n"}, {}, Host{});
  CHECK_FALSE(bad.ok);
  CHECK(contains(to_json(bad), R"("codes": ["invalid_strategy_name"])"));
  CHECK(contains(to_json(bad), R"('d\"dp\\n')"));
}

TEST_CASE("a message names the flag, the value, what is legal and the nearest match", "[issue-4.4]") {
  const auto sentence = [](const Flags& flags, const Host& host = {}) {
    const Resolution r = resolve(flags, {}, host);
    REQUIRE_FALSE(r.ok());
    return message(r.problems.front());
  };
  const std::string typo = sentence({.strategy = "dpd"});
  CHECK(contains(typo, "--strategy"));
  CHECK(contains(typo, "'dpd'"));
  CHECK(contains(typo, "did you mean 'ddp'"));
  CHECK(contains(typo, "deepspeed_stage_3"));
  CHECK(contains(sentence({.num_nodes = 0}), "--num-nodes"));
  CHECK(contains(sentence({.accelerator = "cuda", .devices = "0,9"}, Host{.cuda_devices = 2}), "[0, 9]"));
  CHECK(contains(sentence({.accelerator = "cpu", .strategy = "xla"}), "--accelerator tpu"));
}

TEST_CASE("every code that the connector reports has a sentence", "[issue-4.4]") {
  for (const Code code : {Code::cli_conflict, Code::invalid_strategy_name, Code::accelerator_unavailable,
                          Code::xla_strategy_needs_xla, Code::env_var_missing, Code::interactive_incompatible,
                          Code::mps_has_no_fp8, Code::strategy_needs_one_device, Code::zero_devices}) {
    INFO(name_of(code));
    CHECK_FALSE(detail::sentence_of(code).empty());
  }
  for (const detail::Sentence& sentence : detail::sentences) {
    INFO(name_of(sentence.code));
    CHECK(detail::sentence_of(sentence.code) == sentence.text);  // no code twice
  }
}

TEST_CASE("it says how processes share the cores", "[issue-6.1]") {
  const Host host{.cores = 8};
  const auto threads = [&](const Flags& flags, const Variables& variables) {
    const Explained explained = explain(flags, variables, host);
    REQUIRE(explained.ok);
    CHECK(explained.choices.back().what == "threads");
    return explained.choices.back();
  };
  CHECK(threads({.strategy = "ddp", .devices = 3}, {}).chosen == "2 for each process");
  CHECK(threads({.strategy = "ddp", .devices = 16}, {}).chosen == "1 for each process");
  CHECK(threads({.strategy = "ddp_fork", .devices = 2}, {}).because.starts_with("8 cores for 2 processes"));
  CHECK(threads({.accelerator = "cpu"}, {}).chosen == "as LibTorch chooses");
  const Variable set[]{{"OMP_NUM_THREADS", "3"}};
  const Explanation chosen = threads({.strategy = "ddp", .devices = 2}, {set, 1});
  CHECK(chosen.chosen == "3 for each process");
  CHECK(chosen.because == "OMP_NUM_THREADS");
}
