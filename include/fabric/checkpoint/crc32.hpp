// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <smmintrin.h>
#include <wmmintrin.h>
#endif

namespace fabric::detail {

static_assert(std::endian::native == std::endian::little, "fabric: checkpoints are written by little-endian machines");

/// Row 0 is the CRC of each byte; row n that of the byte with n zeros after it, so that eight bytes go in one step
/// (slicing by 8; Kounavis and Berry, 2005).
constexpr std::array<std::array<std::uint32_t, 256>, 8> crc32_tables() {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
    tables[0][byte] = crc;
  }
  for (std::size_t row = 1; row < 8; ++row) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[row - 1][byte];
      tables[row][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

/// Goes on with a checksum, without the inversions at its beginning and end.
[[nodiscard]] inline std::uint32_t crc32_by_tables(const unsigned char* bytes, std::size_t size, std::uint32_t crc) {
  static constexpr auto tables = crc32_tables();
  for (; size >= 8; size -= 8, bytes += 8) {
    std::uint32_t low;
    std::uint32_t high;
    std::memcpy(&low, bytes, 4);
    std::memcpy(&high, bytes + 4, 4);
    low ^= crc;
    crc = tables[7][low & 0xFF] ^ tables[6][(low >> 8) & 0xFF] ^ tables[5][(low >> 16) & 0xFF] ^ tables[4][low >> 24] ^
          tables[3][high & 0xFF] ^ tables[2][(high >> 8) & 0xFF] ^ tables[1][(high >> 16) & 0xFF] ^
          tables[0][high >> 24];
  }
  for (; size > 0; --size, ++bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *bytes) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
/// The same for a multiple of 64 bytes, by carry-less multiplication, about ten times as fast. The bytes are folded, 64
/// at a time, into 16 that leave the same remainder (Gopal and others, "Fast CRC Computation for Generic Polynomials
/// Using PCLMULQDQ Instruction", Intel 2009, whose constants these are).
[[nodiscard]] __attribute__((target("pclmul,sse4.1"))) inline std::uint32_t crc32_by_folding(const unsigned char* bytes,
                                                                                             std::size_t size,
                                                                                             std::uint32_t crc) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i folded[4];
  for (int i = 0; i < 4; ++i) folded[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i);
  folded[0] = _mm_xor_si128(folded[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (std::size_t done = 64; done < size; done += 64) {
    for (int i = 0; i < 4; ++i) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + done) + i);
      const __m128i low = _mm_clmulepi64_si128(folded[i], by_64, 0x00);
      const __m128i high = _mm_clmulepi64_si128(folded[i], by_64, 0x11);
      folded[i] = _mm_xor_si128(_mm_xor_si128(low, high), next);
    }
  }
  for (int i = 1; i < 4; ++i) {
    const __m128i low = _mm_clmulepi64_si128(folded[0], by_16, 0x00);
    const __m128i high = _mm_clmulepi64_si128(folded[0], by_16, 0x11);
    folded[0] = _mm_xor_si128(_mm_xor_si128(low, high), folded[i]);
  }
  unsigned char rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), folded[0]);
  return crc32_by_tables(rest, sizeof rest, 0);
}
#endif

/// The checksum of zip files: `crc32(b, nb, crc32(a, na))` is that of a with b after it.
[[nodiscard]] inline std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t before = 0) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~before;
#if defined(__x86_64__)
  static const bool folds = __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("sse4.1") != 0;
  if (folds && size >= 64) {
    const std::size_t whole = size - size % 64;
    crc = crc32_by_folding(bytes, whole, crc);
    bytes += whole;
    size -= whole;
  }
#endif
  return ~crc32_by_tables(bytes, size, crc);
}

}  // namespace fabric::detail
