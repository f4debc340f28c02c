// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <exception>
#include <iterator>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>

#include <boost/hana/accessors.hpp>
#include <boost/hana/concept/struct.hpp>
#include <boost/hana/for_each.hpp>
#include <boost/hana/members.hpp>
#include <boost/hana/pair.hpp>
#include <boost/hana/tuple.hpp>
#include <torch/data/example.h>
#include <torch/ordered_dict.h>

namespace fabric {

/// A "tree" is a tensor, or a container of trees: a range, map, tuple, pair, optional, variant, `torch::OrderedDict`,
/// `torch::data::Example`, a structure adapted for Boost.Hana, a plain aggregate of at most twelve members (no C
/// arrays), or a type that `tree::Members` is specialised for. Numbers, enums, texts, devices and dtypes inside are
/// left alone.
namespace tree {

template <class T>
using Bare = std::remove_cvref_t<T>;

/// Holds no tensor and is passed over.
template <class T>
concept Leaf = std::is_arithmetic_v<Bare<T>> || std::is_enum_v<Bare<T>> || std::is_empty_v<Bare<T>> ||
    std::convertible_to<T, std::string_view> || std::same_as<Bare<T>, torch::Device> ||
    std::same_as<Bare<T>, c10::Scalar> || std::same_as<Bare<T>, caffe2::TypeMeta> ||
    std::same_as<Bare<T>, std::nullptr_t>;

template <class T>
concept Range = requires(T& value) {
  std::begin(value);
  std::end(value);
};

template <class T>
concept TupleLike = !Range<Bare<T>> && requires {
  std::tuple_size<Bare<T>>::value;
};

template <class T>
concept OptionalLike = requires(Bare<T>& value) {
  value.has_value();
  *value;
  value.reset();
};

template <class T>
inline constexpr bool is_example = false;
template <class Data, class Target>
inline constexpr bool is_example<torch::data::Example<Data, Target>> = true;

template <class T>
concept DictionaryItem = requires(T& value) {
  value.key();
  value.value();
};

template <class T>
inline constexpr bool is_variant = false;
template <class... Ts>
inline constexpr bool is_variant<std::variant<Ts...>> = true;

/// The hook for types that are no tree by themselves, such as another library's. A specialisation has
/// `static void for_each(auto& value, auto&& visit)`, which calls `visit` with each member that is a tree, in order;
/// with none, where the type holds no tensors. `value` may be const.
template <class T>
struct Members;

template <class T>
concept HasMembers = requires {
  sizeof(Members<Bare<T>>);
};

struct AnyField {
  /// Never called; a mere declaration makes clang++ ask for a definition where T has no linkage.
  template <class T>
  operator T() const {  // NOLINT(google-explicit-constructor): stands for any member in an initialiser list
    std::terminate();
  }
};

template <class T, std::size_t... i>
constexpr bool takes_fields(std::index_sequence<i...> /*indices*/) {
  return requires { T{(static_cast<void>(i), AnyField{})...}; };
}

/// From the top down, since members that cannot be left out, for want of a default constructor, forbid smaller numbers.
template <class T, std::size_t n = 13>
constexpr std::size_t count_fields() {
  if constexpr (takes_fields<T>(std::make_index_sequence<n>())) {
    static_assert(n <= 12,
                  "fabric: a structure of tensors has at most twelve members; adapt it with BOOST_HANA_ADAPT_STRUCT");
    static_assert(n > 0, "fabric: cannot see the members of this structure; adapt it with BOOST_HANA_ADAPT_STRUCT");
    return n;
  } else if constexpr (n > 0) {
    return count_fields<T, n - 1>();
  } else {
    static_assert(n > 0, "fabric: cannot see the members of this structure; adapt it with BOOST_HANA_ADAPT_STRUCT");
    return n;
  }
}

/// The members of an aggregate as a tuple of references.
template <class T>
constexpr auto fields(T& value) {
  constexpr std::size_t n = count_fields<std::remove_const_t<T>>();
  if constexpr (n == 1) {
    auto& [a] = value;
    return std::tie(a);
  } else if constexpr (n == 2) {
    auto& [a, b] = value;
    return std::tie(a, b);
  } else if constexpr (n == 3) {
    auto& [a, b, c] = value;
    return std::tie(a, b, c);
  } else if constexpr (n == 4) {
    auto& [a, b, c, d] = value;
    return std::tie(a, b, c, d);
  } else if constexpr (n == 5) {
    auto& [a, b, c, d, e] = value;
    return std::tie(a, b, c, d, e);
  } else if constexpr (n == 6) {
    auto& [a, b, c, d, e, f] = value;
    return std::tie(a, b, c, d, e, f);
  } else if constexpr (n == 7) {
    auto& [a, b, c, d, e, f, g] = value;
    return std::tie(a, b, c, d, e, f, g);
  } else if constexpr (n == 8) {
    auto& [a, b, c, d, e, f, g, h] = value;
    return std::tie(a, b, c, d, e, f, g, h);
  } else if constexpr (n == 9) {
    auto& [a, b, c, d, e, f, g, h, i] = value;
    return std::tie(a, b, c, d, e, f, g, h, i);
  } else if constexpr (n == 10) {
    auto& [a, b, c, d, e, f, g, h, i, j] = value;
    return std::tie(a, b, c, d, e, f, g, h, i, j);
  } else if constexpr (n == 11) {
    auto& [a, b, c, d, e, f, g, h, i, j, k] = value;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k);
  } else if constexpr (n == 12) {
    auto& [a, b, c, d, e, f, g, h, i, j, k, l] = value;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k, l);
  }
}

template <class T>
inline constexpr bool cannot_be_searched = false;

/// Calls `visit(tensor)` for each tensor in `value`, in order. The tensors are const if `value` is.
template <class T, class Visit>
constexpr void for_each(T& value, Visit&& visit) {
  if constexpr (std::is_base_of_v<at::Tensor, Bare<T>>) {
    visit(value);
  } else if constexpr (HasMembers<T>) {
    Members<Bare<T>>::for_each(value, [&](auto& member) { for_each(member, visit); });
  } else if constexpr (Leaf<T>) {
  } else if constexpr (is_variant<Bare<T>>) {
    std::visit([&](auto& alternative) { for_each(alternative, visit); }, value);
  } else if constexpr (boost::hana::Struct<Bare<T>>::value) {
    boost::hana::for_each(boost::hana::accessors<Bare<T>>(),
                          [&](auto member) { for_each(boost::hana::second(member)(value), visit); });
  } else if constexpr (Range<T>) {
    for (auto&& item : value) for_each(item, visit);
  } else if constexpr (TupleLike<T>) {
    std::apply([&](auto&... items) { (for_each(items, visit), ...); }, value);
  } else if constexpr (OptionalLike<T>) {
    if (value.has_value()) for_each(*value, visit);
  } else if constexpr (is_example<Bare<T>>) {
    for_each(value.data, visit);
    if constexpr (requires { value.target; }) for_each(value.target, visit);
  } else if constexpr (DictionaryItem<T>) {
    for_each(value.value(), visit);
  } else if constexpr (std::is_aggregate_v<Bare<T>>) {
    auto members = fields(value);
    std::apply([&](auto&... items) { (for_each(items, visit), ...); }, members);
  } else {
    static_assert(
        cannot_be_searched<T>,
        "fabric: cannot look for tensors in this type: use a tensor, a container, a tuple or an aggregate of them, "
        "or adapt the type with BOOST_HANA_ADAPT_STRUCT, or specialise fabric::tree::Members for it");
  }
}

/// A copy of `value` in which `change(tensor)` stands for each tensor. Undefined tensors stay. (A text literal becomes
/// a pointer.)
template <class T, class Change>
[[nodiscard]] std::decay_t<T> map(T&& value, Change&& change) {
  std::decay_t<T> result = std::forward<T>(value);
  for_each(result, [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = change(std::as_const(tensor));
  });
  return result;
}

}  // namespace tree
}  // namespace fabric
