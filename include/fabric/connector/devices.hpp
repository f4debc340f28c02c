// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "fabric/connector/cuda_visible_devices.hpp"
#include "fabric/connector/host.hpp"
#include "fabric/connector/integer.hpp"
#include "fabric/connector/problem.hpp"
#include "fabric/policy/accelerator.hpp"
#include "fabric/policy/text.hpp"

namespace fabric {

/// The most devices that can be listed one by one. A count has no such bound.
inline constexpr int max_listed_devices = 128;

/// Device indices, in the order in which they were given.
struct DeviceIndices {
  std::array<int, max_listed_devices> items{};
  int count = 0;

  constexpr bool push(int index) {
    if (count == max_listed_devices) return false;
    items[static_cast<std::size_t>(count++)] = index;
    return true;
  }
  [[nodiscard]] constexpr int operator[](int i) const { return items[static_cast<std::size_t>(i)]; }
  friend constexpr bool operator==(const DeviceIndices&, const DeviceIndices&) = default;
};

/// The value of `--devices` in every form: not given, a count (-1 means all), a text ("2", "0,1", "auto"), a list of
/// indices `{0, 1}`; true and nullptr are kept apart so that they can be answered by name.
struct DevicesFlag {
  enum class Form : std::uint8_t { unset, integer, text, list, boolean, null };

  Form form = Form::unset;
  bool too_many = false;  ///< A list or text was longer than what fits.
  int number = 0;
  DeviceIndices indices{};
  Text<512> text{};

  constexpr DevicesFlag() = default;
  // NOLINTBEGIN(google-explicit-constructor): a flag's value is written as itself
  constexpr DevicesFlag(int count) : form(Form::integer), number(count) {}
  constexpr DevicesFlag(std::same_as<bool> auto value) : form(Form::boolean), number(value ? 1 : 0) {}
  constexpr DevicesFlag(std::string_view value) : form(Form::text), text(value) { too_many = text.truncated; }
  constexpr DevicesFlag(const char* value) : DevicesFlag(std::string_view(value)) {}
  constexpr DevicesFlag(std::nullptr_t) : form(Form::null) {}
  constexpr DevicesFlag(std::initializer_list<int> list) : form(Form::list) {
    for (const int index : list) too_many |= !indices.push(index);
  }
  // NOLINTEND(google-explicit-constructor)

  /// A list that may be empty or come from elsewhere.
  [[nodiscard]] static constexpr DevicesFlag list(const int* first, std::size_t count) {
    DevicesFlag flag;
    flag.form = Form::list;
    for (std::size_t i = 0; i < count; ++i) flag.too_many |= !flag.indices.push(first[i]);
    return flag;
  }

  /// Not given, or the text "auto": the accelerator says how many.
  [[nodiscard]] constexpr bool automatic() const {
    return form == Form::unset || (form == Form::text && text == "auto");
  }

  friend constexpr bool operator==(const DevicesFlag&, const DevicesFlag&) = default;
};

/// Says "no devices" whatever the accelerator: 0, "0", false, an empty list.
[[nodiscard]] constexpr bool is_zero_like(const DevicesFlag& flag) {
  switch (flag.form) {
    case DevicesFlag::Form::integer:
    case DevicesFlag::Form::boolean: return flag.number == 0;
    case DevicesFlag::Form::text: return flag.text == "0";
    case DevicesFlag::Form::list: return flag.indices.count == 0;
    default: return false;
  }
}

/// The devices of one node, one process each: `count` of them, 0 to count - 1 unless they are listed.
struct DeviceList {
  DeviceType type = DeviceType::cpu;
  int count = 1;
  bool listed = false;
  /// Under torchrun with a single visible GPU each process sees a GPU of its own, as number 0. Then `count` and the
  /// indices are not checked against this host, and every process uses GPU 0.
  bool one_visible_each = false;
  DeviceIndices indices{};

  /// The i-th device's index as it was asked for.
  [[nodiscard]] constexpr int operator[](int i) const { return listed ? indices[i] : i; }
  /// The index that the process of that local rank uses; -1 when the rank is beyond the list.
  [[nodiscard]] constexpr int index_for(int local_rank) const {
    if (local_rank < 0 || local_rank >= count) return -1;
    return one_visible_each ? 0 : (*this)[local_rank];
  }
  friend constexpr bool operator==(const DeviceList&, const DeviceList&) = default;
};

/// How many devices of that kind the host has, and what `--devices auto` means: one process on a CPU.
[[nodiscard]] constexpr int auto_device_count(DeviceType type, const Host& host) {
  switch (type) {
    case DeviceType::cuda: return host.cuda_devices;
    case DeviceType::mps: return host.mps ? 1 : 0;
    case DeviceType::xla: return host.tpu_devices;
    default: return 1;
  }
}

namespace detail {

/// What a devices flag asks for before it is compared with the host.
struct AskedDevices {
  bool is_list = false;
  int number = 0;
  DeviceIndices indices{};
};

/// Appends numbers as a list in brackets, which is how messages show them.
template <class Text>
constexpr void append_list(Text& text, int count, auto&& item) {
  text.append("[");
  for (int i = 0; i < count && !text.truncated; ++i) {
    if (i > 0) text.append(", ");
    text.append(static_cast<long long>(item(i)));
  }
  text.append("]");
}

/// A user's text, in quotes.
constexpr Text<112> quoted(std::string_view text) {
  Text<112> result("'");
  result.append(text.substr(0, 80)).append("'");
  return result;
}

/// The given value as messages show it.
constexpr Text<112> shown(const DevicesFlag& flag) {
  Text<112> text;
  switch (flag.form) {
    case DevicesFlag::Form::integer: text.append(static_cast<long long>(flag.number)); break;
    case DevicesFlag::Form::text: return quoted(flag.text);
    case DevicesFlag::Form::list: append_list(text, flag.indices.count, [&](int i) { return flag.indices[i]; }); break;
    case DevicesFlag::Form::boolean: text.append(flag.number != 0 ? "True" : "False"); break;
    case DevicesFlag::Form::null: text.append("None"); break;
    case DevicesFlag::Form::unset: text.append("'auto'"); break;
  }
  return text;
}

/// What was probably meant by a text that is no devices value: "auto" in other letters, a list in brackets or with
/// spaces, a whole number written as 2.0.
constexpr Name nearest_devices(std::string_view given) {
  given = trimmed(given);
  constexpr std::string_view automatic = "auto";
  bool same = given.size() == automatic.size();
  for (std::size_t i = 0; same && i < given.size(); ++i) same = (given[i] | 0x20) == automatic[i];
  if (same) return automatic;
  Name cleaned;
  bool digit = false;
  for (const char c : given) {
    if (c == '.' && digit) break;
    if (c >= '0' && c <= '9') digit = true;
    const bool separator = c == ' ' || c == ';' || c == ':';
    if (separator && digit && cleaned.view().back() != ',') cleaned.append(",");
    if ((c >= '0' && c <= '9') || (c == ',' && digit)) cleaned.append(std::string_view(&c, 1));
  }
  return digit && cleaned.view() != given && !cleaned.truncated ? cleaned : Name{};
}

constexpr Problem devices_problem(Code code, const DevicesFlag& flag, std::string_view names, std::string_view legal) {
  Problem problem(code, "devices", names.empty() ? std::string_view(shown(flag)) : names);
  problem.detail.append(legal);
  if (flag.form == DevicesFlag::Form::text) problem.nearest = nearest_devices(flag.text);
  return problem;
}

/// Reads "0,2" into a list. The token that is no integer comes back in `bad`.
constexpr bool read_indices(std::string_view text, AskedDevices& asked, std::string_view& bad, bool& too_many) {
  asked.is_list = true;
  while (true) {
    const std::size_t comma = find(text, ',');
    const std::string_view token = text.substr(0, comma);
    if (!token.empty()) {
      const Integer index = parse_integer(token);
      if (!index.valid) {
        bad = trimmed(token);
        return false;
      }
      too_many |= !asked.indices.push(to_int(index.value));
    }
    if (comma == std::string_view::npos) return true;
    text.remove_prefix(comma + 1);
  }
}

inline constexpr std::string_view legal_gpus = "a count, -1 for all, indices such as '0,2', or 'auto'";

constexpr Expected<DeviceList> parse_cpu(const DevicesFlag& flag) {
  constexpr std::string_view legal = "how many processes: a whole number above 0, or 'auto'";
  int count = flag.number;
  bool good = flag.form == DevicesFlag::Form::integer || flag.form == DevicesFlag::Form::boolean;
  if (flag.form == DevicesFlag::Form::text) {
    const std::string_view text = trimmed(flag.text);
    bool odd = false;
    good = !text.empty();
    for (std::size_t at = 0; good && at < text.size();) {
      const char32_t c = next_character(text, at);
      odd |= is_odd_digit(c);
      good = decimal_digit(c) >= 0 || is_odd_digit(c);
    }
    if (good && odd) return devices_problem(Code::cpu_devices_odd_digit, flag, {}, legal);
    count = to_int(parse_integer(text).value);
  }
  if (!good || count <= 0) {
    // A list of n indices probably meant n processes.
    Problem problem = devices_problem(Code::cpu_devices_not_positive_int, flag, {}, legal);
    if (flag.form == DevicesFlag::Form::list && flag.indices.count > 0) {
      problem.nearest = Name{}.append(static_cast<long long>(flag.indices.count));
    }
    return problem;
  }
  return DeviceList{.type = DeviceType::cpu, .count = count};
}

/// What `flag` asks of GPUs, or the problem with its form.
constexpr Expected<AskedDevices> asked_gpus(const DevicesFlag& flag, DeviceType type) {
  using Form = DevicesFlag::Form;
  if (flag.form == Form::null || flag.form == Form::boolean) {
    return devices_problem(Code::device_ids_type, flag, {}, legal_gpus);
  }
  const std::string_view text = trimmed(flag.text);
  if (is_zero_like(flag) || (flag.form == Form::text && (text == "0" || text == "[]"))) {
    if (type == DeviceType::mps) return devices_problem(Code::device_ids_type, flag, "None", legal_gpus);
    return devices_problem(Code::gpu_devices_resolved_to_none, flag, {},
                           "at least one GPU: a count, indices, or 'auto'");
  }
  if (flag.too_many)
    return devices_problem(Code::too_many_devices, flag, {}, "at most 128 devices one by one; a count has no bound");
  AskedDevices asked{.is_list = flag.form == Form::list, .number = flag.number, .indices = flag.indices};
  if (flag.form == Form::text) {
    std::string_view bad = text;
    bool too_many = false;
    if (find(flag.text, ',') != std::string_view::npos) {
      if (!read_indices(flag.text, asked, bad, too_many)) {
        return devices_problem(Code::devices_text_not_int, flag, quoted(bad), legal_gpus);
      }
    } else {
      const Integer number = parse_integer(text);
      if (!number.valid) return devices_problem(Code::devices_text_not_int, flag, quoted(bad), legal_gpus);
      asked.number = to_int(number.value);
    }
    if (too_many)
      return devices_problem(Code::too_many_devices, flag, {}, "at most 128 devices one by one; a count has no bound");
  }
  return asked;
}

constexpr Expected<DeviceList> parse_gpus(const DevicesFlag& flag, DeviceType type, const Host& host,
                                          const Variables& variables) {
  const Expected<AskedDevices> read = asked_gpus(flag, type);
  if (!read) return read.problem;
  const AskedDevices& asked = *read;
  const int available = auto_device_count(type, host);
  const int count = asked.is_list ? asked.indices.count : asked.number == -1 ? available : asked.number;
  Text<48> has(available == 0 ? "none" : available == 1 ? "GPU 0" : "GPUs 0 to ");
  if (available > 1) has.append(static_cast<long long>(available - 1));
  Text<96> legal("this machine has ");
  legal.append(has);
  if (count <= 0) return devices_problem(Code::gpus_none_available, flag, {}, legal);

  DeviceList list{.type = type, .count = count, .listed = asked.is_list, .indices = asked.indices};
  list.one_visible_each = variables.has("TORCHELASTIC_RUN_ID") && count != 1 && available == 1;
  bool on_machine = list.listed || count <= available || list.one_visible_each;
  bool unique = true;
  for (int i = 0; list.listed && i < count; ++i) {
    on_machine &= list.indices[i] >= 0 && (list.indices[i] < available || list.one_visible_each);
    for (int j = 0; j < i; ++j) unique &= list.indices[i] != list.indices[j];
  }
  if (unique || list.one_visible_each) {
    if (on_machine) return list;
    Text<80> names;
    append_list(names, count, [&](int i) { return list[i]; });
    return devices_problem(Code::gpu_not_on_machine, flag, names, legal);
  }
  return devices_problem(Code::gpu_ids_not_unique, flag, {}, legal);
}

constexpr Expected<DeviceList> parse_tpus(const DevicesFlag& flag, const Host& host) {
  using Form = DevicesFlag::Form;
  constexpr std::string_view legal = "1, all of them, or one index in a list";
  if (flag.form == Form::null || flag.form == Form::boolean) {
    return devices_problem(Code::device_ids_type, flag, {}, legal);
  }
  AskedDevices asked{.is_list = flag.form == Form::list, .number = flag.number, .indices = flag.indices};
  bool too_many = flag.too_many;
  if (flag.form == Form::text) {
    const std::string_view text = trimmed(flag.text);
    std::string_view bad;
    if (const Integer number = parse_integer(text); number.valid) {
      asked.number = to_int(number.value);
    } else if (!read_indices(text, asked, bad, too_many)) {
      return devices_problem(Code::tpu_devices_text_invalid, flag, quoted(text), legal);
    }
  }
  const int available = host.tpu_devices;
  DeviceList list{.type = DeviceType::xla, .count = asked.number, .listed = asked.is_list, .indices = asked.indices};
  if (asked.is_list) list.count = asked.indices.count;
  const bool good = asked.is_list
                        ? !too_many && list.count == 1 && asked.indices[0] >= 0 && asked.indices[0] < available
                        : asked.number == 1 || asked.number == available;
  if (good) return list;
  Problem problem(Code::tpu_devices_invalid, "devices");
  problem.name(static_cast<long long>(available));
  Text<80> given;
  if (asked.is_list) {
    append_list(given, asked.indices.count, [&](int i) { return asked.indices[i]; });
  } else {
    given.append(static_cast<long long>(asked.number));
  }
  problem.name(given).detail.append(legal);
  return problem;
}

}  // namespace detail

/// The devices that a `--devices` value means on an accelerator of that kind. Problems carry the codes of the device
/// stage, name the value, say what is legal and what was probably meant. More than one MIG device is refused.
[[nodiscard]] constexpr Expected<DeviceList> parse_devices(const DevicesFlag& flag, DeviceType type, const Host& host,
                                                           const Variables& variables) {
  if (type == DeviceType::cuda) {
    if (const Problem problem = several_mig_devices(variables); problem.code != Code::none) return problem;
  }
  if (flag.automatic()) return DeviceList{.type = type, .count = auto_device_count(type, host)};
  switch (type) {
    case DeviceType::cuda:
    case DeviceType::mps: return detail::parse_gpus(flag, type, host, variables);
    case DeviceType::xla: return detail::parse_tpus(flag, host);
    default: return detail::parse_cpu(flag);
  }
}

}  // namespace fabric
