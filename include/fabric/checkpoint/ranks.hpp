// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/types.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// All ranks during one save or load. They meet at the store of their process group and not in collectives, so that a
/// rank which does not come is known by its number after some time, instead of being waited for without end.
class Ranks {
 public:
  /// Each save or load makes one, on all ranks in the same order. `what` says which it is.
  Ranks(const World& world, std::string what, std::chrono::milliseconds patience)
      : world_(world), what_(std::move(what)), patience_(patience) {
    if (!world.group) return;
    static std::uint64_t meetings = 0;
    store_ = world.group->getStore();
    prefix_ = "checkpoint/" + std::to_string(meetings++) + "/";
  }

  [[nodiscard]] const World& world() const { return world_; }

  /// Waits for all ranks and throws fabric::Error on all of them if one has a problem, or does something else, or does
  /// not come in time; DamagedCheckpoint if that is the first problem. In a world of one it throws the problem as it
  /// is.
  void agree(const std::exception_ptr& problem = nullptr) { agree(problem, patience_); }
  void agree(const std::exception_ptr& problem, std::chrono::milliseconds patience) {
    if (!store_) {
      if (problem) std::rethrow_exception(problem);
      return;
    }
    const auto answers = gather(what_ + '\n' + text_of(problem), patience);
    std::string verdict;  // begins with the mark of damage, if it is that
    for (std::size_t rank = 0; rank < answers.size(); ++rank) {
      const std::size_t end = answers[rank].find('\n');
      const std::string doing = answers[rank].substr(0, end);
      std::string failed = answers[rank].substr(end + 1);
      if (doing != what_) {
        verdict = "fabric: rank 0 is in " + what_ + ", and rank " + std::to_string(rank) + " in " + doing +
                  ": all ranks must do the same";
        break;
      }
      if (!failed.empty() && verdict.empty()) {
        const std::size_t text = failed[0] == damage ? 1 : 0;
        if (rank > 0) failed.insert(text, "rank " + std::to_string(rank) + ": ");
        verdict = std::move(failed);
      }
    }
    verdict = from_zero(verdict, patience);
    if (verdict.empty()) return;
    if (problem && text_of(problem) == verdict) std::rethrow_exception(problem);
    if (verdict[0] == damage) throw DamagedCheckpoint(verdict.substr(1));
    throw Error(verdict);
  }

  /// The texts of all ranks in their order, on rank 0; nothing on the others.
  std::vector<std::string> gather(const std::string& own) { return gather(own, patience_); }

  /// Rank 0's text, on all ranks.
  std::string from_zero(const std::string& own) { return from_zero(own, patience_); }

 private:
  static constexpr char damage = '\x01';  // in front of what a DamagedCheckpoint says

  static std::string text_of(const std::exception_ptr& problem) {
    if (!problem) return "";
    try {
      std::rethrow_exception(problem);
    } catch (const DamagedCheckpoint& error) {
      return damage + std::string(error.what());
    } catch (const std::exception& error) {
      return error.what();
    } catch (...) {
      return "fabric: an unknown exception";
    }
  }

  std::vector<std::string> gather(const std::string& own, std::chrono::milliseconds patience) {
    if (!store_) return {own};
    const std::string key = prefix_ + std::to_string(step_++) + "/";
    set(key + std::to_string(world_.global_rank), own);
    std::vector<std::string> all;
    if (world_.global_rank != 0) return all;
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (int rank = 0; rank < world_.size; ++rank) {
      const std::string theirs = key + std::to_string(rank);
      if (!wait(theirs, deadline)) refuse_missing(key);
      const auto bytes = store_->get(theirs);
      all.emplace_back(bytes.begin(), bytes.end());
    }
    for (int rank = 0; rank < world_.size; ++rank) store_->deleteKey(key + std::to_string(rank));
    return all;
  }

  std::string from_zero(const std::string& own, std::chrono::milliseconds patience) {
    if (!store_) return own;
    const std::string key = prefix_ + std::to_string(step_++) + "/verdict";
    if (world_.global_rank == 0) {
      set(key, own);
      return own;
    }
    // Rank 0 waits for the others first, and a little longer for it to say so.
    const auto deadline = std::chrono::steady_clock::now() + patience + std::chrono::seconds(5);
    if (!wait(key, deadline)) {
      throw Error("fabric: " + what_ + " was called on rank " + std::to_string(world_.global_rank) +
                  ", but rank 0 did not come within " + seconds(patience) + ": every rank must call it");
    }
    const auto bytes = store_->get(key);
    return {bytes.begin(), bytes.end()};
  }

  [[noreturn]] void refuse_missing(const std::string& key) {
    std::string came;
    std::string missing;
    for (int rank = 0; rank < world_.size; ++rank) {
      std::string& list = store_->check({key + std::to_string(rank)}) ? came : missing;
      list += (list.empty() ? "" : ", ") + std::to_string(rank);
    }
    const std::string reason = "fabric: " + what_ + " was called on rank " + came + ", but not on rank " + missing +
                               " within " + seconds(patience_) + ": every rank must call it, rank 0 writes";
    set(prefix_ + std::to_string(step_++) + "/verdict", reason);  // for the others that came
    throw Error(reason);
  }

  static std::string seconds(std::chrono::milliseconds time) {
    std::string text = std::to_string(static_cast<double>(time.count()) / 1000);
    text.resize(text.find('.') + 2);
    return text + " s";
  }

  void set(const std::string& key, const std::string& text) {
    store_->set(key, std::vector<std::uint8_t>(text.begin(), text.end()));
  }
  bool wait(const std::string& key, std::chrono::steady_clock::time_point deadline) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return store_->check({key});
    try {
      store_->wait({key}, left);
      return true;
    } catch (const c10::Error&) {  // the time is over
      return false;
    }
  }

  const World& world_;
  std::string what_;
  std::chrono::milliseconds patience_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::string prefix_;
  std::uint64_t step_ = 0;
};

namespace detail {

/// Of a text the store takes no more than some MB at once.
inline constexpr std::size_t text_at_once = std::size_t{4} << 20U;

/// The texts of all ranks, however long, on rank 0.
[[nodiscard]] inline std::vector<std::string> gather_long(Ranks& ranks, const std::string& own) {
  std::size_t longest = 0;
  for (const std::string& size : ranks.gather(std::to_string(own.size()))) {
    longest = std::max<std::size_t>(longest, std::stoull(size));
  }
  longest = std::stoull(ranks.from_zero(std::to_string(longest)));
  std::vector<std::string> all;
  for (std::size_t done = 0; done < longest; done += text_at_once) {
    const auto parts = ranks.gather(done < own.size() ? own.substr(done, text_at_once) : "");
    all.resize(parts.size());
    for (std::size_t i = 0; i < parts.size(); ++i) all[i] += parts[i];
  }
  return all;
}
/// Rank 0's text, however long, on all ranks.
[[nodiscard]] inline std::string from_zero_long(Ranks& ranks, const std::string& own) {
  const std::size_t size = std::stoull(ranks.from_zero(std::to_string(own.size())));
  std::string text;
  while (text.size() < size) {
    text += ranks.from_zero(ranks.world().is_global_zero() ? own.substr(text.size(), text_at_once) : "");
  }
  return text;
}

/// Throws unless something that differs by rank was saved by as many ranks as there are.
inline void check_ranks(std::size_t saved, const World& world) {
  if (saved == static_cast<std::size_t>(world.size)) return;
  throw Error("fabric: it was saved by " + std::to_string(saved) + " ranks, and this job has " +
              std::to_string(world.size) + ": resume on as many, or load with strict = false to leave it out");
}

}  // namespace detail
}  // namespace fabric
