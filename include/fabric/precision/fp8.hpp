// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include <ATen/ops/_scaled_mm.h>
#include <torch/types.h>

#include "fabric/error.hpp"

namespace fabric {

/// The FP8 types of a training step (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
enum class Fp8Format : std::uint8_t {
  hybrid,  ///< E4M3 (largest 448) in forward, E5M2 (largest 57,344) for gradients.
  e4m3,    ///< E4M3 for both.
};

/// How the history of largest magnitudes gives the one that a scale is made from.
enum class AmaxCompute : std::uint8_t { max, most_recent };

/// Delayed scaling: a tensor is scaled by what its largest magnitudes were in the steps before. Knobs, defaults and
/// arithmetic are those of NVIDIA Transformer Engine's `DelayedScaling`.
struct Fp8Recipe {
  int margin = 0;                                    ///< Scales are 2^margin smaller than what would just fit.
  int interval = 1;                                  ///< Steps between new scales.
  int amax_history_len = 1024;                       ///< Steps that are remembered.
  AmaxCompute amax_compute_algo = AmaxCompute::max;  ///< Of the whole history, or of the last step.
  Fp8Format fp8_format = Fp8Format::hybrid;          ///< Types in forward and backward.
  bool reduce_amax = true;                           ///< Magnitudes are the largest over all ranks.
};

namespace fp8 {

/// The largest finite number of an FP8 type. E4M3 saturates when a number beyond it is converted, E5M2 becomes
/// infinite.
[[nodiscard]] constexpr double largest(at::ScalarType type) { return type == at::kFloat8_e5m2 ? 57344.0 : 448.0; }

/// The types of input and weight, and of gradients.
[[nodiscard]] constexpr at::ScalarType forward_type(const Fp8Recipe& /*recipe*/) { return at::kFloat8_e4m3fn; }
[[nodiscard]] constexpr at::ScalarType backward_type(const Fp8Recipe& recipe) {
  return recipe.fp8_format == Fp8Format::e4m3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
}

/// Throws fabric::Error for knobs that mean nothing.
inline void check(const Fp8Recipe& recipe) {
  std::string problems;
  if (recipe.interval < 1) problems += " interval is " + std::to_string(recipe.interval) + ", but must be at least 1;";
  if (recipe.amax_history_len < 1) {
    problems += " amax_history_len is " + std::to_string(recipe.amax_history_len) + ", but must be at least 1;";
  }
  if (!problems.empty()) throw Error("fabric: FP8 recipe:" + problems.substr(0, problems.size() - 1));
}

/// `tensor` times `scale` (one element, 32-bit), saturated, as FP8.
[[nodiscard]] inline at::Tensor quantise(const at::Tensor& tensor, const at::Tensor& scale, at::ScalarType type) {
  const double bound = largest(type);
  // A factor that has a dimension brings 16-bit numbers to 32 bits in the same pass.
  return tensor.mul(scale.to(at::kFloat).reshape({1})).clamp_(-bound, bound).to(type);
}

namespace detail {

/// `matrix` with rows and columns of zeros appended up to multiples of 16, contiguous.
[[nodiscard]] inline at::Tensor padded(const at::Tensor& matrix) {
  const auto up = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t rows = up(matrix.size(0));
  const int64_t columns = up(matrix.size(1));
  if (rows == matrix.size(0) && columns == matrix.size(1)) return matrix.contiguous();
  at::Tensor larger = at::zeros({rows, columns}, matrix.options().dtype(at::kByte)).view(matrix.scalar_type());
  larger.narrow(0, 0, matrix.size(0)).narrow(1, 0, matrix.size(1)).copy_(matrix);
  return larger;
}

}  // namespace detail

/// Which multiplication `product` uses.
enum class Kernel : std::uint8_t {
  scaled_mm,  ///< `at::_scaled_mm`, on tensor cores. The CPU has it too, for tests: 1,000 times slower than emulation.
  emulation,  ///< 32-bit products of the FP8 numbers, which are exact in 32 bits.
};
[[nodiscard]] inline Kernel kernel_for(at::Device device) {
  return device.is_cuda() ? Kernel::scaled_mm : Kernel::emulation;
}

/// a (m, k) times the transpose of b (n, k), both FP8, times both inverse scales (one element each), plus `bias` (n) if
/// there is one, rounded to `type` once. `fast` lets tensor cores add up with fewer bits, as forward may. For
/// scaled_mm sizes that are no multiples of 16 are padded with zeros.
[[nodiscard]] inline at::Tensor product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& inverse_a,
                                        const at::Tensor& inverse_b, const std::optional<at::Tensor>& bias,
                                        at::ScalarType type, bool fast, Kernel kernel) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (kernel == Kernel::emulation) {
    at::Tensor out = a.to(at::kFloat).mm(b.to(at::kFloat).t()).mul_(inverse_a * inverse_b);
    if (bias) out.add_(*bias);
    return out.to(type);
  }
  const int64_t m = a.size(0);
  const int64_t n = b.size(0);
  at::Tensor out = at::_scaled_mm(detail::padded(a), detail::padded(b).t(), inverse_a, inverse_b, /*bias=*/{},
                                  /*scale_result=*/{}, bias ? at::kFloat : type, fast);
  // A view would be one for autograd too, and then refuse to be changed in place.
  if (out.size(0) != m || out.size(1) != n) out = out.narrow(0, 0, m).narrow(1, 0, n).clone();
  return bias ? out.add_(*bias).to(type) : out;
}

/// One step of delayed scaling for many tensors at once. `history` (tensors, length) has the magnitudes of the step
/// that ends in column 0; `scale` (tensors) and `bound` (tensors), the largest number of each tensor's type. Afterwards
/// column 0 is zero, for the next step. `step` (one integer) is this step's number from 1, looked at if the interval is
/// more than 1.
/// A magnitude that is not finite is forgotten, since under `max` it would stop all scaling for the whole history.
inline void update_scales(at::Tensor& history, at::Tensor& scale, const at::Tensor& bound, const at::Tensor& step,
                          const Fp8Recipe& recipe) {
  at::Tensor current = history.select(1, 0);
  current.copy_(at::where(at::isfinite(current), current, at::zeros_like(current)));
  const at::Tensor amax = recipe.amax_compute_algo == AmaxCompute::max ? history.amax(1) : current.clone();
  at::Tensor fresh = bound.div(amax).div_(std::ldexp(1.0, recipe.margin));
  constexpr double largest_float = std::numeric_limits<float>::max();
  fresh = at::where(at::isinf(fresh), at::full_like(fresh, largest_float), fresh);
  at::Tensor take = amax > 0;
  if (recipe.interval > 1) take = take.logical_and(step.remainder(recipe.interval).eq(0));
  scale = at::where(take, fresh, scale);
  history = history.roll(-1, 1);
  history.select(1, 0).zero_();
}

}  // namespace fp8
}  // namespace fabric
