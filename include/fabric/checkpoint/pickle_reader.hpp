// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "fabric/checkpoint/dtypes.hpp"
#include "fabric/checkpoint/utf8.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/checkpoint/zip.hpp"

namespace fabric::detail {

/// Reads what `torch.save` pickled: protocols 2 to 5, and of Python's objects those alone that
/// `torch.load(weights_only=True)` allows and a `Value` can hold. Nothing in a pickle is ever executed: a name in it is
/// compared with a list, never looked up.
///
/// Throws DamagedCheckpoint for everything else, and for tensors that do not lie inside their storage. Memory and depth
/// are bounded by the size of the pickle, whatever stands in it.
class PickleReader {
 public:
  /// The bytes of the storage with that key; throws if there are none.
  using Storages = std::function<at::Storage(const std::string& key)>;

  /// The names of classes whose objects are read as what they were made from: {"class": its name, "arguments": what it
  /// was called with, "state": its attributes}. A dict with such objects as keys becomes a list of pairs.
  using Classes = std::span<const std::string_view>;

  PickleReader(std::string_view pickle, std::string path, Storages storages, Classes classes = {})
      : rest_(pickle),
        size_(pickle.size()),
        budget_(most_expansion * pickle.size() + most_expansion),
        path_(std::move(path)),
        storages_(std::move(storages)),
        classes_(classes) {}

  [[nodiscard]] Value read() {
    while (step()) {
    }
    return to_value(*pop(), 0);
  }

  /// What follows the pickle.
  [[nodiscard]] std::string_view rest() const { return rest_; }

 private:
  enum class Kind : std::uint8_t {
    none,
    boolean,
    integer,
    real,
    text,
    list,
    tuple,
    dict,
    global,
    storage,
    tensor,
    object,  // its class, what that was called with, and its attributes if it has some
    mark
  };

  /// An object while the pickle is read. Objects refer to each other, also in circles, so that the reader owns them
  /// all.
  struct Node {
    Kind kind = Kind::none;
    std::variant<std::int64_t, double, std::string, std::vector<Node*>, at::Storage, at::Tensor> data = std::int64_t{0};
    at::ScalarType dtype = at::ScalarType::Undefined;  // of a storage

    [[nodiscard]] const std::vector<Node*>& items() const { return std::get<std::vector<Node*>>(data); }
    [[nodiscard]] std::vector<Node*>& items() { return std::get<std::vector<Node*>>(data); }
    [[nodiscard]] const std::string& text() const { return std::get<std::string>(data); }
  };

  static constexpr int most_depth = 100;
  static constexpr std::size_t most_expansion = 64;

  [[noreturn]] void refuse(const std::string& why) const {
    throw DamagedCheckpoint("fabric: " + path_ + " cannot be loaded: " + why + " (byte " +
                            std::to_string(size_ - rest_.size()) + " of its pickle)");
  }

  // ---- What the pickle is read by ----

  std::string_view take(std::uint64_t bytes) {
    if (bytes > rest_.size()) refuse("its pickle is cut short");
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }
  template <class Number>
  Number number() {
    return number_at<Number>(take(sizeof(Number)), 0);
  }
  std::string_view line() {
    const std::size_t end = rest_.find('\n');
    if (end == std::string_view::npos) refuse("its pickle is cut short");
    const std::string_view text = take(end + 1);
    return text.substr(0, end);
  }

  template <class Data>
  Node* make(Kind kind, Data&& data) {
    Node& node = nodes_.emplace_back();
    node.kind = kind;
    node.data = std::forward<Data>(data);
    return &node;
  }
  void push(Node* node) { stack_.push_back(node); }
  void push_text(std::string_view text) {
    if (!is_utf8(text)) refuse("a text in it is not UTF-8");
    push(make(Kind::text, std::string(text)));
  }
  void push_integer(std::int64_t integer) { push(make(Kind::integer, integer)); }
  void push_items(Kind kind, std::vector<Node*> items) { push(make(kind, std::move(items))); }

  Node* top() const {
    if (stack_.empty() || stack_.back()->kind == Kind::mark) refuse("its pickle takes what is not there");
    return stack_.back();
  }
  Node* pop() {
    Node* node = top();
    stack_.pop_back();
    return node;
  }
  /// All down to the mark.
  std::vector<Node*> pop_to_mark() {
    std::size_t mark = stack_.size();
    while (mark > 0 && stack_[mark - 1]->kind != Kind::mark) --mark;
    if (mark == 0) refuse("its pickle takes what is not there");
    std::vector<Node*> items(stack_.begin() + static_cast<std::ptrdiff_t>(mark), stack_.end());
    stack_.resize(mark - 1);
    return items;
  }
  Node* pop(Kind kind, const char* what) {
    Node* node = pop();
    if (node->kind != kind) refuse(std::string("its pickle has something else where ") + what + " should be");
    return node;
  }

  void remember(std::uint64_t place) { memo_[place] = top(); }
  void recall(std::uint64_t place) {
    const auto found = memo_.find(place);
    if (found == memo_.end()) refuse("its pickle refers to what is not there");
    push(found->second);
  }

  // ---- The instructions ----

  /// False after the last one.
  bool step() {
    switch (const auto code = number<std::uint8_t>()) {
      case 0x80:  // PROTO
        if (const auto protocol = number<std::uint8_t>(); protocol < 2 || protocol > 5) {
          refuse("it is of pickle protocol " + std::to_string(protocol) + ": 2 to 5 are read");
        }
        return true;
      case 0x95: take(8); return true;  // FRAME
      case '.': return false;           // STOP
      case '(': push(make(Kind::mark, std::int64_t{0})); return true;
      case '0': pop(); return true;
      case 'N': push(make(Kind::none, std::int64_t{0})); return true;
      case 0x88: push(make(Kind::boolean, std::int64_t{1})); return true;
      case 0x89: push(make(Kind::boolean, std::int64_t{0})); return true;
      case 'K': push_integer(number<std::uint8_t>()); return true;
      case 'M': push_integer(number<std::uint16_t>()); return true;
      case 'J': push_integer(number<std::int32_t>()); return true;
      case 0x8A: push_long(); return true;
      case 'G': {
        const std::uint64_t bits = __builtin_bswap64(number<std::uint64_t>());
        double real;
        std::memcpy(&real, &bits, sizeof real);
        push(make(Kind::real, real));
        return true;
      }
      case 'X': push_text(take(number<std::uint32_t>())); return true;
      case 0x8C: push_text(take(number<std::uint8_t>())); return true;
      case 0x8D: push_text(take(number<std::uint64_t>())); return true;
      case 0x8F:  // a set
      case ']': push_items(Kind::list, {}); return true;
      case '}': push_items(Kind::dict, {}); return true;
      case ')': push_items(Kind::tuple, {}); return true;
      case 't': push_items(Kind::tuple, pop_to_mark()); return true;
      case 0x85:
      case 0x86:
      case 0x87: {
        std::vector<Node*> items(code - 0x84U);
        for (std::size_t i = items.size(); i-- > 0;) items[i] = pop();
        push_items(Kind::tuple, std::move(items));
        return true;
      }
      case 'a': {
        Node* item = pop();
        extend(Kind::list, {item});
        return true;
      }
      case 0x90:
      case 'e': extend(Kind::list, pop_to_mark()); return true;
      case 's': {
        Node* value = pop();
        Node* key = pop();
        extend(Kind::dict, {key, value});
        return true;
      }
      case 'u': {
        auto items = pop_to_mark();
        if (items.size() % 2 != 0) refuse("a dict in it has a key without a value");
        extend(Kind::dict, items);
        return true;
      }
      case 'q': remember(number<std::uint8_t>()); return true;
      case 'r': remember(number<std::uint32_t>()); return true;
      case 0x94: remember(memo_.size()); return true;
      case 'h': recall(number<std::uint8_t>()); return true;
      case 'j': recall(number<std::uint32_t>()); return true;
      case 'c': {
        const std::string module(line());
        push_global(module, std::string(line()));
        return true;
      }
      case 0x93: {
        const Node* name = pop(Kind::text, "a name");
        const Node* module = pop(Kind::text, "a name");
        push_global(module->text(), name->text());
        return true;
      }
      case 'Q': push_storage(*pop(Kind::tuple, "a storage")); return true;
      case 'R': {
        const Node* arguments = pop(Kind::tuple, "arguments");
        const Node* function = pop(Kind::global, "a function");
        push(call(*function, arguments->items()));
        return true;
      }
      case 0x81: {  // NEWOBJ
        const Node* arguments = pop(Kind::tuple, "arguments");
        const Node* type = pop(Kind::global, "a class");
        push(call(*type, arguments->items()));
        return true;
      }
      case 'b': {
        Node* attributes = pop();
        if (top()->kind == Kind::object) {
          if (top()->items().size() > 2) refuse("an object in it gets its attributes twice");
          top()->items().push_back(attributes);
          return true;
        }
        // Those of others are an OrderedDict's _metadata, which says nothing about the values.
        if (const Kind kind = top()->kind; kind != Kind::dict && kind != Kind::tensor) refuse("it has an object in it");
        return true;
      }
      default: refuse("its pickle has the instruction " + std::to_string(code) + ", which weights have no use for");
    }
  }

  void push_long() {
    const std::string_view digits = take(number<std::uint8_t>());
    if (digits.size() > 8) refuse("an integer in it has more than 64 bits");
    std::uint64_t bits = !digits.empty() && (digits.back() & '\x80') != 0 ? ~std::uint64_t{0} : 0;
    for (std::size_t i = digits.size(); i-- > 0;) bits = (bits << 8U) | static_cast<unsigned char>(digits[i]);
    push_integer(static_cast<std::int64_t>(bits));
  }

  void extend(Kind kind, const std::vector<Node*>& items) {
    Node* container = top();
    if (container->kind != kind) refuse("its pickle adds to what is no container");
    container->items().insert(container->items().end(), items.begin(), items.end());
  }

  // ---- Names, and what stands for calling them ----

  /// The functions and classes that mean something here.
  static bool is_known(std::string_view name) {
    constexpr std::string_view known[] = {"collections.OrderedDict",
                                          "collections.Counter",
                                          "torch.Size",
                                          "torch.device",
                                          "torch.Tensor",
                                          "torch.nn.parameter.Parameter",
                                          "builtins.set",
                                          "torch.serialization._get_layout",
                                          "torch._utils._rebuild_tensor",
                                          "torch._utils._rebuild_tensor_v2",
                                          "torch._utils._rebuild_tensor_v3",
                                          "torch._utils._rebuild_parameter",
                                          "torch._utils._rebuild_parameter_with_state",
                                          "torch._tensor._rebuild_from_type_v2"};
    for (const std::string_view one : known) {
      if (one == name) return true;
    }
    return false;
  }
  [[nodiscard]] bool is_class(std::string_view name) const {
    return std::find(classes_.begin(), classes_.end(), name) != classes_.end();
  }

  void push_global(std::string module, const std::string& name) {
    if (module == "__builtin__") module = "builtins";
    std::string full = module + "." + name;
    const bool of_torch = module == "torch";
    if (of_torch && find_dtype(&DtypeName::name, name) != nullptr) return push(make(Kind::text, std::move(full)));
    const bool storage =
        (of_torch && find_dtype(&DtypeName::storage, name) != nullptr) || full == "torch.storage.UntypedStorage";
    if (!storage && !is_known(full) && !is_class(full)) {
      refuse("it asks for " + full +
             ", which is none of the weights, numbers and texts that are read; code in a file "
             "is never run");
    }
    push(make(Kind::global, std::move(full)));
  }

  static const Node* argument(const std::vector<Node*>& arguments, std::size_t i, Kind kind) {
    return i < arguments.size() && arguments[i]->kind == kind ? arguments[i] : nullptr;
  }
  const Node& required(const std::vector<Node*>& arguments, std::size_t i, Kind kind) const {
    const Node* node = argument(arguments, i, kind);
    if (node == nullptr) refuse("a tensor in it is not described as torch.save does it");
    return *node;
  }

  Node* call(const Node& function, const std::vector<Node*>& arguments) {
    const std::string& name = function.text();
    if (is_class(name))
      return make(Kind::object, std::vector<Node*>{make(Kind::text, name), make(Kind::tuple, arguments)});
    if (name == "collections.OrderedDict" || name == "collections.Counter") return make_dict(arguments);
    if (name == "torch.Size") {
      return make(Kind::tuple, arguments.empty() ? std::vector<Node*>{} : copy(required(arguments, 0, Kind::tuple)));
    }
    if (name == "builtins.set") {
      return make(Kind::list, arguments.empty() ? std::vector<Node*>{} : copy(required(arguments, 0, Kind::list)));
    }
    if (name == "torch.device") {
      std::string text = required(arguments, 0, Kind::text).text();
      if (const Node* index = argument(arguments, 1, Kind::integer)) {
        text += ":" + std::to_string(std::get<std::int64_t>(index->data));
      }
      return make(Kind::text, std::move(text));
    }
    if (name == "torch.serialization._get_layout") {
      return make(Kind::text, required(arguments, 0, Kind::text).text());
    }
    if (name == "torch._utils._rebuild_tensor" || name == "torch._utils._rebuild_tensor_v2") {
      return make(Kind::tensor, tensor(arguments, required(arguments, 0, Kind::storage).dtype, 6));
    }
    if (name == "torch._utils._rebuild_tensor_v3") {
      const std::string& dtype = required(arguments, 6, Kind::text).text();
      const auto* entry = find_dtype(&DtypeName::name, std::string_view(dtype).substr(dtype.find('.') + 1));
      if (entry == nullptr) refuse("a tensor in it has the dtype " + dtype + ", which is not known here");
      return make(Kind::tensor, tensor(arguments, entry->dtype, 7));
    }
    if (name == "torch._utils._rebuild_parameter" || name == "torch._utils._rebuild_parameter_with_state" ||
        name == "torch.nn.parameter.Parameter") {
      const auto& data = std::get<at::Tensor>(required(arguments, 0, Kind::tensor).data);
      return make(Kind::tensor, data.detach());
    }
    if (name == "torch._tensor._rebuild_from_type_v2") {
      const Node& rebuild = required(arguments, 0, Kind::global);
      if (rebuild.text().find("_rebuild_tensor") == std::string::npos &&
          rebuild.text().find("_rebuild_parameter") == std::string::npos) {
        refuse("it has a tensor of a class of its own");
      }
      return call(rebuild, required(arguments, 2, Kind::tuple).items());
    }
    refuse("it calls " + name + ", which is no function that makes weights");
  }

  std::vector<Node*> copy(const Node& container) {
    spend(container.items().size());
    return container.items();
  }

  Node* make_dict(const std::vector<Node*>& arguments) {
    std::vector<Node*> items;
    if (const Node* pairs = argument(arguments, 0, Kind::list)) {
      for (const Node* pair : copy(*pairs)) {
        if ((pair->kind != Kind::list && pair->kind != Kind::tuple) || pair->items().size() != 2) {
          refuse("an OrderedDict in it is not made of pairs");
        }
        items.insert(items.end(), pair->items().begin(), pair->items().end());
      }
    } else if (const Node* dict = argument(arguments, 0, Kind::dict)) {
      items = copy(*dict);
    }
    return make(Kind::dict, std::move(items));
  }

  // ---- Tensors ----

  void push_storage(const Node& id) {
    const auto& items = id.items();
    if (required(items, 0, Kind::text).text() != "storage") refuse("it refers to something that is no storage");
    const std::string& type = required(items, 1, Kind::global).text();
    const std::string& key = required(items, 2, Kind::text).text();
    const std::int64_t count = integer(required(items, 4, Kind::integer));
    const auto* entry = find_dtype(&DtypeName::storage, std::string_view(type).substr(type.rfind('.') + 1));
    Node* node = make(Kind::storage, storages_(key));
    node->dtype = entry == nullptr ? at::kByte : entry->dtype;
    const std::size_t bytes = std::get<at::Storage>(node->data).nbytes();
    const std::size_t item = c10::elementSize(node->dtype);
    if (count < 0 || bytes % item != 0 || static_cast<std::uint64_t>(count) != bytes / item) {
      refuse("its storage " + key + " has " + std::to_string(bytes) + " bytes and should have " +
             std::to_string(count) + " elements of " + std::to_string(item));
    }
    push(node);
  }

  static std::int64_t integer(const Node& node) { return std::get<std::int64_t>(node.data); }

  std::vector<std::int64_t> integers(const Node& node) const {
    if (node.items().size() > 64) refuse("a tensor in it has more than 64 dimensions");
    std::vector<std::int64_t> numbers;
    for (const Node* item : node.items()) {
      if (item->kind != Kind::integer) refuse("a shape in it is not made of integers");
      numbers.push_back(integer(*item));
    }
    return numbers;
  }

  at::Tensor tensor(const std::vector<Node*>& arguments, at::ScalarType dtype, std::size_t metadata) const {
    const auto& storage = std::get<at::Storage>(required(arguments, 0, Kind::storage).data);
    const std::int64_t offset = integer(required(arguments, 1, Kind::integer));
    const auto sizes = integers(required(arguments, 2, Kind::tuple));
    const auto strides = integers(required(arguments, 3, Kind::tuple));
    if (const Node* views = argument(arguments, metadata, Kind::dict); views != nullptr && !views->items().empty()) {
      refuse("a tensor in it is a lazy conjugate or negative: save it with resolve_conj() and resolve_neg()");
    }
    check_inside(offset, sizes, strides, static_cast<std::int64_t>(storage.nbytes() / c10::elementSize(dtype)));
    const c10::NoGradGuard no_grad;
    return at::empty({0}, at::TensorOptions(dtype)).set_(storage, offset, sizes, strides);
  }

  void check_inside(std::int64_t offset, const std::vector<std::int64_t>& sizes,
                    const std::vector<std::int64_t>& strides, std::int64_t elements) const {
    if (sizes.size() != strides.size()) refuse("a tensor in it has a wrong number of dimensions");
    bool inside = offset >= 0 && offset <= elements;
    bool empty = false;
    std::int64_t last = offset;
    std::int64_t count = 1;
    for (std::size_t i = 0; inside && i < sizes.size(); ++i) {
      inside = sizes[i] >= 0 && strides[i] >= 0;
      empty = empty || sizes[i] == 0;
      if (!inside) break;
      std::int64_t span = 0;
      inside = !__builtin_mul_overflow(std::max<std::int64_t>(sizes[i] - 1, 0), strides[i], &span) &&
               !__builtin_add_overflow(last, span, &last) &&
               !__builtin_mul_overflow(count, std::max<std::int64_t>(sizes[i], 1), &count);
    }
    constexpr std::int64_t most = std::int64_t{1} << 58;  // so that its bytes can be counted, too
    if (!inside || count > most || (!empty && last >= elements))
      refuse("a tensor in it does not lie inside its storage");
  }

  // ---- The tree ----

  /// What is used in several places comes out in each: `budget_` stops a small file from becoming huge in that way.
  Value to_value(const Node& node, int depth) {
    if (depth > most_depth) refuse("it is nested more than " + std::to_string(most_depth) + " deep, or in a circle");
    spend(1);
    switch (node.kind) {
      case Kind::none: return {};
      case Kind::boolean: return integer(node) != 0;
      case Kind::integer: return integer(node);
      case Kind::real: return std::get<double>(node.data);
      case Kind::global:
      case Kind::text: spend(node.text().size()); return node.text();
      case Kind::tensor: return std::get<at::Tensor>(node.data);
      case Kind::list:
      case Kind::tuple: {
        List list;
        list.is_tuple = node.kind == Kind::tuple;
        for (const Node* item : node.items()) list.items.push_back(to_value(*item, depth + 1));
        return list;
      }
      case Kind::object: {
        Dict object;
        object["class"] = to_value(*node.items()[0], depth + 1);
        object["arguments"] = to_value(*node.items()[1], depth + 1);
        if (node.items().size() > 2) object["state"] = to_value(*node.items()[2], depth + 1);
        return object;
      }
      case Kind::dict: {
        if (has_objects_as_keys(node)) return pairs_of(node, depth);
        Dict dict;
        for (std::size_t i = 0; i + 1 < node.items().size(); i += 2) {
          dict[to_key(*node.items()[i])] = to_value(*node.items()[i + 1], depth + 1);
        }
        return dict;
      }
      case Kind::storage: refuse("it holds a storage without a tensor");
      case Kind::mark: break;
    }
    refuse("its pickle ends too early");
  }

  static bool has_objects_as_keys(const Node& dict) {
    return !dict.items().empty() && dict.items()[0]->kind == Kind::object;
  }
  Value pairs_of(const Node& dict, int depth) {
    List pairs;
    for (std::size_t i = 0; i + 1 < dict.items().size(); i += 2) {
      pairs.items.emplace_back(
          List{{to_value(*dict.items()[i], depth + 1), to_value(*dict.items()[i + 1], depth + 1)}, /*is_tuple=*/true});
    }
    return pairs;
  }

  Dict::Key to_key(const Node& node) {
    spend(1);
    if (node.kind == Kind::integer || node.kind == Kind::boolean) return integer(node);
    if (node.kind != Kind::text) refuse("a dict in it has a key that is neither a text nor an integer");
    spend(node.text().size());
    return node.text();
  }

  void spend(std::size_t bytes) {
    if (bytes > budget_) refuse("it says the same over and over: it would take far more memory than the file");
    budget_ -= bytes;
  }

  std::string_view rest_;
  std::size_t size_;
  std::size_t budget_;
  std::string path_;
  Storages storages_;
  Classes classes_;
  std::deque<Node> nodes_;
  std::vector<Node*> stack_;
  std::unordered_map<std::uint64_t, Node*> memo_;
};

}  // namespace fabric::detail
