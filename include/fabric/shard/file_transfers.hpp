// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <unistd.h>
#ifdef FABRIC_WITH_LIBURING
#include <liburing.h>
#endif

#include "fabric/error.hpp"
#include "fabric/shard/nameless_file.hpp"

namespace fabric::detail {

/// Moves ranges between a file and memory. Where the program was built with liburing and the kernel lets it, this goes
/// on in the background, in several requests at once; otherwise `begin_...` returns when it is done.
class FileTransfers {
 public:
  /// `memory` is where the file's beginning belongs.
  FileTransfers(int descriptor, char* memory) : descriptor_(descriptor), memory_(memory) {
#ifdef FABRIC_WITH_LIBURING
    has_ring_ = io_uring_queue_init(depth, &ring_, 0) == 0;  // containers often forbid it
#endif
  }
  FileTransfers(const FileTransfers&) = delete;
  FileTransfers& operator=(const FileTransfers&) = delete;
  /// Waits for what was begun: the kernel must not write to memory that is no longer there.
  ~FileTransfers() {
#ifdef FABRIC_WITH_LIBURING
    if (!has_ring_) return;
    while (in_ring_ > 0) {
      io_uring_cqe* done = nullptr;
      if (io_uring_wait_cqe(&ring_, &done) != 0) continue;
      --in_ring_;
      io_uring_cqe_seen(&ring_, done);
    }
    io_uring_queue_exit(&ring_);
#endif
  }

  [[nodiscard]] bool in_background() const {
#ifdef FABRIC_WITH_LIBURING
    return has_ring_;
#else
    return false;
#endif
  }

  void begin_read(FileRange range) { begin(range, false); }
  void begin_write(FileRange range) { begin(range, true); }

  /// Waits for all that was begun of this range. Throws fabric::Error for a disk that fails.
  void finish([[maybe_unused]] FileRange range) {
#ifdef FABRIC_WITH_LIBURING
    while (open_.contains(range.begin)) reap();
#endif
  }

 private:
  struct Piece {
    bool write = false;
    std::int64_t of = 0;  // the range's beginning
    std::int64_t begin = 0;
    std::int64_t size = 0;
  };

  [[noreturn]] static void fail(const Piece& piece, int error) {
    throw Error(std::string("fabric: offload: the disk failed to ") + (piece.write ? "take " : "give back ") +
                in_mebibytes(piece.size) + ": " + std::generic_category().message(error));
  }

  void begin(FileRange range, bool write) {
    constexpr std::int64_t at_once = 4 << 20;
    for (std::int64_t at = 0; at < range.size; at += at_once) {
      const Piece piece{write, range.begin, range.begin + at, std::min(at_once, range.size - at)};
#ifdef FABRIC_WITH_LIBURING
      if (has_ring_) {
        ++open_[range.begin];
        submit(piece);
        continue;
      }
#endif
      move(piece);
    }
  }

  /// In this thread, to the end.
  void move(Piece piece) const {
    while (piece.size > 0) {
      const auto size = static_cast<std::size_t>(piece.size);
      const ssize_t moved = piece.write ? pwrite(descriptor_, memory_ + piece.begin, size, piece.begin)
                                        : pread(descriptor_, memory_ + piece.begin, size, piece.begin);
      if (moved < 0 && errno == EINTR) continue;
      if (moved <= 0) fail(piece, moved == 0 ? EIO : errno);
      piece.begin += moved;
      piece.size -= moved;
    }
  }

#ifdef FABRIC_WITH_LIBURING
  static constexpr unsigned depth = 64;

  void submit(const Piece& piece) {
    while (in_ring_ >= depth) reap();
    std::size_t slot = 0;
    if (free_.empty()) {
      slot = pieces_.size();
      pieces_.push_back(piece);
    } else {
      slot = free_.back();
      free_.pop_back();
      pieces_[slot] = piece;
    }
    io_uring_sqe* const entry = io_uring_get_sqe(&ring_);
    const auto size = static_cast<unsigned>(piece.size);
    const auto at = static_cast<std::uint64_t>(piece.begin);
    if (piece.write) {
      io_uring_prep_write(entry, descriptor_, memory_ + piece.begin, size, at);
    } else {
      io_uring_prep_read(entry, descriptor_, memory_ + piece.begin, size, at);
    }
    entry->user_data = slot;
    ++in_ring_;
    while (true) {
      const int submitted = io_uring_submit(&ring_);
      if (submitted >= 0) return;
      if (submitted != -EINTR && submitted != -EAGAIN) fail(piece, -submitted);
    }
  }

  /// Takes the result of one request, whichever comes next.
  void reap() {
    io_uring_cqe* done = nullptr;
    const int error = io_uring_wait_cqe(&ring_, &done);
    if (error == -EINTR || error == -EAGAIN) return;
    if (error != 0) throw Error("fabric: offload: io_uring failed: " + std::generic_category().message(-error));
    const auto slot = static_cast<std::size_t>(done->user_data);
    const int result = done->res;
    io_uring_cqe_seen(&ring_, done);
    --in_ring_;
    Piece piece = pieces_[slot];
    free_.push_back(slot);
    const bool again = result == -EINTR || result == -EAGAIN;
    if (result > 0) {
      piece.begin += result;
      piece.size -= result;
    }
    if (again || (result > 0 && piece.size > 0)) return submit(piece);  // part of it
    if (--open_[piece.of] == 0) open_.erase(piece.of);
    if (result <= 0) fail(piece, result == 0 ? EIO : -result);
  }

  io_uring ring_{};
  bool has_ring_ = false;
  unsigned in_ring_ = 0;
  std::vector<Piece> pieces_;
  std::vector<std::size_t> free_;
  std::map<std::int64_t, int> open_;  // how many pieces of a range are on their way, by where it begins
#endif

  int descriptor_;
  char* memory_;
};

}  // namespace fabric::detail
