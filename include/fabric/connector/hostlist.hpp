// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fabric/connector/problem.hpp"
#include "fabric/policy/text.hpp"

namespace fabric {

/// A host's name.
using HostName = Text<256>;

/// How strictly a host list is read. Slurm refuses text after the last bracket and spaces inside brackets; a list that
/// was written by hand may have both.
enum class HostListGrammar : std::uint8_t { slurm, lenient };

/// A Slurm host list such as `rack[1-2]n[01-04,9],login`, expanded on the fly and without memory of its own: the text
/// must outlive the list. Hosts come in Slurm's order, repeats kept: the last bracket runs fastest, then the first, the
/// second and so on.
///
///   for (const HostName& host : *HostList::parse("n[1-3]")) ...
class HostList {
 public:
  /// Slurm's own bound on one range, such as `[1-65536]`.
  static constexpr std::uint64_t max_range = 65536;
  static constexpr std::size_t max_brackets = 8;

  constexpr HostList() = default;

  /// Reads the whole list, or says at which position (from 1) it stops being one.
  [[nodiscard]] static constexpr Expected<HostList> parse(std::string_view text,
                                                          HostListGrammar grammar = HostListGrammar::slurm) {
    HostList list;
    list.text_ = text;
    for (Item item{.end = 0}; list.next_item(item);) {
      const Fault fault = list.check(item, grammar);
      if (!fault.what.empty()) return refused(text, fault);
    }
    return list;
  }

  /// How many hosts, repeats included.
  [[nodiscard]] constexpr std::uint64_t size() const { return size_; }
  [[nodiscard]] constexpr bool empty() const { return size_ == 0; }

  class Iterator;
  struct End {};
  [[nodiscard]] constexpr Iterator begin() const;
  [[nodiscard]] constexpr End end() const { return {}; }

  /// The first host. The list must not be empty.
  [[nodiscard]] constexpr HostName front() const;
  /// The i-th host, counted from 0; found by walking there.
  [[nodiscard]] constexpr HostName operator[](std::uint64_t i) const;

 private:
  struct Item {
    std::size_t begin = 0;
    std::size_t end = 0;
  };
  struct Fault {
    std::string_view what;
    std::size_t at = 0;
  };
  struct Range {
    std::uint64_t first = 0;
    std::uint64_t last = 0;
    std::size_t width = 0;   ///< Digits at least: those of the range's first number.
    std::size_t end = 0;     ///< Where the range's text ends: at ',' or ']'.
    std::string_view fault;  ///< Why it is none; then `end` is where.
  };

  static constexpr bool separates(char c) { return c == ',' || c == ' ' || c == '\t' || c == '\n'; }
  static constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }

  /// Moves to the item after `item`. Separators inside brackets do not end one.
  constexpr bool next_item(Item& item) const {
    std::size_t at = item.end;
    while (at < text_.size() && separates(text_[at])) ++at;
    item.begin = at;
    bool inside = false;
    for (; at < text_.size() && (inside || !separates(text_[at])); ++at) {
      if (text_[at] == '[') inside = true;
      if (text_[at] == ']') inside = false;
    }
    item.end = at;
    return item.begin != item.end;
  }

  constexpr void skip_spaces(std::size_t& at) const {
    while (at < text_.size() && (text_[at] == ' ' || text_[at] == '\t')) ++at;
  }

  /// Reads digits; false when there are none or the number does not fit.
  constexpr bool read_number(std::size_t& at, std::uint64_t& number) const {
    const std::size_t start = at;
    number = 0;
    for (; at < text_.size() && is_digit(text_[at]); ++at) {
      const auto digit = static_cast<std::uint64_t>(text_[at] - '0');
      if (number > (UINT64_MAX - digit) / 10) return false;
      number = number * 10 + digit;
    }
    return at != start;
  }

  constexpr Range read_range(std::size_t at) const {
    Range range;
    skip_spaces(at);
    const std::size_t start = at;
    if (!read_number(at, range.first)) return {.end = at, .fault = "a number is missing or too large"};
    range.width = at - start;
    range.last = range.first;
    skip_spaces(at);
    if (at < text_.size() && text_[at] == '-') {
      ++at;
      skip_spaces(at);
      if (!read_number(at, range.last)) return {.end = at, .fault = "a number is missing or too large"};
      skip_spaces(at);
    }
    range.end = at;
    if (range.last < range.first) return {.end = start, .fault = "the range runs backwards"};
    if (range.last - range.first >= max_range) return {.end = start, .fault = "the range has more than 65536 hosts"};
    return range;
  }

  /// Checks one item and adds its hosts to the size.
  constexpr Fault check(const Item& item, HostListGrammar grammar) {
    std::uint64_t hosts = 1;
    std::size_t brackets = 0;
    std::size_t length = 0;
    std::size_t at = item.begin;
    while (at < item.end) {
      if (text_[at] == ']') return {"']' without '['", at};
      if (text_[at] != '[') {
        const bool suffix = brackets > 0 && grammar == HostListGrammar::slurm;
        for (const std::size_t start = at; at < item.end && text_[at] != '[' && text_[at] != ']'; ++at, ++length) {
          if (suffix && at + 1 == item.end) return {"text after the last ']'", start};
        }
        continue;
      }
      if (++brackets > max_brackets) return {"more than 8 brackets in one name", at};
      std::uint64_t in_bracket = 0;
      std::size_t digits = 0;
      const std::size_t open = at;
      do {
        ++at;
        const std::size_t start = at;
        const Range range = read_range(at);
        if (!range.fault.empty()) return {range.fault, range.end == item.end ? open : range.end};
        at = range.end;
        if (grammar == HostListGrammar::slurm) {
          for (std::size_t i = start; i < at; ++i) {
            if (text_[i] == ' ' || text_[i] == '\t') return {"a space inside the bracket", i};
          }
        }
        in_bracket += range.last - range.first + 1;
        const std::size_t most = range.width > 20 ? range.width : 20;
        if (most > digits) digits = most;
      } while (at < item.end && text_[at] == ',');
      if (at == item.end) return {"'[' without ']'", open};
      if (text_[at] != ']') return {"neither ',' nor ']' after a number", at};
      ++at;
      length += digits;
      hosts = hosts > UINT64_MAX / in_bracket ? UINT64_MAX : hosts * in_bracket;
    }
    if (length > sizeof(HostName::bytes)) return {"the name is longer than 256 characters", item.begin};
    size_ = size_ > UINT64_MAX - hosts ? UINT64_MAX : size_ + hosts;
    return {};
  }

  static constexpr Problem refused(std::string_view text, const Fault& fault) {
    Problem problem(Code::hostlist_invalid, "hostlist");
    problem.names.append("'").append(text.substr(0, 80)).append("'");
    problem.detail.append("at position ").append(static_cast<long long>(fault.at + 1)).append(": ").append(fault.what);
    return problem;
  }

  std::string_view text_;
  std::uint64_t size_ = 0;
};

/// Walks through a host list. `*it` is the host's name.
class HostList::Iterator {
 public:
  constexpr explicit Iterator(const HostList& list) : list_(list) { load(); }

  constexpr HostName operator*() const {
    HostName name;
    std::size_t bracket = 0;
    for (std::size_t at = item_.begin; at < item_.end; ++at) {
      if (list_.text_[at] != '[') {
        name.append(list_.text_.substr(at, 1));
        continue;
      }
      const Bracket& b = brackets_[bracket++];
      std::size_t digits = 1;
      for (std::uint64_t rest = b.now; rest >= 10; rest /= 10) ++digits;
      for (; digits < b.range.width; ++digits) name.append("0");
      append_number(name, b.now);
      at = b.close;
    }
    return name;
  }

  constexpr Iterator& operator++() {
    for (std::size_t i = 0; i < bracket_count_; ++i) {
      Bracket& b = brackets_[i == 0 ? bracket_count_ - 1 : i - 1];
      if (b.now < b.range.last) {
        ++b.now;
        return *this;
      }
      const bool more = list_.text_[b.range.end] == ',';
      b.range = list_.read_range(more ? b.range.end + 1 : b.open + 1);
      b.now = b.range.first;
      if (more) return *this;
    }
    load();
    return *this;
  }

  friend constexpr bool operator==(const Iterator& it, End) { return it.item_.begin == it.item_.end; }

 private:
  struct Bracket {
    std::size_t open = 0;
    std::size_t close = 0;
    Range range;
    std::uint64_t now = 0;
  };

  static constexpr void append_number(HostName& name, std::uint64_t number) {
    char digits[20]{};
    std::size_t n = 0;
    do {
      digits[n++] = static_cast<char>('0' + number % 10);
      number /= 10;
    } while (number != 0);
    while (n > 0) name.append(std::string_view(&digits[--n], 1));
  }

  /// Moves to the first host of the next item.
  constexpr void load() {
    bracket_count_ = 0;
    if (!list_.next_item(item_)) return;
    for (std::size_t at = item_.begin; at < item_.end; ++at) {
      if (list_.text_[at] != '[') continue;
      Bracket& b = brackets_[bracket_count_++];
      b.open = at;
      b.range = list_.read_range(at + 1);
      b.now = b.range.first;
      while (list_.text_[at] != ']') ++at;
      b.close = at;
    }
  }

  HostList list_;
  Item item_;
  std::array<Bracket, max_brackets> brackets_{};
  std::size_t bracket_count_ = 0;
};

constexpr HostList::Iterator HostList::begin() const { return Iterator(*this); }
constexpr HostName HostList::front() const { return *begin(); }
constexpr HostName HostList::operator[](std::uint64_t i) const {
  Iterator it = begin();
  for (; i > 0; --i) ++it;
  return *it;
}

}  // namespace fabric
