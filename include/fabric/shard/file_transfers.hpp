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
    if (io_uring_queue_init(depth, &ring_, 0) != 0) return;         // containers often forbid it
    io_uring_probe* const probe = io_uring_get_probe_ring(&ring_);  // older kernels have fewer operations
    has_ring_ = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0 &&
                io_uring_opcode_supported(probe, IORING_OP_WRITE) != 0;
    io_uring_free_probe(probe);
    if (!has_ring_) io_uring_queue_exit(&ring_);
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

  /// Waits for all that was begun of this range. Throws fabric::Error if the disk has failed at any of it.
  void finish([[maybe_unused]] FileRange range) {
#ifdef FABRIC_WITH_LIBURING
    const auto open = open_.find(range.begin);
    if (open == open_.end()) return;
    while (open->second.pieces > 0) reap();
    const Open done = open->second;
    open_.erase(open);
    if (done.error != 0) fail(done.failed, done.error);
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
        ++open_[range.begin].pieces;
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
    (void)io_uring_submit(&ring_);  // what the kernel does not take now, it is given again by `reap`
  }

  /// Takes the result of one request, whichever comes next.
  void reap() {
    const int submitted = io_uring_submit_and_wait(&ring_, 1);
    if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) {
      throw Error("fabric: offload: io_uring failed: " + std::generic_category().message(-submitted));
    }
    io_uring_cqe* done = nullptr;
    if (io_uring_peek_cqe(&ring_, &done) != 0) return;
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
    Open& open = open_[piece.of];
    --open.pieces;
    if (result > 0) return;
    open.error = result == 0 ? EIO : -result;
    open.failed = piece;
  }

  /// What was begun of a range and is not finished.
  struct Open {
    int pieces = 0;  // on their way
    int error = 0;
    Piece failed{};
  };

  io_uring ring_{};
  bool has_ring_ = false;
  unsigned in_ring_ = 0;
  std::vector<Piece> pieces_;
  std::vector<std::size_t> free_;
  std::map<std::int64_t, Open> open_;  // by where the range begins
#endif

  int descriptor_;
  char* memory_;
};

}  // namespace fabric::detail
