// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include <c10/core/ScalarType.h>

namespace fabric::detail {

/// What PyTorch and safetensors call a dtype; empty where they have no name for it. Dtypes without a storage class of
/// their own are stored as `UntypedStorage`, the dtype beside it.
struct DtypeName {
  at::ScalarType dtype;
  std::string_view name;
  std::string_view storage;
  std::string_view safetensors;
};

inline constexpr DtypeName dtype_names[] = {
    {at::kFloat, "float32", "FloatStorage", "F32"},
    {at::kDouble, "float64", "DoubleStorage", "F64"},
    {at::kHalf, "float16", "HalfStorage", "F16"},
    {at::kBFloat16, "bfloat16", "BFloat16Storage", "BF16"},
    {at::kLong, "int64", "LongStorage", "I64"},
    {at::kInt, "int32", "IntStorage", "I32"},
    {at::kShort, "int16", "ShortStorage", "I16"},
    {at::kChar, "int8", "CharStorage", "I8"},
    {at::kByte, "uint8", "ByteStorage", "U8"},
    {at::kBool, "bool", "BoolStorage", "BOOL"},
    {at::kComplexFloat, "complex64", "ComplexFloatStorage", "C64"},
    {at::kComplexDouble, "complex128", "ComplexDoubleStorage", ""},
    {at::kFloat8_e4m3fn, "float8_e4m3fn", "", "F8_E4M3"},
    {at::kFloat8_e5m2, "float8_e5m2", "", "F8_E5M2"},
    {at::kFloat8_e4m3fnuz, "float8_e4m3fnuz", "", ""},
    {at::kFloat8_e5m2fnuz, "float8_e5m2fnuz", "", ""},
    {at::kFloat8_e8m0fnu, "float8_e8m0fnu", "", "F8_E8M0"},
    {at::kUInt16, "uint16", "", "U16"},
    {at::kUInt32, "uint32", "", "U32"},
    {at::kUInt64, "uint64", "", "U64"},
};

/// The entry of which `member` is `name`; null if there is none.
[[nodiscard]] constexpr const DtypeName* find_dtype(std::string_view DtypeName::*member, std::string_view name) {
  if (name.empty()) return nullptr;
  for (const DtypeName& entry : dtype_names) {
    if (entry.*member == name) return &entry;
  }
  return nullptr;
}
[[nodiscard]] constexpr const DtypeName* find_dtype(at::ScalarType dtype) {
  for (const DtypeName& entry : dtype_names) {
    if (entry.dtype == dtype) return &entry;
  }
  return nullptr;
}

}  // namespace fabric::detail
