// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string_view>

#include "fabric/connector/integer.hpp"

namespace fabric {

/// The hosts of an LSF job, without memory of their own: either the text of a rank file (a host a line, the launch node
/// first, then one line for each task) or the value of LSB_MCPU_HOSTS (host and number of slots in turn), which is the
/// same in short. Blank lines are no hosts.
class LsfHosts {
 public:
  constexpr LsfHosts() = default;
  [[nodiscard]] static constexpr LsfHosts from_rank_file(std::string_view text) { return {text, false}; }
  [[nodiscard]] static constexpr LsfHosts from_mcpu_hosts(std::string_view value) { return {value, true}; }

  /// The host of rank 0: the one after the launch node. Empty when there is none.
  [[nodiscard]] constexpr std::string_view main_host() const {
    Cursor cursor = begin();
    return cursor.next() && cursor.next() ? cursor.host : std::string_view{};
  }

  /// The place of `host` among the job's different hosts, the launch node's line left out; -1 when it is not there.
  /// A host is known by its full name, or by its short name where the list has only that.
  [[nodiscard]] constexpr int node_rank(std::string_view host) const {
    const int rank = count_before(host);
    if (rank >= 0) return rank;
    const std::size_t dot = detail::find(host, '.');
    return dot == std::string_view::npos ? -1 : count_before(host.substr(0, dot));
  }

 private:
  constexpr LsfHosts(std::string_view text, bool counted) : text_(text), counted_(counted) {}

  /// One line of a rank file after another.
  struct Cursor {
    std::string_view rest;
    bool counted = false;
    std::string_view host{};
    long long left = 0;        ///< How often `host` comes again.
    std::size_t consumed = 0;  ///< Where in the text the cursor stands.

    constexpr bool next() {
      if (left > 0) return --left, true;
      host = word(counted ? ' ' : '\n');
      if (host.empty()) return false;
      if (counted) {
        const Integer slots = parse_integer(word(' '));
        left = slots.valid && slots.value > 1 ? slots.value - 1 : 0;
      }
      return true;
    }

    /// The next host that differs from this one's neighbours.
    constexpr bool next_run() {
      const std::string_view before = host;
      left = 0;
      while (next()) {
        left = 0;
        if (host != before) return true;
      }
      return false;
    }

    constexpr std::string_view word(char separator) {
      while (!rest.empty()) {
        const std::size_t end = rest.find(separator);
        const std::string_view token = trimmed(rest.substr(0, end));
        const std::size_t used = end == std::string_view::npos ? rest.size() : end + 1;
        rest.remove_prefix(used);
        consumed += used;
        if (!token.empty()) return token;
      }
      return {};
    }
  };

  [[nodiscard]] constexpr Cursor begin() const { return {.rest = text_, .counted = counted_}; }

  /// How many different hosts come before `host`, or -1 when it does not come.
  [[nodiscard]] constexpr int count_before(std::string_view host) const {
    Cursor cursor = begin();
    if (!cursor.next()) return -1;
    // Right after the launch node; its own line must not hide a first task on the same host.
    if (!cursor.next()) return -1;
    Cursor const first = cursor;
    int count = 0;
    for (bool more = true; more; more = cursor.next_run()) {
      if (cursor.host == host) return count;
      Cursor earlier = first;
      bool seen = false;
      for (bool again = earlier.consumed < cursor.consumed; again && !seen;) {
        seen = earlier.host == cursor.host;
        again = earlier.next_run() && earlier.consumed < cursor.consumed;
      }
      count += seen ? 0 : 1;
    }
    return -1;
  }

  std::string_view text_;
  bool counted_ = false;
};

}  // namespace fabric
