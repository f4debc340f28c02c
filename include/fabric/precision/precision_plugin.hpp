// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "fabric/policy/precision.hpp"
#include "fabric/tree.hpp"

namespace fabric {

/// What a precision policy does with LibTorch. A specialisation has
/// - `convert_module(module)`: brings parameters and floating-point buffers to the dtype that they are stored in;
/// - `convert_input(tree)`, `convert_output(tree)`: what goes into and comes out of a module's forward;
/// - `ForwardContext`, made from a device type: alive while forward runs;
/// - `InitContext`, default-constructible: alive while a module is made;
/// - `has_scaler`: a `GradScaler` scales the loss before backward and unscales the gradients before they are used;
/// and if it needs them
/// - `Options`, default-constructible: what may be tuned at run time, as `Fabric::Options::precision`. A
///   `convert_module(module, options, world)` takes them and the processes that train together;
/// - `after_step()`: an optimizer has changed the weights.
template <class P>
class PrecisionPlugin;

/// Is there code for this precision yet?
template <class P>
concept HasPrecisionPlugin = requires {
  sizeof(PrecisionPlugin<P>);
};

/// What may be tuned of a precision that has nothing to tune.
struct NoOptions {};

/// The LibTorch dtype of a `Scalar`.
[[nodiscard]] constexpr at::ScalarType dtype_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::f16: return at::kHalf;
    case Scalar::bf16: return at::kBFloat16;
    case Scalar::f32: return at::kFloat;
    case Scalar::f64: return at::kDouble;
  }
  return at::kFloat;
}

/// A guard that does nothing and costs nothing.
struct NoContext {
  constexpr NoContext() = default;
  constexpr explicit NoContext(at::DeviceType /*device*/) {}
  ~NoContext() {}  // not trivial, so that `auto guard = ...` is not an unused variable
  NoContext(const NoContext&) = delete;
  NoContext& operator=(const NoContext&) = delete;
};

namespace detail {

/// A tree with its real floating-point tensors cast to `dtype`; the others, and those that have it already, are shared.
template <class T>
[[nodiscard]] auto cast_floats(T&& value, at::ScalarType dtype) {
  return tree::map(std::forward<T>(value), [dtype](const at::Tensor& tensor) {
    return at::isFloatingType(tensor.scalar_type()) ? tensor.to(dtype) : tensor;
  });
}

/// `Plugin::Options`, or none.
template <class Plugin>
struct OptionsOf {
  using type = NoOptions;
};
template <class Plugin>
requires requires { typename Plugin::Options; }
struct OptionsOf<Plugin> {
  using type = typename Plugin::Options;
};

inline at::ScalarType default_dtype() { return c10::typeMetaToScalarType(c10::get_default_dtype()); }

}  // namespace detail
}  // namespace fabric
