// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "fabric/checkpoint/value.hpp"
#include "fabric/data/data_loader.hpp"
#include "fabric/data/stream_loader.hpp"
#include "fabric/error.hpp"

namespace fabric {

namespace detail {

/// What the order of rows depends on.
template <class Loader>
[[nodiscard]] Dict row_order(const Loader& loader) {
  const Shares& shares = loader.sampler().shares();
  return {{"rows", loader.sampler().dataset_rows()},
          {"ranks", shares.replicas},
          {"batch_size", loader.options().batch_size},
          {"shuffle", shares.shuffle},
          {"seed", shares.seed},
          {"pad", shares.pad},
          {"drop_last", loader.options().drop_last}};
}

/// Throws fabric::Error, with all differences, if `saved` has other values of what is in `now`.
inline void require_same_order(const Dict& now, const Dict& saved) {
  std::string differences;
  for (const auto& [key, own] : now) {
    const Value& theirs = saved.at(key);
    if (own.as_number("") == theirs.as_number(to_text(key))) continue;
    const auto shown = [](const Value& value) {
      return std::to_string(static_cast<std::int64_t>(value.as_number("")));
    };
    differences += (differences.empty() ? "" : ", ") + to_text(key) + " was " + shown(theirs) + " and is " + shown(own);
  }
  if (!differences.empty()) {
    throw Error("fabric: a data loader cannot go on where the other was, since its rows come in another order: " +
                differences);
  }
}

/// What the place in a stream depends on.
template <class Loader>
[[nodiscard]] Dict stream_order(const Loader& loader) {
  return {{"ranks", loader.world().size},
          {"batch_size", loader.options().batch_size},
          {"drop_last", loader.options().drop_last}};
}

}  // namespace detail

template <class Dataset>
Value DataLoader<Dataset>::state_dict() const {
  const Given now = place();
  Dict state = detail::row_order(*this);
  state["epoch"] = now.epoch;
  state["batches"] = now.batches;
  return state;
}

template <class Dataset>
void DataLoader<Dataset>::load_state_dict(const Value& state) {
  const Dict& saved = state.as<Dict>("the state of a data loader");
  detail::require_same_order(detail::row_order(*this), saved);
  const auto epoch = saved.at("epoch").as<std::int64_t>("epoch");
  const auto batches = saved.at("batches").as<std::int64_t>("batches");
  if (epoch < 0 || batches < 0 || static_cast<std::uint64_t>(batches) > size()) {
    throw Error("fabric: a data loader of " + std::to_string(size()) + " batches cannot go on at batch " +
                std::to_string(batches) + " of epoch " + std::to_string(epoch));
  }
  next_ = {static_cast<std::uint64_t>(epoch), static_cast<std::size_t>(batches)};
  loops_.clear();
}

template <class Dataset>
Value StreamLoader<Dataset>::state_dict() const {
  const Given now = place();
  Dict state = detail::stream_order(*this);
  state["epoch"] = now.epoch;
  state["batches"] = now.batches;
  if constexpr (Stream::saves) {
    if (now.after) {
      state["rank"] = world_.global_rank;
      state["dataset"] = *now.after;
    }
  }
  return state;
}

template <class Dataset>
void StreamLoader<Dataset>::load_state_dict(const Value& state) {
  const Dict& saved = state.as<Dict>("the state of a data loader");
  detail::require_same_order(detail::stream_order(*this), saved);
  const auto epoch = saved.at("epoch").template as<std::int64_t>("epoch");
  const auto batches = saved.at("batches").template as<std::int64_t>("batches");
  if (epoch < 0 || batches < 0) {
    throw Error("fabric: a data loader cannot go on at batch " + std::to_string(batches) + " of epoch " +
                std::to_string(epoch));
  }
  Given loaded{static_cast<std::uint64_t>(epoch), static_cast<std::size_t>(batches), {}};
  if constexpr (Stream::saves) {
    if (const Value* dataset = saved.find("dataset")) {
      if (const auto rank = saved.at("rank").template as<std::int64_t>("rank"); rank != world_.global_rank) {
        throw Error("fabric: the state of rank " + std::to_string(rank) + "'s data set was given to rank " +
                    std::to_string(world_.global_rank) + ": save PerRank(loader), so that each rank gets its own back");
      }
      loaded.after = *dataset;
    }
  }
  next_ = std::move(loaded);
  given_.reset();
}

}  // namespace fabric
