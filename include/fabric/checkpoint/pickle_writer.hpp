// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ATen.h>

#include "fabric/checkpoint/dtypes.hpp"
#include "fabric/checkpoint/utf8.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// Throws fabric::Error that names the key for what no checkpoint can hold.
[[noreturn]] inline void refuse_to_write(const std::string& key, const std::string& why) {
  throw Error("fabric: save: " + (key.empty() ? "the state" : "'" + key + "'") + " " + why);
}

/// The key of an entry inside the one called `outer`.
[[nodiscard]] inline std::string inner_key(const std::string& outer, const std::string& key) {
  return outer.empty() ? key : outer + "." + key;
}

/// Throws for tensors whose elements do not lie in a storage as they are.
inline const DtypeName& check_writable(const at::Tensor& tensor, const std::string& key) {
  if (!tensor.defined()) refuse_to_write(key, "is an undefined tensor");
  if (tensor.layout() != at::kStrided) refuse_to_write(key, "is not a dense tensor: save tensor.to_dense()");
  if (tensor.is_quantized()) refuse_to_write(key, "is a quantized tensor: save its int_repr() and its scale");
  if (tensor.is_conj() || tensor.is_neg()) {
    refuse_to_write(key, "is a lazy conjugate or negative: save tensor.resolve_conj().resolve_neg()");
  }
  const DtypeName* dtype = find_dtype(tensor.scalar_type());
  if (dtype == nullptr) {
    refuse_to_write(key,
                    std::string("is of dtype ") + at::toString(tensor.scalar_type()) + ", which has no name in files");
  }
  return *dtype;
}

/// The instructions of pickles, protocol 2.
class PickleText {
 public:
  [[nodiscard]] const std::string& pickle() const { return text_; }

 protected:
  template <class Number>
  void put(Number number) {
    text_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void put_text(std::string_view text, const std::string& key) {
    if (!is_utf8(text)) refuse_to_write(key, "is or has a text that is not UTF-8");
    if (text.size() > std::numeric_limits<std::uint32_t>::max()) refuse_to_write(key, "is a text beyond 4 GB");
    text_ += 'X';
    put(static_cast<std::uint32_t>(text.size()));
    text_ += text;
  }
  void put_integer(std::int64_t number) {
    if (number >= 0 && number < 256) {
      text_ += 'K';
      put(static_cast<std::uint8_t>(number));
    } else if (number >= std::numeric_limits<std::int32_t>::min() &&
               number <= std::numeric_limits<std::int32_t>::max()) {
      text_ += 'J';
      put(static_cast<std::int32_t>(number));
    } else {
      text_ += "\x8A\x08";
      put(number);
    }
  }
  void put_integers(at::IntArrayRef numbers) {
    text_ += '(';
    for (const std::int64_t number : numbers) put_integer(number);
    text_ += 't';
  }
  void put_global(std::string_view module, std::string_view name) {
    text_ += 'c';
    text_ += module;
    text_ += '\n';
    text_ += name;
    text_ += '\n';
  }
  void put_bool(bool flag) { text_ += flag ? '\x88' : '\x89'; }

  std::string text_;
};

/// Pickles a `Value` as `torch.save` does, in protocol 2, so that Python reads it with `weights_only=True`. Tensors
/// refer to their storages by number; tensors that share a storage do so in the file.
class PickleWriter : public PickleText {
 public:
  /// Throws fabric::Error that names the key of what cannot be written.
  explicit PickleWriter(const Value& value) {
    text_ += "\x80\x02";
    write(value, "");
    text_ += '.';
  }

  /// By number.
  [[nodiscard]] const std::vector<at::Storage>& storages() const { return storages_; }

 private:
  void write(const Value& value, const std::string& key) {
    std::visit([&](const auto& data) { write_data(data, key); }, value.data());
  }
  void write_data(std::monostate /*none*/, const std::string& /*key*/) { text_ += 'N'; }
  void write_data(bool flag, const std::string& /*key*/) { put_bool(flag); }
  void write_data(std::int64_t number, const std::string& /*key*/) { put_integer(number); }
  void write_data(double number, const std::string& /*key*/) {
    std::uint64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    text_ += 'G';
    put(__builtin_bswap64(bits));
  }
  void write_data(const std::string& text, const std::string& key) { put_text(text, key); }
  void write_data(const List& list, const std::string& key) {
    text_ += list.is_tuple ? "(" : "](";
    for (std::size_t i = 0; i < list.items.size(); ++i) write(list.items[i], inner_key(key, std::to_string(i)));
    text_ += list.is_tuple ? 't' : 'e';
  }
  void write_data(const Dict& dict, const std::string& key) {
    text_ += "}(";
    for (const auto& [own, value] : dict) {
      if (const auto* number = std::get_if<std::int64_t>(&own)) {
        put_integer(*number);
      } else {
        put_text(std::get<std::string>(own), key);
      }
      write(value, inner_key(key, to_text(own)));
    }
    text_ += 'u';
  }
  void write_data(const at::Tensor& tensor, const std::string& key) {
    const DtypeName& dtype = check_writable(tensor, key);
    const bool untyped = dtype.storage.empty();
    const at::Storage& storage = tensor.storage();
    put_global("torch._utils", untyped ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
    text_ += "((";
    put_text("storage", key);
    untyped ? put_global("torch.storage", "UntypedStorage") : put_global("torch", dtype.storage);
    put_text(std::to_string(number_of(storage)), key);
    put_text("cpu", key);
    put_integer(static_cast<std::int64_t>(untyped ? storage.nbytes() : storage.nbytes() / tensor.element_size()));
    text_ += "tQ";
    put_integer(tensor.storage_offset());
    put_integers(tensor.sizes());
    put_integers(tensor.strides());
    put_bool(false);  // requires_grad: a state is no graph
    put_global("collections", "OrderedDict");
    text_ += ")R";
    if (untyped) put_global("torch", dtype.name);
    text_ += "tR";
  }

  std::size_t number_of(const at::Storage& storage) {
    const auto [place, added] = numbers_.emplace(storage.unsafeGetStorageImpl(), storages_.size());
    if (added) storages_.push_back(storage);
    return place->second;
  }

  std::vector<at::Storage> storages_;
  std::unordered_map<const c10::StorageImpl*, std::size_t> numbers_;
};

}  // namespace fabric::detail
