// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/strides.h>

#include "fabric/checkpoint/crc32.hpp"
#include "fabric/checkpoint/dtypes.hpp"
#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/json.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"

namespace fabric {

/// Files in the safetensors format: a JSON header that says where each tensor lies, then the tensors. Other programs
/// see the tensors under their full keys (`model.fc.weight`). The rest of the tree (numbers, texts, the nesting) stands
/// in the header's free text, so that a whole training state can be saved; a file of other programs is a flat dict of
/// tensors.
struct SafetensorsFile {
  static constexpr std::string_view extension = ".safetensors";

  /// Throws fabric::Error that names the key of what cannot be written.
  template <class Sink>
  static void write(Sink& sink, const Value& state, Dict manifest) {
    Tensors tensors;
    const Value tree = take_tensors(state, "", tensors);
    std::uint64_t place = 0;
    std::uint32_t crc = 0;
    Dict header;
    for (at::Tensor& tensor : tensors.values) crc = add_checksum(tensor, crc);
    manifest["format"] = 1;
    manifest["crc32"] = crc;
    header["__metadata__"] = Dict{{"format", "pt"},
                                  {"fabric.manifest", detail::JsonWriter::write(manifest)},
                                  {"fabric.state", detail::JsonWriter::write(tree)}};
    for (std::size_t i = 0; i < tensors.values.size(); ++i) {
      const at::Tensor& tensor = tensors.values[i];
      List shape;
      for (const std::int64_t size : tensor.sizes()) shape.items.emplace_back(size);
      const std::uint64_t end = place + tensor.nbytes();
      header[tensors.names[i]] = Dict{{"dtype", std::string(detail::find_dtype(tensor.scalar_type())->safetensors)},
                                      {"shape", shape},
                                      {"data_offsets", List{{Value(place), Value(end)}, false}}};
      place = end;
    }
    std::string json = detail::JsonWriter::write(header);
    json.append((alignment - (json.size() + 8) % alignment) % alignment, ' ');
    const std::uint64_t size = json.size();
    sink.write(&size, sizeof size);
    sink.write(json.data(), json.size());
    for (const at::Tensor& tensor : tensors.values) {
      const at::Tensor plain = tensor.cpu().contiguous();
      sink.write(plain.const_data_ptr(), plain.nbytes());
    }
  }

  /// Tensors share the memory of `file`. Everything is verified before anything is returned. Throws DamagedCheckpoint.
  [[nodiscard]] static CheckpointContents read(const detail::Bytes& file, const std::string& path) {
    const detail::Refuse refuse{path};
    const std::string_view all = file.view();
    if (all.size() < 8) refuse("it is too short for a safetensors file");
    const auto header_size = detail::number_at<std::uint64_t>(all, 0);
    if (header_size > all.size() - 8) refuse("it is cut short, or no safetensors file");
    const std::string what = "the header of " + path;
    const Value parsed = detail::JsonReader::read(all.substr(8, header_size), what);
    if (!parsed.is<Dict>()) refuse("its header is no object");
    const std::string_view data = all.substr(8 + header_size);

    Dict tensors;
    CheckpointContents contents;
    const Value* metadata = nullptr;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
    for (const auto& [name, facts] : parsed.as<Dict>(what)) {
      if (to_text(name) == "__metadata__") {
        metadata = &facts;
      } else {
        tensors[name] = read_tensor(file, data, facts, to_text(name), spans, refuse);
      }
    }
    // As the format asks: the tensors cover the data, and none lies over another.
    std::sort(spans.begin(), spans.end());
    std::uint64_t covered = 0;
    for (const auto& [start, end] : spans) {
      if (start != covered) refuse("its tensors lie over one another, or leave holes");
      covered = end;
    }
    if (covered != data.size()) refuse("it is cut short, or has more than its tensors");

    const auto text_of = [&](const char* key) -> const std::string* {
      if (metadata == nullptr || !metadata->is<Dict>()) return nullptr;
      const Value* text = metadata->as<Dict>("").find(key);
      return text != nullptr && text->is<std::string>() ? &text->as<std::string>("") : nullptr;
    };
    if (const std::string* manifest = text_of("fabric.manifest")) {
      contents.manifest = detail::JsonReader::read(*manifest, what).as<Dict>("the manifest");
      const Value* crc = contents.manifest.find("crc32");
      if (crc == nullptr || !crc->is<std::int64_t>() ||
          crc->as<std::int64_t>("") != static_cast<std::int64_t>(detail::crc32(data.data(), data.size()))) {
        refuse("the checksum of its tensors is wrong");
      }
    }
    const std::string* tree = text_of("fabric.state");
    contents.state = tree == nullptr ? Value(std::move(tensors))
                                     : put_tensors(detail::JsonReader::read(*tree, what), tensors, refuse);
    return contents;
  }

 private:
  static constexpr std::size_t alignment = 64;  // the format asks for 8

  struct Tensors {
    std::vector<std::string> names;
    std::vector<at::Tensor> values;
  };

  static std::uint32_t add_checksum(const at::Tensor& tensor, std::uint32_t before) {
    const at::Tensor plain = tensor.cpu().contiguous();
    return detail::crc32(plain.const_data_ptr(), plain.nbytes(), before);
  }

  /// The tree as JSON can hold it. Tensors, tuples and dicts with numbers as keys become lists whose first item says
  /// what they are: ["tensor", name], ["tuple", items], ["dict", [key, value], ...], ["float", "inf"].
  static Value take_tensors(const Value& value, const std::string& key, Tensors& tensors) {
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data())) {
      const detail::DtypeName& dtype = detail::check_writable(*tensor, key);
      if (dtype.safetensors.empty()) {
        detail::refuse_to_write(key, "is of dtype " + std::string(dtype.name) + ", which safetensors does not have");
      }
      const std::string name = key.empty() ? "tensor" : key;
      if (std::find(tensors.names.begin(), tensors.names.end(), name) != tensors.names.end() ||
          name == "__metadata__") {
        detail::refuse_to_write(key, "is the name of two tensors, or one that the format keeps for itself");
      }
      tensors.names.push_back(name);
      tensors.values.push_back(tensor->detach());
      return List{{"tensor", name}, false};
    }
    if (const auto* list = std::get_if<List>(&value.data())) {
      List items;
      items.items.emplace_back(list->is_tuple ? "tuple" : "list");
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        items.items.push_back(take_tensors(list->items[i], detail::inner_key(key, std::to_string(i)), tensors));
      }
      return items;
    }
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      List entries;
      entries.items.emplace_back("dict");
      for (const auto& [own, inner] : *dict) {
        const Value own_value = std::visit([](const auto& any) { return Value(any); }, own);
        entries.items.emplace_back(
            List{{own_value, take_tensors(inner, detail::inner_key(key, to_text(own)), tensors)}, false});
      }
      return entries;
    }
    if (const auto* real = std::get_if<double>(&value.data()); real != nullptr && !std::isfinite(*real)) {
      return List{{"float", std::isnan(*real) ? "nan" : *real > 0 ? "inf" : "-inf"}, false};
    }
    return value;
  }

  static Value put_tensors(const Value& value, const Dict& tensors, const detail::Refuse& refuse) {
    if (!value.is<List>()) return value;
    const auto& items = value.as<List>("").items;
    const std::string kind = items.empty() || !items[0].is<std::string>() ? "" : items[0].as<std::string>("");
    const bool named = items.size() == 2 && items[1].is<std::string>();
    if (kind == "tensor" && named) {
      const Value* tensor = tensors.find(items[1].as<std::string>(""));
      if (tensor == nullptr) refuse("its tensor " + items[1].as<std::string>("") + " is missing");
      return *tensor;
    }
    if (kind == "float" && named) {
      const std::string& text = items[1].as<std::string>("");
      return text == "nan" ? std::nan("") : text == "inf" ? HUGE_VAL : -HUGE_VAL;
    }
    if (kind == "list" || kind == "tuple") {
      List list{{}, kind == "tuple"};
      for (std::size_t i = 1; i < items.size(); ++i) list.items.push_back(put_tensors(items[i], tensors, refuse));
      return list;
    }
    if (kind != "dict") refuse("the tree in its header is damaged");
    Dict dict;
    for (std::size_t i = 1; i < items.size(); ++i) {
      const List* entry = std::get_if<List>(&items[i].data());
      if (entry == nullptr || entry->items.size() != 2) refuse("the tree in its header is damaged");
      const Value& own = entry->items[0];
      if (own.is<std::string>()) {
        dict[own.as<std::string>("")] = put_tensors(entry->items[1], tensors, refuse);
      } else if (own.is<std::int64_t>()) {
        dict[own.as<std::int64_t>("")] = put_tensors(entry->items[1], tensors, refuse);
      } else {
        refuse("the tree in its header is damaged");
      }
    }
    return dict;
  }

  static at::Tensor read_tensor(const detail::Bytes& file, std::string_view data, const Value& facts,
                                const std::string& name, std::vector<std::pair<std::uint64_t, std::uint64_t>>& spans,
                                const detail::Refuse& refuse) {
    const auto integers = [&](const Value* list) {
      std::vector<std::int64_t> numbers;
      if (list == nullptr || !list->is<List>()) refuse("its tensor " + name + " is not described as the format asks");
      for (const Value& item : list->as<List>("").items) {
        if (!item.is<std::int64_t>() || item.as<std::int64_t>("") < 0)
          refuse("its tensor " + name + " is not described as the format asks");
        numbers.push_back(item.as<std::int64_t>(""));
      }
      return numbers;
    };
    if (!facts.is<Dict>()) refuse("its tensor " + name + " is not described as the format asks");
    const Dict& dict = facts.as<Dict>("");
    const Value* dtype_name = dict.find("dtype");
    if (dtype_name == nullptr || !dtype_name->is<std::string>())
      refuse("its tensor " + name + " is not described as the format asks");
    const auto* dtype = detail::find_dtype(&detail::DtypeName::safetensors, dtype_name->as<std::string>(""));
    if (dtype == nullptr)
      refuse("its tensor " + name + " has the dtype " + dtype_name->as<std::string>("") + ", unknown here");
    const auto shape = integers(dict.find("shape"));
    const auto offsets = integers(dict.find("data_offsets"));
    if (offsets.size() != 2 || offsets[0] > offsets[1] || static_cast<std::uint64_t>(offsets[1]) > data.size()) {
      refuse("its tensor " + name + " does not lie inside the file");
    }
    const auto start = static_cast<std::uint64_t>(offsets[0]);
    const auto size = static_cast<std::uint64_t>(offsets[1] - offsets[0]);
    std::int64_t bytes = static_cast<std::int64_t>(c10::elementSize(dtype->dtype));
    bool fits = shape.size() <= 64;
    for (const std::int64_t length : shape) fits = fits && !__builtin_mul_overflow(bytes, length, &bytes);
    if (!fits || static_cast<std::uint64_t>(bytes) != size)
      refuse("its tensor " + name + " has another size than its shape");
    spans.emplace_back(start, start + size);
    const c10::NoGradGuard no_grad;
    const at::Tensor tensor = at::empty({0}, at::TensorOptions(dtype->dtype));
    return tensor.set_(detail::storage_in(file, data.substr(start, size)), 0, shape, c10::contiguous_strides(shape));
  }
};

}  // namespace fabric
