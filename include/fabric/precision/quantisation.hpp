// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <torch/types.h>

namespace fabric::quantisation {

// The arithmetic of the bitsandbytes package, version 0.50, in LibTorch's operators: the same bytes come out. Sources:
// Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NF4, double quantisation), "8-bit Optimizers via
// Block-wise Quantization" (dynamic map), "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale".

/// The sixteen numbers that 4 bits can mean.
enum class Code4 : std::uint8_t {
  nf4,  ///< Quantiles of a normal distribution.
  fp4,  ///< Sign, two bits of exponent, one of mantissa; not in ascending order.
};

/// (16), 32-bit; `code[i]` is what i means.
[[nodiscard]] inline at::Tensor code_of(Code4 kind, at::Device device) {
  if (kind == Code4::nf4) {
    return at::tensor({-1.0F, -0.6961928009986877F, -0.5250730514526367F, -0.39491748809814453F, -0.28444138169288635F,
                       -0.18477343022823334F, -0.09105003625154495F, 0.0F, 0.07958029955625534F, 0.16093020141124725F,
                       0.24611230194568634F, 0.33791524171829224F, 0.44070982933044434F, 0.5626170039176941F,
                       0.7229568362236023F, 1.0F},
                      at::kFloat)
        .to(device);
  }
  return at::tensor({0.0F, 0.0625F, 8.0F, 12.0F, 4.0F, 6.0F, 2.0F, 3.0F, -0.0F, -0.0625F, -8.0F, -12.0F, -4.0F, -6.0F,
                     -2.0F, -3.0F},
                    at::kFloat)
      .div(12.0F)  // here, since GPUs multiply by the reciprocal
      .to(device);
}

/// (256), ascending: the dynamic 8-bit map, which has most of its numbers near zero. Each of seven powers of ten has
/// twice as many steps between 0.1 and 1 as the one below.
[[nodiscard]] inline at::Tensor dynamic_map(at::Device device) {
  // The package rounds to 32 bits after each operation, and its numbers are those of no vector unit. In 64 bits each
  // operation is exact, so that compilers that fuse two round no less often.
  const auto rounded = [](double number) { return static_cast<float>(number); };
  const float first = 0.1F;
  std::vector<float> map{0.0F, 1.0F};
  constexpr int exponents = 7;
  for (int exponent = 0; exponent < exponents; ++exponent) {
    const int steps = 1 << exponent;
    const float step = rounded(static_cast<double>(1.0F - first) / steps);
    const auto boundary = [&](int i) {
      if (i < (steps + 1) / 2) return rounded(double{first} + double{rounded(double{step} * i)});
      return rounded(1.0 - double{rounded(double{step} * (steps - i))});
    };
    const float power = rounded(std::pow(10.0, exponent + 1 - exponents));
    for (int i = 0; i < steps; ++i) {
      const float mean = rounded(double{boundary(i)} + double{boundary(i + 1)}) / 2;
      map.push_back(rounded(double{mean} * double{power}));
      map.push_back(-map.back());
    }
  }
  std::sort(map.begin(), map.end());
  return at::tensor(map, at::TensorOptions(device).dtype(at::kFloat));
}

namespace detail {

/// The midpoints between neighbours of an ascending code: a number belongs to the code between its two.
[[nodiscard]] inline at::Tensor midpoints(const at::Tensor& code) {
  return (code.slice(0, 0, -1) + code.slice(0, 1)) / 2;
}

/// (n) as rows of `size`, zeros appended.
[[nodiscard]] inline at::Tensor blocks(const at::Tensor& flat, int64_t size) {
  const int64_t missing = (size - flat.numel() % size) % size;
  return (missing == 0 ? flat : at::constant_pad_nd(flat, {0, missing})).reshape({-1, size});
}

}  // namespace detail

/// A tensor in 4 bits: two codes a byte, the first in the high half; `absmax` is the largest magnitude of each block.
struct Quantised4 {
  at::Tensor packed;  ///< ((n + 1) / 2, 1) bytes
  at::Tensor absmax;  ///< (blocks), 32-bit
};

/// Numbers per 4-bit block, and per block of double quantisation.
inline constexpr int64_t block_size = 64;
inline constexpr int64_t nested_block_size = 256;

/// Quantises a 16- or 32-bit tensor of any shape.
[[nodiscard]] inline Quantised4 quantise_4bit(const at::Tensor& tensor, Code4 kind) {
  constexpr double tiny = 1e-38;  // of blocks that are all zero
  const at::Tensor flat = tensor.reshape({-1}).to(at::kFloat);
  const int64_t rest = flat.numel() % block_size;
  const at::Tensor rows = detail::blocks(flat, block_size);
  at::Tensor absmax = rows.abs().amax(1);
  at::Tensor scaled = rows * absmax.clamp_min(tiny).reciprocal().unsqueeze(1);
  if (rest != 0) {  // the package divides in the last, shorter block, where it multiplies in the others
    at::Tensor last = absmax.slice(0, -1).clamp_min_(tiny);
    scaled.slice(0, -1).copy_(rows.slice(0, -1) / last);
  }
  scaled = scaled.clamp_(-1, 1).reshape({-1}).slice(0, 0, flat.numel() + flat.numel() % 2);

  const at::Tensor code = code_of(kind, tensor.device());
  const at::Tensor order = code.argsort(/*stable=*/true);  // there are two zeros
  at::Tensor index = at::bucketize(scaled, detail::midpoints(code.index_select(0, order)), /*out_int32=*/true);
  if (kind == Code4::fp4) index = order.index_select(0, index);
  const at::Tensor bytes = index.to(at::kByte).view({-1, 2});
  return {bytes.select(1, 0).bitwise_left_shift(4).bitwise_or(bytes.select(1, 1)).unsqueeze(1), absmax};
}

/// What the codes mean, in `sizes` and `type`. `code` is `code_of(...)`.
[[nodiscard]] inline at::Tensor dequantise_4bit(const at::Tensor& packed, const at::Tensor& absmax,
                                                const at::Tensor& code, at::IntArrayRef sizes, at::ScalarType type) {
  // A byte has two numbers: one look-up for both.
  const at::Tensor pairs = at::stack({code.repeat_interleave(16), code.repeat(16)}, 1);
  const int64_t count = c10::multiply_integers(sizes);
  const at::Tensor values = pairs.index_select(0, packed.reshape({-1}).to(at::kInt)).reshape({-1}).slice(0, 0, count);
  return (detail::blocks(values, block_size) * absmax.unsqueeze(1))
      .reshape({-1})
      .slice(0, 0, count)
      .view(sizes)
      .to(type);
}

/// A tensor in 8 bits, by the dynamic map.
struct Quantised8 {
  at::Tensor codes;   ///< The tensor's shape, bytes.
  at::Tensor absmax;  ///< (blocks), 32-bit
};

/// Quantises block by block, by a map of 256 ascending numbers. The package's CPU kernel looks the nearest number up in
/// a table of 65,536 steps, its GPU kernel finds it exactly; so does this, by the tensor's device.
[[nodiscard]] inline Quantised8 quantise_8bit(const at::Tensor& tensor, const at::Tensor& map,
                                              int64_t size = nested_block_size) {
  const at::Tensor flat = tensor.reshape({-1}).to(at::kFloat);
  const at::Tensor rows = detail::blocks(flat, size);
  const at::Tensor absmax = rows.abs().amax(1);
  at::Tensor scaled = (rows * absmax.reciprocal().unsqueeze(1)).nan_to_num_(0).clamp_(-1, 1);
  at::Tensor codes;
  if (tensor.is_cpu()) {
    constexpr double last = 65535.0;
    const at::Tensor steps = at::arange(last + 1, at::kFloat).mul_(2).div_(last).sub_(1);
    const at::Tensor table = at::bucketize(steps, detail::midpoints(map), /*out_int32=*/true).to(at::kByte);
    const at::Tensor step = scaled.add_(1).mul_(0.5).mul_(last).add_(0.5).to(at::kInt);
    codes = table.index_select(0, step.reshape({-1})).view(rows.sizes());
    codes.masked_fill_((absmax == 0).unsqueeze(1), 0);
  } else {
    codes = at::bucketize(scaled, detail::midpoints(map), /*out_int32=*/true).to(at::kByte);
  }
  return {codes.reshape({-1}).slice(0, 0, flat.numel()).reshape(tensor.sizes()), absmax};
}

[[nodiscard]] inline at::Tensor dequantise_8bit(const at::Tensor& codes, const at::Tensor& absmax,
                                                const at::Tensor& map, at::ScalarType type,
                                                int64_t size = nested_block_size) {
  const at::Tensor values = map.index_select(0, codes.reshape({-1}).to(at::kInt));
  return (detail::blocks(values, size) * absmax.unsqueeze(1))
      .reshape({-1})
      .slice(0, 0, codes.numel())
      .reshape(codes.sizes())
      .to(type);
}

/// A matrix in signed 8 bits, each row by its largest magnitude.
struct Int8Rows {
  at::Tensor codes;     ///< (rows, columns), from -127 to 127
  at::Tensor absmax;    ///< (rows), 32-bit
  at::Tensor outliers;  ///< Indices of columns that were left out, as zeros; undefined without a threshold.
};

/// Quantises the rows of a matrix. Columns in which a magnitude is at least `threshold` are left out, for another
/// product in 16 bits; 0 leaves none out.
[[nodiscard]] inline Int8Rows quantise_int8_rows(const at::Tensor& matrix, double threshold = 0) {
  Int8Rows result;
  at::Tensor kept = matrix;
  if (threshold > 0) {
    const at::Tensor is_outlier = matrix.abs() >= threshold;
    result.outliers = is_outlier.any(0).nonzero().view({-1});
    kept = matrix.masked_fill(is_outlier, 0);
  }
  result.absmax = kept.abs().amax(1).to(at::kFloat);
  result.codes = (kept * result.absmax.reciprocal().mul_(127.0).unsqueeze(1)).round_().nan_to_num_(0).to(at::kChar);
  if (result.outliers.defined()) result.codes.index_fill_(1, result.outliers, 0);
  return result;
}

/// The columns of a matrix in 8 bits, with the same elements left out; `absmax` is (columns).
[[nodiscard]] inline Int8Rows quantise_int8_columns(const at::Tensor& matrix, double threshold = 0) {
  const at::Tensor kept = threshold > 0 ? matrix.masked_fill(matrix.abs() >= threshold, 0) : matrix;
  const at::Tensor absmax = kept.abs().amax(0).to(at::kFloat);
  return {(kept.mul(127.0) / absmax.unsqueeze(0)).round_().nan_to_num_(0).to(at::kChar), absmax, {}};
}

/// Rows of codes as numbers.
[[nodiscard]] inline at::Tensor dequantise_int8_rows(const at::Tensor& codes, const at::Tensor& absmax) {
  return codes * absmax.view({-1, 1}) * 7.874015718698502e-3;  // 1 / 127
}

/// The integer product of a (m, k) and the transpose of b (n, k), exact, as 32-bit integers.
[[nodiscard]] inline at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b) {
  // Not on CPUs, where the operator overflows without the right instructions.
  const bool has_kernel = a.is_cuda() && a.size(0) > 16 && a.size(1) % 8 == 0 && b.size(0) % 8 == 0;
  if (has_kernel) return at::_int_mm(a.contiguous(), b.t());
  constexpr int64_t exact_in_32_bits = 1040;  // products of 127 x 127 that add up to less than 2^24
  const auto type = a.size(1) <= exact_in_32_bits ? at::kFloat : at::kDouble;
  return a.to(type).mm(b.to(type).t()).to(at::kInt);
}

/// The product of two quantised matrices, a (m, k) by rows and b (n, k) by rows, as numbers of `type`, plus `bias` (n).
[[nodiscard]] inline at::Tensor scaled_int8_product(const at::Tensor& a, const at::Tensor& absmax_a,
                                                    const at::Tensor& b, const at::Tensor& absmax_b,
                                                    const std::optional<at::Tensor>& bias, at::ScalarType type) {
  constexpr double both = 6.200124e-05;  // 1 / 127^2
  at::Tensor out = int8_product(a, b) * (absmax_a.unsqueeze(1) * absmax_b.unsqueeze(0)) * both;
  if (bias) out = out + *bias;
  return out.to(type);
}

}  // namespace fabric::quantisation
