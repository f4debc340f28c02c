// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace fabric {

/// Does the address reach this host only?
[[nodiscard]] inline bool is_loopback(const std::string& address) {
  return address == "localhost" || address.starts_with("127.") || address == "::1";
}

namespace detail {

/// What the processes of a job tell each other besides tensors.
struct Message {
  enum Kind : char {
    hello = 'h',     ///< I am this rank of that run. To the hub.
    accepted = 'y',  ///< Yes; wait for the others.
    other_run = 'o',
    refused = 'r',   ///< With the reason.
    welcome = 'w',   ///< All have come; the number is the store's port.
    failed = 'f',    ///< That rank failed, with that exit code and reason. To the hub.
    goodbye = 'b',   ///< I end, and all is well. To the hub.
    finished = 'x',  ///< All have said goodbye.
    verdict = 'v',   ///< The job ends because of that rank.
    hold = 'k',      ///< Somebody wants to stop: say at which step you are.
    at_step = 's',   ///< I am between that step and the next one, and wait. To the hub.
    stop_at = 'n',   ///< All stop after that step.
  };
  char kind = hello;
  int rank = 0;
  int number = 0;
  std::string text{};
};

using Clock = std::chrono::steady_clock;

inline int milliseconds_until(Clock::time_point time) {
  constexpr auto most = std::chrono::minutes(1);
  const auto now = Clock::now();
  if (time <= now) return 0;
  const auto left = time - now < most ? time - now : most;
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(left).count());
}

/// Polls one descriptor; EINTR counts as nothing to read.
inline bool readable(int fd, int milliseconds) {
  pollfd entry{fd, POLLIN, 0};
  return poll(&entry, 1, milliseconds) > 0;
}

/// A connection between two processes that carries messages. Sending is for any thread that holds the owner's lock,
/// reading for one.
class Link {
 public:
  Link() = default;
  explicit Link(int fd) : fd_(fd) {}
  Link(Link&& other) noexcept : fd_(std::exchange(other.fd_, -1)), buffer_(std::move(other.buffer_)) {}
  Link& operator=(Link&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;
  ~Link() { close(); }

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] bool open() const { return fd_ >= 0; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  /// False when the other side is gone.
  bool send(const Message& message) const {  // NOLINT(modernize-use-nodiscard): a reader notices too
    Header header{message.kind, message.rank, message.number, static_cast<std::uint32_t>(message.text.size())};
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
    bytes += message.text;
    for (std::size_t sent = 0; sent < bytes.size();) {
      const ssize_t n = ::send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      sent += static_cast<std::size_t>(n);
    }
    return true;
  }

  /// Takes what has arrived; false at the end, or if no process of ours speaks there.
  bool read() {
    char bytes[4096];
    const ssize_t n = recv(fd_, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n > 0) buffer_.append(bytes, static_cast<std::size_t>(n));
    const bool waits = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
    return (n > 0 || waits) && plausible();
  }

  /// The next message that has arrived whole.
  std::optional<Message> next() {
    Header header;
    if (buffer_.size() < sizeof header) return std::nullopt;
    std::memcpy(&header, buffer_.data(), sizeof header);
    if (buffer_.size() < sizeof header + header.length) return std::nullopt;
    Message message{header.kind, header.rank, header.number, buffer_.substr(sizeof header, header.length)};
    buffer_.erase(0, sizeof header + header.length);
    return message;
  }

  /// Waits for the next message; nothing when the connection ends or the time is over.
  std::optional<Message> wait(Clock::time_point deadline) {
    for (;;) {
      if (auto message = next()) return message;
      const int left = milliseconds_until(deadline);
      if (left == 0) return std::nullopt;
      if (readable(fd_, left) && !read()) return std::nullopt;
    }
  }

 private:
  struct Header {
    char kind;
    std::int32_t rank;
    std::int32_t number;
    std::uint32_t length;
    std::uint32_t magic = 0xfab51c01;
  };
  [[nodiscard]] bool plausible() const {
    Header header;
    if (buffer_.size() < sizeof header) return true;
    std::memcpy(&header, buffer_.data(), sizeof header);
    return header.magic == Header{}.magic && header.length <= 1U << 20U;
  }

  int fd_ = -1;
  std::string buffer_;
};

/// The numeric form of one end of a socket: "10.0.0.7".
inline std::string address_of(int fd, bool peer = false) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  char text[NI_MAXHOST] = "";
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  if ((peer ? getpeername(fd, raw, &size) : getsockname(fd, raw, &size)) == 0) {
    getnameinfo(raw, size, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  }
  const std::string numeric = text;
  return numeric.starts_with("::ffff:") ? numeric.substr(7) : numeric;
}

inline int port_of(int listener) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                             : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

/// Notices a peer whose host is gone within 10 seconds, though it can say nothing; a stopped process is no such peer.
inline void keep_alive(int fd) {
  const auto set = [fd](int level, int name, int value) { setsockopt(fd, level, name, &value, sizeof value); };
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef __linux__
  set(IPPROTO_TCP, TCP_KEEPIDLE, 3);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 9000);
#endif
  set(IPPROTO_TCP, TCP_NODELAY, 1);
}

/// A socket that listens on `port` (0: one that the system chooses) for connections to `address`: from this host alone
/// if that is a loopback address, else from everywhere. -1 and errno when that port is taken.
inline int listen_on(const std::string& address, int port) {
  const bool local = is_loopback(address);
  for (const int family : {AF_INET6, AF_INET}) {
    if (local && family == AF_INET6) continue;
    const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    const int yes = 1;
    const int no = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_storage where{};
    socklen_t size = sizeof(sockaddr_in);
    if (family == AF_INET6) {
      setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
      auto* v6 = reinterpret_cast<sockaddr_in6*>(&where);
      v6->sin6_family = AF_INET6;
      v6->sin6_port = htons(static_cast<std::uint16_t>(port));
      size = sizeof(sockaddr_in6);
    } else {
      auto* v4 = reinterpret_cast<sockaddr_in*>(&where);
      v4->sin_family = AF_INET;
      v4->sin_port = htons(static_cast<std::uint16_t>(port));
      v4->sin_addr.s_addr = htonl(local ? INADDR_LOOPBACK : INADDR_ANY);
      if (local) inet_pton(AF_INET, address.c_str(), &v4->sin_addr);  // Debian's hosts have a 127.0.1.1, too
    }
    if (bind(fd, reinterpret_cast<sockaddr*>(&where), size) == 0 && listen(fd, SOMAXCONN) == 0) return fd;
    const int error = errno;
    ::close(fd);
    errno = error;
    if (error == EADDRINUSE || error == EACCES) return -1;
  }
  return -1;
}

/// Connects within `milliseconds`; a closed link and errno if not.
inline Link connect_to(const std::string& address, int port, int milliseconds) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  errno = EHOSTUNREACH;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return {};
  int connected = -1;
  for (const addrinfo* each = found; each != nullptr && connected < 0; each = each->ai_next) {
    const int fd = socket(each->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) continue;
    bool done = connect(fd, each->ai_addr, each->ai_addrlen) == 0;
    if (!done && errno == EINPROGRESS) {
      pollfd entry{fd, POLLOUT, 0};
      int error = ETIMEDOUT;
      socklen_t size = sizeof error;
      if (poll(&entry, 1, milliseconds) > 0) getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
      done = error == 0;
      errno = error;
    }
    if (done) {
      connected = fd;
    } else {
      const int error = errno;
      ::close(fd);
      errno = error;
    }
  }
  freeaddrinfo(found);
  if (connected < 0) return {};
  fcntl(connected, F_SETFL, fcntl(connected, F_GETFL) & ~O_NONBLOCK);
  keep_alive(connected);
  return Link(connected);
}

}  // namespace detail
}  // namespace fabric
