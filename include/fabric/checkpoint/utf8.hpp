// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string_view>

namespace fabric::detail {

/// Is the text UTF-8 (RFC 3629)? Python refuses files with other texts.
[[nodiscard]] constexpr bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i++]);
    if (first < 0x80) continue;
    const int following = first >= 0xC2 && first < 0xE0   ? 1
                          : (first & 0xF0U) == 0xE0       ? 2
                          : first >= 0xF0 && first < 0xF5 ? 3
                                                          : 0;
    if (following == 0) return false;
    unsigned point = first & (0x3FU >> following);
    for (int n = 0; n < following; ++n) {
      if (i == text.size() || (static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80) return false;
      point = (point << 6U) | (static_cast<unsigned char>(text[i++]) & 0x3FU);
    }
    constexpr unsigned least[] = {0, 0x80, 0x800, 0x10000};
    if (point < least[following] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return false;
  }
  return true;
}

}  // namespace fabric::detail
