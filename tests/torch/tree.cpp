// SPDX-License-Identifier: Apache-2.0
#include "fabric/tree.hpp"

#include <array>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <boost/hana/adapt_struct.hpp>

#include "support/catch.hpp"

namespace {

namespace tree = fabric::tree;

at::Tensor number(double value) { return torch::tensor(value); }

/// The tensors of a tree as numbers, in the order of the visit.
template <class T>
std::vector<double> numbers(T&& value) {
  std::vector<double> found;
  tree::for_each(value,
                 [&](const at::Tensor& tensor) { found.push_back(tensor.defined() ? tensor.item<double>() : -1); });
  return found;
}

/// Ten times each tensor.
template <class T>
auto tenfold(T&& value) {
  return tree::map(std::forward<T>(value), [](const at::Tensor& tensor) { return tensor * 10; });
}

using Numbers = std::vector<double>;

enum class Color { red };
struct Nothing {};

struct Output {
  at::Tensor loss;
  std::vector<at::Tensor> hidden;
  int step = 0;
  std::pair<std::string, at::Tensor> named;
};
struct Nested {
  Output first;
  std::optional<Output> second;
  std::string note;
};
struct Twelve {
  at::Tensor a, b, c, d, e, f, g, h, i, j, k, l;
};

class Private {  // no aggregate: only its adaption says what is inside
 public:
  Private() = default;
  Private(at::Tensor first, at::Tensor second) : left(std::move(first)), right(std::move(second)) {}
  at::Tensor left, right;
};

/// As from another library: what is inside is reached by functions alone.
class Foreign {
 public:
  explicit Foreign(at::Tensor tensor, std::vector<at::Tensor> more = {})
      : tensor_(std::move(tensor)), more_(std::move(more)) {}
  [[nodiscard]] const at::Tensor& tensor() const { return tensor_; }
  void set_tensor(at::Tensor tensor) { tensor_ = std::move(tensor); }
  [[nodiscard]] const std::vector<at::Tensor>& more() const { return more_; }
  std::vector<at::Tensor>& more() { return more_; }

 private:
  at::Tensor tensor_;
  std::vector<at::Tensor> more_;
};

/// Neither an aggregate nor anything with tensors.
class Clock {
 public:
  explicit Clock(int now) : now_(now) {}
  [[nodiscard]] int now() const { return now_; }

 private:
  int now_;
};

}  // namespace

BOOST_HANA_ADAPT_STRUCT(Private, right, left);

template <>
struct fabric::tree::Members<Foreign> {
  template <class Visit>
  static void for_each(const Foreign& value, Visit&& visit) {
    visit(value.tensor());
    visit(value.more());
  }
  template <class Visit>
  static void for_each(Foreign& value, Visit&& visit) {
    at::Tensor tensor = value.tensor();
    visit(tensor);
    value.set_tensor(std::move(tensor));
    visit(value.more());
  }
};

template <>
struct fabric::tree::Members<Clock> {
  static void for_each(const Clock& /*value*/, auto&& /*visit*/) {}
};

TEST_CASE("[issue-3.3] a tree is visited in order, whatever it is made of") {
  CHECK(numbers(number(1)) == Numbers{1});
  CHECK(numbers(std::vector{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(std::list{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(std::deque{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(std::array{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(std::pair{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(std::tuple{number(1), number(2), number(3)}) == Numbers{1, 2, 3});
  CHECK(numbers(std::tuple<>{}).empty());
  CHECK(numbers(std::optional{number(1)}) == Numbers{1});
  CHECK(numbers(std::optional<at::Tensor>{}).empty());
  CHECK(numbers(std::map<std::string, at::Tensor>{{"b", number(2)}, {"a", number(1)}}) == Numbers{1, 2});
  CHECK(numbers(std::unordered_map<int, at::Tensor>{{7, number(1)}}) == Numbers{1});
  CHECK(numbers(torch::data::Example<>{number(1), number(2)}) == Numbers{1, 2});
  CHECK(numbers(torch::data::TensorExample{number(1)}) == Numbers{1});
  CHECK(numbers(std::vector<torch::data::Example<>>{{number(1), number(2)}, {number(3), number(4)}}) ==
        Numbers{1, 2, 3, 4});

  torch::OrderedDict<std::string, at::Tensor> dictionary;
  dictionary.insert("z", number(1));
  dictionary.insert("a", number(2));
  CHECK(numbers(dictionary) == Numbers{1, 2});

  const std::map<std::string, std::vector<std::tuple<at::Tensor, std::optional<at::Tensor>>>> deep{
      {"x", {{number(1), number(2)}, {number(3), std::nullopt}}}};
  CHECK(numbers(deep) == Numbers{1, 2, 3});
}

TEST_CASE("[issue-3.3] the members of plain structures are found, up to twelve") {
  const Output output{number(1), {number(2), number(3)}, 4, {"name", number(5)}};
  CHECK(numbers(output) == Numbers{1, 2, 3, 5});
  CHECK(numbers(Nested{output, output, "text"}) == Numbers{1, 2, 3, 5, 1, 2, 3, 5});
  const auto t = number(1);
  CHECK(numbers(Twelve{t, t, t, t, t, t, t, t, t, t, t, t}).size() == 12);
}

TEST_CASE("[issue-3.3] a structure adapted for Hana is visited by its adaption") {
  CHECK(numbers(Private{number(1), number(2)}) == Numbers{2, 1});
}

TEST_CASE("[issue-5.8] a hook says what is in a type that says nothing by itself") {
  const Foreign before(number(1), {number(2), number(3)});
  CHECK(numbers(before) == Numbers{1, 2, 3});
  CHECK(numbers(tenfold(before)) == Numbers{10, 20, 30});
  CHECK(numbers(before) == Numbers{1, 2, 3});
  struct Batch {
    std::map<std::string, std::vector<Foreign>> parts;
    Clock clock;
    std::optional<Private> adapted;
  };
  const Batch batch{{{"a", {before}}}, Clock(7), Private(number(4), number(5))};
  CHECK(numbers(batch) == Numbers{1, 2, 3, 5, 4});
  const Batch after = tenfold(batch);
  CHECK(numbers(after) == Numbers{10, 20, 30, 50, 40});
  CHECK(after.clock.now() == 7);
}

TEST_CASE("[issue-3.3] the alternative that a variant holds is visited") {
  using Choice = std::variant<int, at::Tensor, std::vector<at::Tensor>>;
  CHECK(numbers(Choice{1}).empty());
  CHECK(numbers(Choice{number(1)}) == Numbers{1});
  CHECK(numbers(Choice{std::vector{number(1), number(2)}}) == Numbers{1, 2});
}

TEST_CASE("[issue-3.3] numbers, texts, enums and devices are passed over and kept") {
  const auto before = std::tuple{1,        2.5,         true,      'c',     std::string("text"),  "literal",
                                 Color{},  at::kDouble, Nothing{}, nullptr, torch::Device("cpu"), c10::Scalar(1),
                                 number(1)};
  CHECK(numbers(before) == Numbers{1});
  const auto after = tenfold(before);
  CHECK(std::get<1>(after) == 2.5);
  CHECK(std::get<4>(after) == "text");
  CHECK(std::get<at::Tensor>(after).item<double>() == 10);
}

TEST_CASE("[issue-3.3] map makes a new tree of the same type and leaves the old one") {
  const Nested before{{number(1), {number(2)}, 3, {"four", number(4)}}, std::nullopt, "note"};
  const Nested after = tenfold(before);
  CHECK(numbers(after) == Numbers{10, 20, 40});
  CHECK(numbers(before) == Numbers{1, 2, 4});
  CHECK(after.first.step == 3);
  CHECK(after.first.named.first == "four");
  CHECK_FALSE(after.second.has_value());
  CHECK(after.note == "note");

  static_assert(
      std::is_same_v<decltype(tenfold(std::declval<const std::vector<at::Tensor>&>())), std::vector<at::Tensor>>);
  CHECK(numbers(tenfold(std::variant<int, at::Tensor>{number(1)})) == Numbers{10});
  CHECK(numbers(tenfold(torch::data::Example<>{number(1), number(2)})) == Numbers{10, 20});
  CHECK(numbers(tenfold(Private{number(1), number(2)})) == Numbers{20, 10});

  torch::OrderedDict<std::string, at::Tensor> dictionary;
  dictionary.insert("key", number(1));
  CHECK(tenfold(dictionary)["key"].item<double>() == 10);
  CHECK(dictionary["key"].item<double>() == 1);
}

TEST_CASE("[issue-3.3] undefined tensors are visited, but map leaves them undefined") {
  const std::vector<at::Tensor> before{at::Tensor(), number(1)};
  CHECK(numbers(before) == Numbers{-1, 1});
  CHECK(numbers(tenfold(before)) == Numbers{-1, 10});
}

TEST_CASE("[issue-3.3] the tensors of a const tree are const, those of another can be replaced") {
  std::pair<at::Tensor, int> tree{number(1), 2};
  tree::for_each(tree, [](auto& tensor) {
    static_assert(!std::is_const_v<std::remove_reference_t<decltype(tensor)>>);
    tensor = number(5);
  });
  CHECK(numbers(tree) == Numbers{5});
  tree::for_each(std::as_const(tree),
                 [](auto& tensor) { static_assert(std::is_const_v<std::remove_reference_t<decltype(tensor)>>); });
}
