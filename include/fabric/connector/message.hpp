// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "fabric/connector/problem.hpp"
#include "fabric/connector/selection.hpp"
#include "fabric/connector/sentences.hpp"
#include "fabric/connector/stages/config.hpp"
#include "fabric/policy/registry.hpp"

namespace fabric {

namespace detail {

/// The i-th of the problem's names, or nothing.
inline std::string_view name_at(const Problem& problem, std::size_t i) {
  std::string_view names = problem.names.view();
  for (; i > 0; --i) {
    const std::size_t end = names.find('\n');
    if (end == std::string_view::npos) return {};
    names.remove_prefix(end + 1);
  }
  return names.substr(0, names.find('\n'));
}

/// A sentence with the problem's names put in.
inline std::string fill_in(std::string_view sentence, const Problem& problem) {
  std::string text;
  for (std::size_t i = 0; i < sentence.size(); ++i) {
    if (sentence[i] == '{') {
      text.append(name_at(problem, static_cast<std::size_t>(sentence[i + 1] - '0')));
      i += 2;
    } else {
      text.push_back(sentence[i]);
    }
  }
  return text;
}

/// The names that are legal where a name is wrong.
inline std::string legal_names(Code code, const Registry& registry) {
  std::string text;
  const auto add = [&](std::string_view name) { text.append(text.empty() ? "" : ", ").append(name); };
  switch (code) {
    case Code::invalid_strategy_name:
      add("auto");
      for (std::size_t i = 0; i < registry.strategy_count; ++i) add(registry.strategies[i].flag);
      break;
    case Code::invalid_accelerator_name:
      add("auto");
      add("gpu");
      for (std::size_t i = 0; i < registry.accelerator_count; ++i) add(registry.accelerators[i].flag);
      break;
    case Code::invalid_precision:
      for (const PrecisionEntry& entry : precision_entries) add(entry.flag);
      break;
    default: break;
  }
  return text;
}

/// The flag as a user would type it; a variable as it is.
inline std::string shown_flag(std::string_view flag) {
  if (flag.empty() || (flag[0] >= 'A' && flag[0] <= 'Z')) return std::string(flag);
  std::string text = flag == "plugins" ? "" : "--";
  for (const char c : flag) text.push_back(c == '_' ? '-' : c);
  return text;
}

/// What a note says to people.
inline std::string note_sentence(Note note) {
  switch (note) {
    case Note::precision_alias_discouraged:
      return "16 and bf16 leave open whether weights are 16 bits wide: write 16-mixed, bf16-mixed or -true";
    case Note::dp_on_cpu_to_ddp: return "dp has no use on CPUs: ddp instead";
    case Note::fp16_amp_cpu_to_bf16: return "CPUs have no autocast to half floats: bf16-mixed instead";
    case Note::srun_not_used: return "Slurm is here, but the program was not started by srun";
    case Note::scaler_disabled_no_cuda: return "without CUDA gradients are not scaled";
    case Note::single_tpu_deprecated: return "single_tpu is an old name of single_xla";
    case Note::amp_fp16: return "matrix products in half floats by autocast";
    case Note::amp_bf16: return "matrix products in bfloat16 by autocast";
    case Note::interactive_one_gpu: return "a notebook uses one GPU unless --devices says otherwise";
  }
  return {};
}

}  // namespace detail

/// A problem as a sentence for people: the flag or variable, what was given, what is legal, what is near and how to
/// mend it. `registry` knows the names of the program's own policies.
[[nodiscard]] inline std::string message(const Problem& problem, const Registry& registry = built_in_registry) {
  std::string text = "fabric: ";
  if (!problem.flag.empty()) text.append(detail::shown_flag(problem.flag)).append(": ");
  const std::string_view sentence = detail::sentence_of(problem.code);
  if (sentence.empty()) {
    text.append(name_of(problem.code));
    for (std::size_t i = 0; !detail::name_at(problem, i).empty(); ++i) {
      text.append(i == 0 ? ": " : ", ").append(detail::name_at(problem, i));
    }
  } else {
    text.append(detail::fill_in(sentence, problem));
  }
  if (!problem.nearest.empty()) text.append("; did you mean '").append(problem.nearest.view()).append("'?");
  if (!problem.detail.empty()) text.append("; ").append(problem.detail.view());
  if (const std::string legal = detail::legal_names(problem.code, registry); !legal.empty()) {
    text.append("; legal: ").append(legal);
  }
  return text;
}

/// All problems, one a line.
[[nodiscard]] inline std::string message(const Problems& problems, const Registry& registry = built_in_registry) {
  std::string text;
  for (const Problem& problem : problems) text.append(text.empty() ? "" : "\n").append(message(problem, registry));
  return text;
}

}  // namespace fabric
