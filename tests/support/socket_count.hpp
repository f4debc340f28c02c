// SPDX-License-Identifier: Apache-2.0
//
// Counts what gloo writes to its sockets. Included by one source of a program, since it defines `writev`, by which gloo
// writes everything: LibTorch then calls this one, which looks at the bytes and hands them to the kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace fabric::tests {

/// What this process has sent to the other ranks through gloo.
struct SocketCount {
  std::uint64_t payload = 0;   ///< Bytes of the collectives' tensors.
  std::uint64_t messages = 0;  ///< In how many pieces; empty ones count.
  std::uint64_t notices = 0;   ///< "ready to send" and "ready to receive", of which there may be more or fewer.

  /// Each message and each notice begins with one, gloo/transport/tcp/pair.h's preamble.
  static constexpr std::uint64_t preamble = 48;
  /// All bytes, with preambles.
  [[nodiscard]] std::uint64_t bytes() const { return payload + preamble * (messages + notices); }

  friend SocketCount operator-(const SocketCount& a, const SocketCount& b) {
    return {a.payload - b.payload, a.messages - b.messages, a.notices - b.notices};
  }
  friend bool operator==(const SocketCount&, const SocketCount&) = default;
};

namespace detail {

/// Follows each socket's stream from preamble to preamble.
class SocketCounter {
 public:
  static SocketCounter& instance() {
    static auto* const counter = new SocketCounter;  // gloo's threads write until the process ends
    return *counter;
  }

  void wrote(int socket, const iovec* pieces, int number, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    Stream& stream = streams_[socket];
    for (int i = 0; i < number && bytes > 0; ++i) {
      const std::size_t size = std::min(bytes, pieces[i].iov_len);
      follow(stream, static_cast<const unsigned char*>(pieces[i].iov_base), size);
      bytes -= size;
    }
  }
  SocketCount count() {
    const std::lock_guard lock(mutex_);
    return count_;
  }
  /// The sockets that have been written to and are still open.
  std::vector<int> sockets() {
    const std::lock_guard lock(mutex_);
    std::vector<int> result;
    for (const auto& [socket, stream] : streams_) result.push_back(socket);
    return result;
  }

 private:
  struct Stream {
    unsigned char head[SocketCount::preamble];
    std::size_t have = 0;    // bytes of the next preamble
    std::uint64_t left = 0;  // bytes of payload that are still to come
  };

  void follow(Stream& stream, const unsigned char* at, std::size_t size) {
    while (size > 0) {
      if (stream.left > 0) {
        const auto taken = static_cast<std::size_t>(std::min<std::uint64_t>(stream.left, size));
        stream.left -= taken;
        count_.payload += taken;
        at += taken;
        size -= taken;
        continue;
      }
      const std::size_t taken = std::min(size, sizeof stream.head - stream.have);
      std::memcpy(stream.head + stream.have, at, taken);
      stream.have += taken;
      at += taken;
      size -= taken;
      if (stream.have < sizeof stream.head) continue;
      stream.have = 0;
      std::uint64_t fields[2];  // all bytes of the message, what it is
      std::memcpy(fields, stream.head, sizeof fields);
      constexpr std::uint64_t notify_send_ready = 2;
      if (fields[1] >= notify_send_ready) {
        ++count_.notices;
      } else {
        ++count_.messages;
        stream.left = fields[0] - sizeof stream.head;
      }
    }
  }

  std::mutex mutex_;
  std::map<int, Stream> streams_;
  SocketCount count_;
};

inline bool is_tcp(int socket) {
  int domain = 0;
  socklen_t size = sizeof domain;
  return getsockopt(socket, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && (domain == AF_INET || domain == AF_INET6);
}

}  // namespace detail

/// Since the process began. A collective has sent all of its bytes when `wait()` on it returns.
inline SocketCount socket_count() { return detail::SocketCounter::instance().count(); }

/// What the kernel says of the same sockets: all bytes that were given to it, also those that it has yet to send. -1
/// where it does not say.
inline std::int64_t bytes_in_kernel() {
  std::int64_t sum = 0;
  for (const int socket : detail::SocketCounter::instance().sockets()) {
    // linux/tcp.h's tcp_info, of which the C library's header knows the beginning only and with which it conflicts.
    struct {
      unsigned char before[144];
      std::uint32_t notsent_bytes;
      unsigned char between[52];
      std::uint64_t bytes_sent;
      std::uint64_t bytes_retrans;
    } info{};
    static_assert(sizeof info == 216);
    socklen_t size = sizeof info;
    if (getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) continue;
    if (size < sizeof info) return -1;
    sum += static_cast<std::int64_t>(info.bytes_sent - info.bytes_retrans) + info.notsent_bytes;
  }
  return sum;
}

}  // namespace fabric::tests

/// Stands for the C library's `writev` in this program.
extern "C" ssize_t counted_writev(int file, const iovec* pieces, int number) __asm__("writev");

// NOLINTNEXTLINE(misc-definitions-in-headers): one source of a program includes this
extern "C" ssize_t counted_writev(int file, const iovec* pieces, int number) {
  const ssize_t written = syscall(SYS_writev, file, pieces, number);
  if (written > 0 && fabric::tests::detail::is_tcp(file)) {
    fabric::tests::detail::SocketCounter::instance().wrote(file, pieces, number, static_cast<std::size_t>(written));
  }
  return written;
}
