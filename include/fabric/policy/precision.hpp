// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "fabric/policy/text.hpp"

namespace fabric {

/// A floating-point type, without naming LibTorch's.
enum class Scalar : std::uint8_t { f16, bf16, f32, f64 };

/// How numbers are stored and computed.
enum class PrecisionKind : std::uint8_t {
  f32,
  f64,
  f16,
  bf16,
  f16_mixed,
  bf16_mixed,
  transformer_engine,
  bitsandbytes,
  custom,
};

/// The quantisation that `Bitsandbytes` applies to the weights of linear layers.
enum class BitsandbytesMode : std::uint8_t { nf4, nf4_dq, fp4, fp4_dq, int8, int8_training };

/// What is known of a precision without LibTorch.
struct PrecisionFacts {
  Name name;  ///< The policy's own name, for messages: "BF16Mixed".
  Name flag;  ///< The value of `--precision` that means it; empty for plugins.
  PrecisionKind kind = PrecisionKind::custom;
  Scalar parameters = Scalar::f32;                        ///< What the weights are stored in.
  Scalar compute = Scalar::f32;                           ///< What matrix products are computed in.
  BitsandbytesMode quantisation = BitsandbytesMode::nf4;  ///< Only for `bitsandbytes`.

  friend constexpr bool operator==(const PrecisionFacts&, const PrecisionFacts&) = default;
};

/// Does the precision compute in another type than it stores, by autocast?
[[nodiscard]] constexpr bool is_mixed(const PrecisionFacts& p) {
  return p.kind == PrecisionKind::f16_mixed || p.kind == PrecisionKind::bf16_mixed;
}

/// A precision policy is an empty type with `static constexpr PrecisionFacts facts`.
template <class P>
concept PrecisionPolicy = std::is_empty_v<P> && requires {
  { P::facts } -> std::convertible_to<PrecisionFacts>;
};

/// 32-bit floats throughout.
struct F32 {
  static constexpr PrecisionFacts facts{.name = "F32", .flag = "32-true", .kind = PrecisionKind::f32};
};

/// 64-bit floats throughout.
struct F64 {
  static constexpr PrecisionFacts facts{
      .name = "F64", .flag = "64-true", .kind = PrecisionKind::f64, .parameters = Scalar::f64, .compute = Scalar::f64};
};

/// IEEE half floats throughout, weights included.
struct F16 {
  static constexpr PrecisionFacts facts{
      .name = "F16", .flag = "16-true", .kind = PrecisionKind::f16, .parameters = Scalar::f16, .compute = Scalar::f16};
};

/// bfloat16 throughout, weights included.
struct BF16 {
  static constexpr PrecisionFacts facts{.name = "BF16",
                                        .flag = "bf16-true",
                                        .kind = PrecisionKind::bf16,
                                        .parameters = Scalar::bf16,
                                        .compute = Scalar::bf16};
};

/// 32-bit weights, half-float matrix products by autocast, gradients scaled
/// (Micikevicius et al., "Mixed Precision Training", ICLR 2018).
struct F16Mixed {
  static constexpr PrecisionFacts facts{
      .name = "F16Mixed", .flag = "16-mixed", .kind = PrecisionKind::f16_mixed, .compute = Scalar::f16};
};

/// 32-bit weights, bfloat16 matrix products by autocast.
struct BF16Mixed {
  static constexpr PrecisionFacts facts{
      .name = "BF16Mixed", .flag = "bf16-mixed", .kind = PrecisionKind::bf16_mixed, .compute = Scalar::bf16};
};

/// FP8 matrix products with delayed scaling; weights in `weights` (BF16 or F16).
template <class Weights = BF16>
struct TransformerEngine {
  static_assert(std::is_same_v<Weights, BF16> || std::is_same_v<Weights, F16>,
                "fabric: TransformerEngine keeps its weights in BF16 or F16");
  static constexpr PrecisionFacts facts{
      .name = std::is_same_v<Weights, F16> ? "TransformerEngine<F16>" : "TransformerEngine<BF16>",
      .flag = std::is_same_v<Weights, F16> ? "transformer-engine-float16" : "transformer-engine",
      .kind = PrecisionKind::transformer_engine,
      .parameters = Weights::facts.parameters,
      .compute = Weights::facts.parameters};
};

/// Does the mode keep 8 bits of a weight? The others keep 4.
[[nodiscard]] constexpr bool is_int8(BitsandbytesMode mode) {
  return mode == BitsandbytesMode::int8 || mode == BitsandbytesMode::int8_training;
}

/// Quantised weights for linear layers (Dettmers et al., "QLoRA", NeurIPS 2023; "LLM.int8()", NeurIPS 2022). Everything
/// else is stored and computed in `Compute`: the int8 modes work in F16 only, the 4-bit ones in BF16 unless F16 is
/// given.
template <BitsandbytesMode mode, class Compute = std::conditional_t<is_int8(mode), F16, BF16>>
struct Bitsandbytes {
  static_assert(std::is_same_v<Compute, F16> || (std::is_same_v<Compute, BF16> && !is_int8(mode)),
                "fabric: Bitsandbytes computes in F16 or BF16, and its int8 modes in F16 only");
  static constexpr PrecisionFacts facts{.name = "Bitsandbytes",
                                        .flag = "",
                                        .kind = PrecisionKind::bitsandbytes,
                                        .parameters = Compute::facts.parameters,
                                        .compute = Compute::facts.parameters,
                                        .quantisation = mode};
};

static_assert(PrecisionPolicy<F32> && PrecisionPolicy<TransformerEngine<F16>> &&
              PrecisionPolicy<Bitsandbytes<BitsandbytesMode::int8>>);

}  // namespace fabric
