// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fabric {

/// Text of at most `Capacity` bytes, stored in place. It is a literal and structural type, so that a `Selection` can be
/// made by a constexpr function and be a template argument. Longer input is cut, and `truncated` says so.
template <std::size_t Capacity>
struct Text {
  char bytes[Capacity]{};
  std::uint16_t length = 0;
  bool truncated = false;

  constexpr Text() = default;
  constexpr Text(std::string_view text) { append(text); }  // NOLINT(google-explicit-constructor): reads as text
  constexpr Text(const char* text) : Text(std::string_view(text)) {}  // NOLINT(google-explicit-constructor)

  /// Appends `text`, cutting what does not fit.
  constexpr Text& append(std::string_view text) {
    for (const char c : text) {
      if (length == Capacity) {
        truncated = true;
        break;
      }
      bytes[length++] = c;
    }
    return *this;
  }

  /// Appends `value` in decimal.
  constexpr Text& append(long long value) {
    char digits[21]{};
    std::size_t n = 0;
    auto magnitude = value < 0 ? 0ULL - static_cast<unsigned long long>(value) : static_cast<unsigned long long>(value);
    do {
      digits[n++] = static_cast<char>('0' + magnitude % 10);
      magnitude /= 10;
    } while (magnitude != 0);
    if (value < 0) digits[n++] = '-';
    while (n > 0) append(std::string_view(&digits[--n], 1));
    return *this;
  }

  [[nodiscard]] constexpr std::string_view view() const { return {bytes, length}; }
  [[nodiscard]] constexpr bool empty() const { return length == 0; }
  constexpr operator std::string_view() const { return view(); }  // NOLINT(google-explicit-constructor)

  friend constexpr bool operator==(const Text& a, const Text& b) { return a.view() == b.view(); }
  friend constexpr bool operator==(const Text& a, std::string_view b) { return a.view() == b; }
  friend constexpr bool operator==(const Text& a, const char* b) { return a.view() == b; }
};

/// The name of a policy or a flag's value.
using Name = Text<48>;

}  // namespace fabric
