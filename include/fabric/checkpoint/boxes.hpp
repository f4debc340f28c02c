// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

namespace fabric {

/// A part of a tensor, from `offsets` on, `sizes` large: both have one number for each dimension.
struct Box {
  std::vector<std::int64_t> offsets;
  std::vector<std::int64_t> sizes;

  /// The whole of a tensor.
  [[nodiscard]] static Box whole(at::IntArrayRef sizes) {
    return {std::vector<std::int64_t>(sizes.size(), 0), sizes.vec()};
  }
  /// How many elements it has; one if there are no dimensions.
  [[nodiscard]] std::int64_t numel() const {
    return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
  }
  friend bool operator==(const Box&, const Box&) = default;
};

namespace detail {

inline void add_boxes(at::IntArrayRef sizes, std::size_t dimension, Box& box, std::int64_t begin, std::int64_t end,
                      std::vector<Box>& boxes) {
  if (begin == end) return;
  if (dimension == sizes.size()) return boxes.push_back(box);
  std::int64_t row = 1;  // the elements of one step in this dimension
  for (std::size_t i = dimension + 1; i < sizes.size(); ++i) row *= sizes[i];
  const auto inside = [&](std::int64_t index, std::int64_t from, std::int64_t to) {
    box.offsets[dimension] = index;
    box.sizes[dimension] = 1;
    add_boxes(sizes, dimension + 1, box, from, to, boxes);
  };
  std::int64_t first = begin / row;
  const std::int64_t last = end / row;
  if (first == last) return inside(first, begin % row, end % row);
  if (begin % row != 0) inside(first++, begin % row, row);
  if (first < last) {
    Box full = box;
    full.offsets[dimension] = first;
    full.sizes[dimension] = last - first;
    for (std::size_t i = dimension + 1; i < sizes.size(); ++i) {
      full.offsets[i] = 0;
      full.sizes[i] = sizes[i];
    }
    boxes.push_back(std::move(full));
  }
  if (end % row != 0) inside(last, 0, end % row);
}

}  // namespace detail

/// The elements [begin, end) of a tensor in row-major order, as boxes: at most 2N - 1 for N dimensions. One after the
/// other, each in row-major order, they are the range in its order.
[[nodiscard]] inline std::vector<Box> boxes_of_range(at::IntArrayRef sizes, std::int64_t begin, std::int64_t end) {
  std::vector<Box> boxes;
  Box box = Box::whole(sizes);
  detail::add_boxes(sizes, 0, box, begin, end, boxes);
  return boxes;
}

/// What two boxes have in common; nothing if that has no elements.
[[nodiscard]] inline std::optional<Box> intersection(const Box& a, const Box& b) {
  Box common;
  for (std::size_t i = 0; i < a.sizes.size(); ++i) {
    const std::int64_t from = std::max(a.offsets[i], b.offsets[i]);
    const std::int64_t to = std::min(a.offsets[i] + a.sizes[i], b.offsets[i] + b.sizes[i]);
    if (from >= to) return std::nullopt;
    common.offsets.push_back(from);
    common.sizes.push_back(to - from);
  }
  return common;
}

/// The part `inner` of a tensor that is the part `outer` of a larger one, as a view.
[[nodiscard]] inline at::Tensor part_of(at::Tensor tensor, const Box& outer, const Box& inner) {
  for (std::size_t i = 0; i < inner.sizes.size(); ++i) {
    tensor = tensor.narrow(static_cast<std::int64_t>(i), inner.offsets[i] - outer.offsets[i], inner.sizes[i]);
  }
  return tensor;
}

/// Calls `visit(part, box)` for each box. `flat` (n) has their elements, one box after the other; `part` is a view of
/// those of one, in its sizes.
template <class Visit>
void for_each_box(const at::Tensor& flat, const std::vector<Box>& boxes, const Visit& visit) {
  std::int64_t done = 0;
  for (const Box& box : boxes) {
    visit(flat.narrow(0, done, box.numel()).view(box.sizes), box);
    done += box.numel();
  }
}

/// Do two of them share an element? Quick where they follow each other in some dimension, as the parts of ranks do.
[[nodiscard]] inline bool overlap(const std::vector<Box>& boxes) {
  if (boxes.size() < 2) return false;
  const std::size_t dimensions = boxes[0].sizes.size();
  if (dimensions == 0) return true;
  // Along the longest dimension: only boxes that are open at the same place there can meet.
  std::size_t along = 0;
  std::int64_t longest = -1;
  for (const Box& box : boxes) {
    for (std::size_t i = 0; i < dimensions; ++i) {
      if (box.offsets[i] + box.sizes[i] > longest) longest = box.offsets[along = i] + box.sizes[i];
    }
  }
  std::vector<const Box*> sorted;
  sorted.reserve(boxes.size());
  for (const Box& box : boxes) sorted.push_back(&box);
  std::sort(sorted.begin(), sorted.end(),
            [along](const Box* a, const Box* b) { return a->offsets[along] < b->offsets[along]; });
  std::vector<const Box*> open;
  for (const Box* box : sorted) {
    std::erase_if(open,
                  [&](const Box* other) { return other->offsets[along] + other->sizes[along] <= box->offsets[along]; });
    for (const Box* other : open) {
      if (intersection(*box, *other)) return true;
    }
    open.push_back(box);
  }
  return false;
}

}  // namespace fabric
