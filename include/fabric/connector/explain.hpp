// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include <range/v3/range/conversion.hpp>
#include <range/v3/view/counted.hpp>
#include <range/v3/view/filter.hpp>
#include <range/v3/view/join.hpp>
#include <range/v3/view/transform.hpp>

#include "fabric/connector/message.hpp"
#include "fabric/connector/resolve.hpp"

namespace fabric {

/// One choice of a selection and why it was made.
struct Explanation {
  std::string what;                    ///< "strategy".
  std::string chosen;                  ///< "Ddp".
  std::string because;                 ///< "--strategy ddp", "LT_STRATEGY", "chosen automatically", ...
  std::vector<std::string> rules;      ///< Fallbacks and notes that acted on it.
  std::vector<std::string> available;  ///< What else could have been chosen with the rest as it is.
};

/// What a set of flags came to: a line for each policy, or the problems.
struct Explained {
  bool ok = false;
  std::vector<Explanation> choices;
  std::vector<std::string> problems;  ///< Sentences.
  std::vector<std::string> codes;     ///< Their codes.
};

namespace detail {

inline std::string because(Source source, std::string_view flag, std::string_view value) {
  const std::string name = shown_flag(flag);
  switch (source) {
    case Source::automatic: return "chosen automatically";
    case Source::flag: return value.empty() ? name + ", an object" : name + " " + std::string(value);
    case Source::variable: {
      std::string variable = "LT_";
      for (const char c : flag) variable.push_back(c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c);
      return "the variable " + variable + ", which overrides the program";
    }
    case Source::plugin: return "a plugin";
    case Source::strategy: return "the strategy object brings it";
    case Source::fallback: return "instead of what was asked for";
  }
  return {};
}

inline std::string devices_text(const DeviceList& list) {
  constexpr std::string_view kinds[]{"cpu", "cuda", "mps", "xla"};
  const std::string kind(kinds[static_cast<std::size_t>(list.type)]);
  if (list.type == DeviceType::cpu) return std::to_string(list.count) + (list.count == 1 ? " process" : " processes");
  std::string text;
  for (int i = 0; i < list.count && i < 16; ++i) {
    text += (i > 0 ? ", " : "") + kind + ":" + std::to_string(list[i]);
  }
  return list.count > 16 ? text + ", ..." : text;
}

inline std::string launcher_text(const Selection& s) {
  switch (s.launcher) {
    case Launcher::none: return s.external_launch ? "none: the processes are there already" : "none: one process";
    case Launcher::subprocess:
      return s.external_launch ? "none: the processes are there already"
                               : "starts the program again for each other device";
    case Launcher::multiprocessing:
      return s.start_method == StartMethod::fork    ? "forks a process for each other device"
             : s.start_method == StartMethod::spawn ? "spawns a process for each other device"
                                                    : "a fork server makes a process for each other device";
    case Launcher::xla: return "the XLA runtime starts a process for each device";
  }
  return {};
}

inline std::string joined(const std::vector<std::string>& texts, std::string_view separator) {
  return texts | ranges::views::join(separator) | ranges::to<std::string>;
}

/// How local processes share the cores.
inline Explanation threads(const Selection& s, const Variables& variables, const Host& host) {
  if (const Found<Variable> chosen = variables.find("OMP_NUM_THREADS")) {
    return {"threads", std::string(chosen->value) + " for each process", "OMP_NUM_THREADS", {}, {}};
  }
  if (s.launcher == Launcher::none && !s.external_launch) {
    return {"threads", "as LibTorch chooses", "one process has the cores for itself", {}, {}};
  }
  if (host.cores == 0) return {"threads", "not known", "the host's cores are not known", {}, {}};
  const int processes = s.devices.count > 0 ? s.devices.count : 1;
  const int each = host.cores > processes ? host.cores / processes : 1;
  return {"threads",
          std::to_string(each) + " for each process",
          std::to_string(host.cores) + " cores for " + std::to_string(processes) +
              " processes of this node; OMP_NUM_THREADS would change it",
          {},
          {}};
}

inline std::string rank_text(const Rank& rank) {
  return rank.known() ? std::to_string(rank.value) : "not known (" + std::string(name_of(rank.code)) + ")";
}

/// The alternatives that the rules and the machine allow, with the other choices as they are.
inline void list_alternatives(std::vector<Explanation>& choices, const Selection& s, const Host& host,
                              const Registry& registry) {
  using ranges::views::counted;
  using ranges::views::filter;
  const Combination chosen{s.accelerator, s.strategy, s.precision, s.environment};
  // Those of the entries that may stand in the chosen combination in place of what it has.
  const auto legal = [&](auto Combination::*choice) {
    return filter([&chosen, choice](const auto& entry) {
      Combination other = chosen;
      other.*choice = *entry.facts;
      return other.*choice != chosen.*choice && first_refusal(other) == RuleId::none;
    });
  };
  const auto names = [](auto&& entries) {
    return entries | ranges::views::transform([](const auto& entry) { return std::string(entry.flag); }) |
           ranges::to<std::vector>();
  };
  choices[0].available = names(counted(registry.accelerators, static_cast<std::ptrdiff_t>(registry.accelerator_count)) |
                               legal(&Combination::accelerator) |
                               filter([&](const AcceleratorEntry& entry) { return is_available(*entry.facts, host); }));
  choices[2].available = names(counted(registry.strategies, static_cast<std::ptrdiff_t>(registry.strategy_count)) |
                               legal(&Combination::strategy) | filter([&](const StrategyEntry& entry) {
                                 return missing_engine(*entry.facts, host) == Code::none &&
                                        (s.devices.count == 1 || !runs_on_one_device(*entry.facts));
                               }));
  choices[3].available =
      names(precision_entries | legal(&Combination::precision) |
            filter([](const PrecisionEntry& entry) { return entry.flag == entry.facts->flag.view(); }));
}

}  // namespace detail

/// Why these flags come down to what they do.
[[nodiscard]] inline Explained explain(const Flags& flags, const Variables& variables, const Host& host,
                                       const Registry& registry = built_in_registry) {
  const Resolution r = resolve(flags, variables, host, registry);
  Explained out;
  out.ok = r.ok();
  for (const Problem& problem : r.problems) {
    out.problems.push_back(message(problem, registry));
    out.codes.emplace_back(name_of(problem.code));
  }
  if (!r.ok()) return out;

  const auto text = [](const auto& name) { return std::string(name.view()); };
  const Sources& from = r.sources;
  const std::string asked = r.sources.accelerator == Source::flag ? text(flags.accelerator.text) : "";
  out.choices = {
      {"accelerator", text(r.accelerator.name), detail::because(from.accelerator, "accelerator", asked), {}, {}},
      {"devices", detail::devices_text(r.devices), detail::because(from.devices, "devices", ""), {}, {}},
      {"strategy", text(r.strategy.name), detail::because(from.strategy, "strategy", r.strategy_flag), {}, {}},
      {"precision", text(r.precision.name), detail::because(from.precision, "precision", r.precision_flag), {}, {}},
      {"environment",
       text(r.environment.name),
       detail::because(from.environment, "environment", flags.environment),
       {},
       {}},
      {"launcher", detail::launcher_text(r), "follows from strategy and environment", {}, {}},
      {"num_nodes",
       std::to_string(r.num_nodes),
       detail::because(from.num_nodes, "num_nodes", std::to_string(r.num_nodes)),
       {},
       {}},
      {"ranks",
       "global rank " + detail::rank_text(r.global_rank) + " of " + detail::rank_text(r.world_size),
       "follows from environment, devices and num_nodes",
       {},
       {}},
      detail::threads(r, variables, host),
  };
  if (from.devices == Source::flag) out.choices[1].because = "--devices";
  for (const Note note : r.notes) {
    const std::size_t place = note == Note::interactive_one_gpu                                       ? 1
                              : note == Note::dp_on_cpu_to_ddp || note == Note::single_tpu_deprecated ? 2
                              : note == Note::srun_not_used                                           ? 4
                                                                                                      : 3;
    out.choices[place].rules.push_back(detail::note_sentence(note));
  }
  if (from.strategy == Source::fallback && !r.notes.has(Note::dp_on_cpu_to_ddp)) {
    out.choices[2].rules.emplace_back("fsdp on TPUs is xla_fsdp");
  }
  if (r.settings.code != Code::none) out.choices[7].rules.push_back(message(r.settings, registry));
  detail::list_alternatives(out.choices, r, host, registry);
  return out;
}

/// An explanation for people: a few lines for each policy.
[[nodiscard]] inline std::string to_text(const Explained& explained) {
  std::string out;
  for (const std::string& problem : explained.problems) out += problem + "\n";
  for (const Explanation& choice : explained.choices) {
    out += choice.what + std::string(choice.what.size() < 12 ? 12 - choice.what.size() : 1, ' ') + choice.chosen +
           "  (" + choice.because + ")\n";
    for (const std::string& rule : choice.rules) out += std::string(14, ' ') + rule + "\n";
    if (choice.available.empty()) continue;
    out += std::string(14, ' ') + "also possible: " + detail::joined(choice.available, " ") + "\n";
  }
  return out;
}

namespace detail {

inline std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    constexpr const char* hex = "0123456789abcdef";
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += std::string("\\u00") + hex[c >> 4] + hex[c & 15];
    } else {
      out += c;
    }
  }
  return out + "\"";
}

inline std::string json_list(const std::vector<std::string>& texts) {
  return "[" + joined(texts | ranges::views::transform(json_text) | ranges::to<std::vector<std::string>>, ", ") + "]";
}

}  // namespace detail

/// The same as JSON: `{"ok": true, "choices": [{"what", "chosen", "because", "rules", "available"}, ...], "problems":
/// [...], "codes": [...]}`.
[[nodiscard]] inline std::string to_json(const Explained& explained) {
  std::string out = std::string("{\"ok\": ") + (explained.ok ? "true" : "false") + ", \"choices\": [";
  bool first = true;
  for (const Explanation& choice : explained.choices) {
    out += std::string(first ? "" : ", ") + "{\"what\": " + detail::json_text(choice.what) +
           ", \"chosen\": " + detail::json_text(choice.chosen) + ", \"because\": " + detail::json_text(choice.because) +
           ", \"rules\": " + detail::json_list(choice.rules) +
           ", \"available\": " + detail::json_list(choice.available) + "}";
    first = false;
  }
  return out + "], \"problems\": " + detail::json_list(explained.problems) +
         ", \"codes\": " + detail::json_list(explained.codes) + "}";
}

}  // namespace fabric
