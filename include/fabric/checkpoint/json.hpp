// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/utf8.hpp"
#include "fabric/checkpoint/value.hpp"

/// JSON (RFC 8259), as far as the headers of checkpoints need it: objects become `Dict`, arrays `List`.
namespace fabric::detail {

class JsonReader {
 public:
  /// Throws DamagedCheckpoint; `what` is for its message.
  static Value read(std::string_view text, const std::string& what) {
    JsonReader reader(text, what);
    if (!is_utf8(text)) reader.refuse("is not UTF-8");
    Value value = reader.read_value(0);
    if (reader.next() != '\0') reader.refuse("goes on after its end");
    return value;
  }

 private:
  JsonReader(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  [[noreturn]] void refuse(const std::string& why) const {
    throw DamagedCheckpoint("fabric: " + what_ + " " + why + " (byte " + std::to_string(place_) + ")");
  }

  /// The next character that is no space; zero at the end.
  char next() {
    while (place_ < text_.size() && std::string_view(" \t\r\n").find(text_[place_]) != std::string_view::npos) ++place_;
    return place_ < text_.size() ? text_[place_] : '\0';
  }
  bool take(char wanted) {
    if (next() != wanted) return false;
    ++place_;
    return true;
  }
  void expect(char wanted) {
    if (!take(wanted)) refuse(std::string("has something else where ") + wanted + " should be");
  }
  bool take_word(std::string_view word) {
    if (text_.substr(place_, word.size()) != word) return false;
    place_ += word.size();
    return true;
  }

  Value read_value(int depth) {
    if (depth > 100) refuse("is nested too deep");
    switch (next()) {
      case '{': return read_object(depth);
      case '[': return read_array(depth);
      case '"': return read_text();
      default: break;
    }
    if (take_word("null")) return {};
    if (take_word("true")) return true;
    if (take_word("false")) return false;
    return read_number();
  }

  Value read_object(int depth) {
    Dict dict;
    expect('{');
    if (take('}')) return dict;
    do {
      if (next() != '"') refuse("has a key that is no text");
      const std::string key = read_text();
      expect(':');
      if (dict.find(key) != nullptr) refuse("has the key " + key + " twice");
      dict[key] = read_value(depth + 1);
    } while (take(','));
    expect('}');
    return dict;
  }

  Value read_array(int depth) {
    List list;
    expect('[');
    if (take(']')) return list;
    do {
      list.items.push_back(read_value(depth + 1));
    } while (take(','));
    expect(']');
    return list;
  }

  std::string read_text() {
    std::string text;
    for (++place_;; ++place_) {
      if (place_ >= text_.size()) refuse("is cut short");
      const char c = text_[place_];
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) refuse("has a control character in a text");
      c == '\\' ? read_escape(text) : text.push_back(c);
    }
    ++place_;
    return text;
  }

  /// At a backslash; leaves the place at the escape's last character.
  void read_escape(std::string& text) {
    constexpr std::string_view names = "\"\\/bfnrt";
    constexpr std::string_view meanings = "\"\\/\b\f\n\r\t";
    if (++place_ >= text_.size()) refuse("is cut short");
    if (const std::size_t i = names.find(text_[place_]); i != std::string_view::npos)
      return text.push_back(meanings[i]);
    if (text_[place_] != 'u') refuse("has an unknown escape");
    unsigned point = read_hex();
    if (point >= 0xD800 && point < 0xDC00 && text_.substr(place_ + 1, 2) == "\\u") {
      place_ += 2;
      const unsigned low = read_hex();
      if (low < 0xDC00 || low > 0xDFFF) refuse("has half a character");
      point = 0x10000 + ((point - 0xD800) << 10U) + (low - 0xDC00);
    }
    if (point >= 0xD800 && point < 0xE000) refuse("has half a character");
    append_utf8(text, point);
  }

  /// At the u; leaves the place at the last digit.
  unsigned read_hex() {
    const std::string_view digits = text_.substr(std::min(place_ + 1, text_.size()), 4);
    unsigned point = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), point, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) refuse("has an unknown escape");
    place_ += 4;
    return point;
  }

  static void append_utf8(std::string& text, unsigned point) {
    if (point < 0x80) {
      text.push_back(static_cast<char>(point));
      return;
    }
    const int following = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    constexpr unsigned first[] = {0, 0xC0, 0xE0, 0xF0};
    text.push_back(static_cast<char>(first[following] | (point >> (6 * following))));
    for (int n = following - 1; n >= 0; --n) text.push_back(static_cast<char>(0x80U | ((point >> (6 * n)) & 0x3FU)));
  }

  Value read_number() {
    const std::size_t start = place_;
    while (place_ < text_.size() && std::string_view("+-.0123456789eE").find(text_[place_]) != std::string_view::npos) {
      ++place_;
    }
    const std::string_view digits = text_.substr(start, place_ - start);
    const char* const end = digits.data() + digits.size();
    if (digits.find_first_of(".eE") == std::string_view::npos) {
      std::int64_t integer = 0;
      const auto [after, error] = std::from_chars(digits.data(), end, integer);
      if (error == std::errc() && after == end && !digits.empty()) return integer;
    }
    double real = 0;
    const auto [after, error] = std::from_chars(digits.data(), end, real);
    if (error != std::errc() || after != end || digits.empty()) refuse("has something that is no value");
    return real;
  }

  std::string_view text_;
  const std::string& what_;
  std::size_t place_ = 0;
};

/// Throws fabric::Error for what JSON cannot say: tensors, infinities, keys that are numbers.
class JsonWriter {
 public:
  [[nodiscard]] static std::string write(const Value& value) {
    JsonWriter writer;
    writer.put(value);
    return std::move(writer.text_);
  }

 private:
  void put(const Value& value) {
    std::visit([this](const auto& data) { put_data(data); }, value.data());
  }
  void put_data(std::monostate /*none*/) { text_ += "null"; }
  void put_data(bool flag) { text_ += flag ? "true" : "false"; }
  void put_data(std::int64_t number) { text_ += std::to_string(number); }
  void put_data(double number) {
    if (!std::isfinite(number)) throw Error("fabric: JSON has no number for " + std::to_string(number));
    char digits[40];
    auto end = std::to_chars(digits, digits + sizeof digits, number).ptr;
    const std::string_view written(digits, static_cast<std::size_t>(end - digits));
    text_ += written;
    if (written.find_first_of(".e") == std::string_view::npos) text_ += ".0";  // a float comes back as one
  }
  void put_data(const std::string& text) {
    if (!is_utf8(text)) throw Error("fabric: a text is not UTF-8 and cannot be written as JSON");
    text_ += '"';
    for (const char c : text) {
      if (c == '"' || c == '\\') {
        text_ += '\\';
        text_ += c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
        text_ += escape;
      } else {
        text_ += c;
      }
    }
    text_ += '"';
  }
  void put_data(const at::Tensor& /*tensor*/) { throw Error("fabric: a tensor cannot be written as JSON"); }
  void put_data(const List& list) {
    text_ += '[';
    for (std::size_t i = 0; i < list.items.size(); ++i) {
      if (i > 0) text_ += ',';
      put(list.items[i]);
    }
    text_ += ']';
  }
  void put_data(const Dict& dict) {
    text_ += '{';
    bool first = true;
    for (const auto& [key, value] : dict) {
      if (!std::holds_alternative<std::string>(key)) throw Error("fabric: a number cannot be a key in JSON");
      if (!std::exchange(first, false)) text_ += ',';
      put_data(std::get<std::string>(key));
      text_ += ':';
      put(value);
    }
    text_ += '}';
  }

  std::string text_;
};

}  // namespace fabric::detail
