// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fabric {

namespace detail {

/// The next character of UTF-8 `text` at `at`, which moves on; U+FFFD for what is not UTF-8.
constexpr char32_t next_character(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(at++);
  if (lead < 0x80) return lead;
  const std::size_t more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC0 ? 1 : 4;
  char32_t character = more == 3 ? lead & 0x07U : more == 2 ? lead & 0x0FU : lead & 0x1FU;
  for (std::size_t i = 0; i < more; ++i) {
    if (more == 4 || at == text.size() || (byte(at) & 0xC0U) != 0x80U) return 0xFFFD;
    character = character << 6U | (byte(at++) & 0x3FU);
  }
  return character;
}

/// Where `wanted` is in `text`, or npos. std::string_view's own find is no constant expression on g++ 12 when the text
/// lies inside a temporary.
constexpr std::size_t find(std::string_view text, char wanted) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == wanted) return i;
  }
  return std::string_view::npos;
}

/// Equal but for ASCII letters' case.
constexpr bool same_ignoring_case(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) same = lower(a[i]) == lower(b[i]);
  return same;
}

constexpr bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/// The zeros of Unicode 14's decimal digits outside ASCII; nine more digits follow each.
inline constexpr char32_t decimal_zeros[]{
    0x660,   0x6f0,   0x7c0,   0x966,   0x9e6,   0xa66,   0xae6,   0xb66,   0xbe6,   0xc66,   0xce6,
    0xd66,   0xde6,   0xe50,   0xed0,   0xf20,   0x1040,  0x1090,  0x17e0,  0x1810,  0x1946,  0x19d0,
    0x1a80,  0x1a90,  0x1b50,  0x1bb0,  0x1c40,  0x1c50,  0xa620,  0xa8d0,  0xa900,  0xa9d0,  0xa9f0,
    0xaa50,  0xabf0,  0xff10,  0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0, 0x112f0, 0x11450,
    0x114d0, 0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x16a60, 0x16ac0,
    0x16b50, 0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0};

/// Characters that are digits but make no integer: superscripts, circled numbers and the like.
inline constexpr char32_t odd_digits[][2]{
    {0xb2, 0xb3},     {0xb9, 0xb9},       {0x1369, 0x1371},   {0x19da, 0x19da},   {0x2070, 0x2070},
    {0x2074, 0x2079}, {0x2080, 0x2089},   {0x2460, 0x2468},   {0x2474, 0x247c},   {0x2488, 0x2490},
    {0x24ea, 0x24ea}, {0x24f5, 0x24fd},   {0x24ff, 0x24ff},   {0x2776, 0x277e},   {0x2780, 0x2788},
    {0x278a, 0x2792}, {0x10a40, 0x10a43}, {0x10e60, 0x10e68}, {0x11052, 0x1105a}, {0x1f100, 0x1f10a}};

/// 0 to 9, or -1.
constexpr int decimal_digit(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9' ? static_cast<int>(c - '0') : -1;
  for (const char32_t zero : decimal_zeros) {
    if (c >= zero && c <= zero + 9) return static_cast<int>(c - zero);
  }
  return -1;
}

constexpr bool is_odd_digit(char32_t c) {
  for (const auto& range : odd_digits) {
    if (c >= range[0] && c <= range[1]) return true;
  }
  return false;
}

}  // namespace detail

/// `text` without the white space around it, Unicode's included.
[[nodiscard]] constexpr std::string_view trimmed(std::string_view text) {
  std::size_t begin = text.size();
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    if (detail::is_space(detail::next_character(text, at))) continue;
    if (begin > start) begin = start;
    end = at;
  }
  return end == 0 ? std::string_view{} : text.substr(begin, end - begin);
}

/// What a text says as an integer.
struct Integer {
  bool valid = false;
  std::int64_t value = 0;  ///< Cut to +-2^53.
};

/// Reads a decimal integer as Lightning Fabric's flags and variables allow it: white space around it, a sign, single
/// underscores between digits, decimal digits of any script.
[[nodiscard]] constexpr Integer parse_integer(std::string_view text) {
  text = trimmed(text);
  std::size_t at = 0;
  const bool negative = !text.empty() && text[0] == '-';
  if (negative || (!text.empty() && text[0] == '+')) at = 1;
  constexpr std::int64_t most = std::int64_t{1} << 53;
  std::int64_t value = 0;
  bool after_digit = false;
  while (at < text.size()) {
    const char32_t c = detail::next_character(text, at);
    const int digit = detail::decimal_digit(c);
    if (digit < 0 && !(c == '_' && after_digit)) return {};
    after_digit = digit >= 0;
    if (after_digit && value < most) value = value * 10 + digit;
    if (value > most) value = most;
  }
  if (!after_digit) return {};
  return {.valid = true, .value = negative ? -value : value};
}

/// The same, cut to the range of an int.
[[nodiscard]] constexpr int to_int(std::int64_t value) {
  constexpr std::int64_t most = 2147483647;
  return static_cast<int>(value > most ? most : value < -most ? -most : value);
}

}  // namespace fabric
