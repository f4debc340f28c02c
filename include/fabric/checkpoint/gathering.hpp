// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <c10/util/accumulate.h>
#include <torch/types.h>

#include "fabric/checkpoint/boxes.hpp"
#include "fabric/checkpoint/dtypes.hpp"
#include "fabric/checkpoint/json.hpp"
#include "fabric/checkpoint/pickle_writer.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/spread.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/error.hpp"

namespace fabric::detail {

/// Brings tensors that are spread over the ranks to rank 0, one after the other, for a file that rank 0 writes. No
/// other rank ever has more than its own parts.
class Gathering {
 public:
  /// All ranks make it, each with its tree. On rank 0 `value` gets what is kept on others alone: of a small parameter
  /// an optimizer there may keep nothing. Throws fabric::Error on all ranks if the parts are no wholes.
  Gathering(Value& value, const Spread& spread, Ranks& ranks) : spread_(spread), world_(ranks.world()) {
    List path;
    find(value, path);
    const auto all = gather_long(ranks, JsonWriter::write(Dict{{"parts", parts_}, {"single", single_}}));
    std::exception_ptr problem;
    List order;
    try {
      if (world_.is_global_zero()) order = plan(all, value);
    } catch (...) {
      problem = std::current_exception();
    }
    ranks.agree(problem);
    const Value agreed = JsonReader::read(from_zero_long(ranks, JsonWriter::write(order)), "the order of tensors");
    for (const Value& id : agreed.as<List>("the order of tensors").items) order_.push_back(id.as<std::string>("a key"));
  }
  Gathering(const Gathering&) = delete;
  Gathering& operator=(const Gathering&) = delete;

  /// On the other ranks: sends their parts, in the order in which rank 0 wants them.
  void send() const {
    for (const std::string& id : order_) {
      const auto own = own_.find(id);
      if (own == own_.end() || !own->second->writes || own->second->own.numel() == 0) continue;
      std::vector<at::Tensor> message{own->second->own.to(world_.device).contiguous()};
      world_.group->send(message, 0, tag)->wait();
    }
  }

  /// On rank 0: the storage of a tensor, brought together now if it is one that stands for another.
  [[nodiscard]] at::Storage memory_of(const at::Storage& storage) {
    const auto found = by_storage_.find(storage.unsafeGetStorageImpl());
    if (found == by_storage_.end()) return on_cpu(storage);
    while (next_ <= found->second) receive();
    return std::exchange(here_[found->second], at::Tensor()).storage();
  }
  /// On rank 0: a tree with all of them in memory.
  [[nodiscard]] Value everything(const Value& value) {
    if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && is_stand_in(*tensor)) {
      const std::size_t i = by_storage_.at(tensor->storage().unsafeGetStorageImpl());
      while (next_ <= i) receive();
      return here_[i].view(tensor->sizes());
    }
    if (const auto* list = std::get_if<List>(&value.data())) {
      List whole{{}, list->is_tuple};
      for (const Value& item : list->items) whole.items.push_back(everything(item));
      return whole;
    }
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      Dict whole;
      for (const auto& [key, inner] : *dict) whole[key] = everything(inner);
      return whole;
    }
    return value;
  }
  /// On rank 0: takes what was not wanted because of an exception, since the others wait until it is.
  void finish() {
    while (next_ < wholes_.size()) {
      receive();
      here_[next_ - 1] = at::Tensor();
    }
  }

 private:
  static constexpr int tag = 7;

  struct Source {
    int rank = 0;
    std::vector<Box> boxes;  // where its elements are, in their order
    std::int64_t numel = 0;
  };
  struct Whole {
    at::ScalarType dtype = at::kFloat;
    std::vector<std::int64_t> sizes;
    std::vector<Source> sources;
    at::Tensor own;  // rank 0's part
  };

  static List list_of(at::IntArrayRef numbers) {
    List list;
    for (const std::int64_t number : numbers) list.items.emplace_back(number);
    return list;
  }
  static std::vector<std::int64_t> numbers_of(const Value& list) {
    std::vector<std::int64_t> numbers;
    for (const Value& number : list.as<List>("numbers").items) numbers.push_back(number.as<std::int64_t>("a number"));
    return numbers;
  }
  static bool is_stand_in(const at::Tensor& tensor) { return tensor.defined() && tensor.is_meta(); }

  /// What this rank has, in the order of the tree. A path is made of keys, and of places in lists.
  void find(const Value& value, List& path) {
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      for (const auto& [key, inner] : *dict) {
        path.items.push_back(std::visit([](const auto& any) { return Value(any); }, key));
        find(inner, path);
        path.items.pop_back();
      }
    } else if (const auto* list = std::get_if<List>(&value.data())) {
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        path.items.emplace_back(i);
        find(list->items[i], path);
        path.items.pop_back();
      }
    } else if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && tensor->defined()) {
      if (is_stand_in(*tensor)) {
        add_part(*tensor, path);
      } else if (tensor->numel() == 1 && !world_.is_global_zero() && spread_.writes(*tensor, world_)) {
        single_.items.emplace_back(List{{path, std::string(find_dtype(tensor->scalar_type())->name),
                                         tensor->to(at::kCPU, at::kDouble).item<double>()},
                                        false});
      }
    }
  }
  void add_part(const at::Tensor& tensor, const List& path) {
    const Spread::Part* part = spread_.part(tensor);
    if (part == nullptr) {
      throw Error("fabric: save: " + JsonWriter::write(path) + " is a tensor without memory, of the meta device");
    }
    if (!seen_.insert(tensor.unsafeGetTensorImpl()).second) return;  // tied: it is sent once
    own_[JsonWriter::write(path)] = part;
    List boxes;
    for (const Box& box : part->boxes()) {
      boxes.items.emplace_back(List{{list_of(box.offsets), list_of(box.sizes)}, false});
    }
    parts_.items.emplace_back(List{{path, std::move(boxes), part->writes, list_of(tensor.sizes()),
                                    std::string(find_dtype(tensor.scalar_type())->name)},
                                   false});
  }

  // ---- On rank 0 ----

  /// Who has what; returns the order in which it comes.
  List plan(const std::vector<std::string>& all, Value& value) {
    std::unordered_map<std::string, Whole> wholes;
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
      const Value told = JsonReader::read(all[rank], "what a rank has");
      const Dict& lists = told.as<Dict>("what a rank has");
      for (const Value& item : lists.at("parts").as<List>("parts").items) {
        const auto& part = item.as<List>("a part").items;
        const std::string id = JsonWriter::write(part[0]);
        const auto [place, added] = wholes.emplace(id, Whole());
        if (added) describe(place->second, part, value);
        Source source{static_cast<int>(rank), {}, 0};
        for (const Value& item_of_box : part[1].as<List>("boxes").items) {
          const auto& box = item_of_box.as<List>("a box").items;
          source.boxes.push_back({numbers_of(box[0]), numbers_of(box[1])});
          source.numel += source.boxes.back().numel();
        }
        if (part[2].as<bool>("writes") && source.numel > 0) place->second.sources.push_back(std::move(source));
      }
      for (const Value& item : lists.at("single").as<List>("single").items) {
        const auto& single = item.as<List>("a number").items;
        Value& there = at(value, single[0].as<List>("a path"));
        if (!there.is_none()) continue;
        const auto dtype = find_dtype(&DtypeName::name, single[1].as<std::string>("a dtype"))->dtype;
        there = at::full({}, single[2].as_number("a number"), at::TensorOptions(dtype));
      }
    }
    List order;
    List path;
    number(value, path, wholes, order);
    return order;
  }
  void describe(Whole& whole, const std::vector<Value>& part, Value& value) {
    whole.sizes = numbers_of(part[3]);
    whole.dtype = find_dtype(&DtypeName::name, part[4].as<std::string>("a dtype"))->dtype;
    Value& there = at(value, part[0].as<List>("a path"));
    if (there.is_none()) there = at::empty(whole.sizes, at::TensorOptions(at::kMeta).dtype(whole.dtype));
  }
  /// The place of a path in the tree, made if it is not there.
  static Value& at(Value& root, const List& path) {
    Value* place = &root;
    for (const Value& step : path.items) {
      if (auto* list = std::get_if<List>(&place->data())) {
        place = &list->items.at(static_cast<std::size_t>(step.as<std::int64_t>("a place")));
        continue;
      }
      if (place->is_none()) *place = Dict();
      auto& dict = std::get<Dict>(place->data());
      const auto* text = std::get_if<std::string>(&step.data());
      place = &(text == nullptr ? dict[step.as<std::int64_t>("a key")] : dict[*text]);
    }
    return *place;
  }
  /// Numbers the tensors in the order of the tree, which is that of the file.
  void number(const Value& value, List& path, std::unordered_map<std::string, Whole>& wholes, List& order) {
    if (const auto* dict = std::get_if<Dict>(&value.data())) {
      for (const auto& [key, inner] : *dict) {
        path.items.push_back(std::visit([](const auto& any) { return Value(any); }, key));
        number(inner, path, wholes, order);
        path.items.pop_back();
      }
    } else if (const auto* list = std::get_if<List>(&value.data())) {
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        path.items.emplace_back(i);
        number(list->items[i], path, wholes, order);
        path.items.pop_back();
      }
    } else if (const auto* tensor = std::get_if<at::Tensor>(&value.data()); tensor != nullptr && is_stand_in(*tensor)) {
      const std::string id = JsonWriter::write(path);
      if (!by_storage_.emplace(tensor->storage().unsafeGetStorageImpl(), wholes_.size()).second) return;
      Whole& whole = wholes.at(id);
      require_cover(whole, id);
      if (const Spread::Part* part = spread_.part(*tensor)) whole.own = part->own;
      wholes_.push_back(std::move(whole));
      order.items.emplace_back(id);
    }
  }
  static void require_cover(const Whole& whole, const std::string& id) {
    std::vector<Box> boxes;
    std::int64_t covered = 0;
    for (const Source& source : whole.sources) {
      boxes.insert(boxes.end(), source.boxes.begin(), source.boxes.end());
      covered += source.numel;
    }
    if (covered == c10::multiply_integers(whole.sizes) && !overlap(boxes)) return;
    throw Error("fabric: save: the ranks' parts of " + id + " overlap, or do not cover it");
  }

  void receive() {
    Whole& whole = wholes_[next_];
    here_.resize(wholes_.size());
    const at::Tensor all = at::empty(whole.sizes, at::TensorOptions(whole.dtype));
    for (const Source& source : whole.sources) {
      at::Tensor part = whole.own;
      if (source.rank != 0) {
        // Mostly it can come to its place at once.
        const at::Tensor place = part_of(all, Box::whole(whole.sizes), source.boxes.front());
        const bool in_place = source.boxes.size() == 1 && place.is_contiguous() && world_.device.is_cpu();
        part = in_place ? place.view({-1}) : at::empty({source.numel}, all.options().device(world_.device));
        std::vector<at::Tensor> message{part};
        world_.group->recv(message, source.rank, tag)->wait();
        if (in_place) continue;
      }
      for_each_box(part, source.boxes, [&](const at::Tensor& own, const Box& box) {
        part_of(all, Box::whole(whole.sizes), box).copy_(own);
      });
    }
    whole.own = at::Tensor();
    here_[next_++] = all.view({-1});
  }

  const Spread& spread_;
  const World& world_;
  List parts_;
  List single_;
  std::unordered_set<const c10::TensorImpl*> seen_;
  std::unordered_map<std::string, const Spread::Part*> own_;
  std::vector<std::string> order_;
  std::unordered_map<const c10::StorageImpl*, std::size_t> by_storage_;
  std::vector<Whole> wholes_;
  std::vector<at::Tensor> here_;
  std::size_t next_ = 0;
};

}  // namespace fabric::detail
