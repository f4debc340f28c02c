// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fabric/launch/link.hpp"

namespace fabric::detail {

/// Who a process says it is, when it comes.
struct Hello {
  std::string run{};  ///< Tells this job, and this attempt of it, from others.
  int rank = 0;
  int size = 1;
  int pid = 0;
  std::string network{};  ///< Equal for processes that share a loopback interface.
  std::string host{};
  std::string device{};     ///< The address at which it will listen for the others' tensors; empty: not known yet.
  std::string chosen_by{};  ///< "GLOO_SOCKET_IFNAME=lo", if a variable says so. Then
  int listens_at = 0;       ///< it listens at this port for others who try that address; 0: nowhere.

  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    for (const std::string* each : {&run, &network, &host, &device, &chosen_by}) out << *each << '\n';
    out << rank << ' ' << size << ' ' << pid << ' ' << listens_at;
    return out.str();
  }
  static std::optional<Hello> from(const std::string& text) {
    std::istringstream in(text);
    Hello hello;
    for (std::string* each : {&hello.run, &hello.network, &hello.host, &hello.device, &hello.chosen_by}) {
      if (!std::getline(in, *each)) return std::nullopt;
    }
    if (!(in >> hello.rank >> hello.size >> hello.pid >> hello.listens_at)) return std::nullopt;
    return hello;
  }

  /// Can the other process, on another host, be reached where it will listen? If not, why.
  [[nodiscard]] static std::string why_unreachable(const Hello& other, int port) {
    bool reached = !is_loopback(other.device);
    if (reached && port != 0) {
      constexpr int patience = 3000;
      const Link link = connect_to(other.device, port, patience);
      // An address that this host has itself, as that of a bridge for containers, leads nowhere else.
      reached = link.open() && address_of(link.fd()) != other.device;
    }
    if (reached) return {};
    return "rank " + std::to_string(other.rank) + " on " + other.host + " would listen on " + other.device +
           ", where other hosts cannot reach it" +
           (other.chosen_by.empty()
                ? ": name the interface that connects the hosts by GLOO_SOCKET_IFNAME"
                : ", because of " + other.chosen_by + ": unset it, or name the interface that connects the hosts");
  }
};

/// What the hub is to know.
struct HubOptions {
  Hello own;  ///< Rank 0's.
  int store_port = 0;
  std::chrono::milliseconds timeout{};  ///< For all to come.
  bool has_children = false;            ///< Somebody will tell how exactly a child ended.
  int output = STDERR_FILENO;           ///< Where the verdict is written; -1: nowhere.
};

/// Rank 0's part in keeping a job together. Every rank has a connection to it, all along. It lets them in, tells them
/// when all have come, and learns that one is gone because its connection ends. The first failure is the job's: it is
/// told to all, and printed once.
class Hub {
 public:
  Hub(int listener, HubOptions options)
      : listener_(listener), options_(std::move(options)), members_(static_cast<std::size_t>(options_.own.size)) {
    complete_by_ = Clock::now() + options_.timeout;
    constexpr auto patience = std::chrono::seconds(15);
    remind_at_ = Clock::now() + patience;
  }

  /// A connection for this process itself. To be called before `run`.
  Link own_link() {
    int ends[2] = {-1, -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return {};
    strangers_.push_back({Link(ends[0]), Clock::now()});
    return Link(ends[1]);
  }

  /// Serves until the process ends.
  [[noreturn]] void run() {
    for (;;) {
      std::vector<pollfd> fds{{listener_, POLLIN, 0}};
      for (const Stranger& stranger : strangers_) fds.push_back({stranger.link.fd(), POLLIN, 0});
      for (const Member& member : members_) fds.push_back({member.link.open() ? member.link.fd() : -1, POLLIN, 0});
      constexpr int idle = 1000;
      poll(fds.data(), fds.size(), decide_at_ ? milliseconds_until(*decide_at_) : idle);
      const std::size_t strangers = strangers_.size();
      for (std::size_t i = 0; i < members_.size(); ++i) {
        if (fds[1 + strangers + i].revents != 0) hear(static_cast<int>(i));
      }
      for (std::size_t i = strangers; i-- > 0;) {
        if (fds[1 + i].revents != 0) let_in(i);
      }
      if (fds[0].revents != 0) {
        const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd >= 0) {
          keep_alive(fd);
          strangers_.push_back({Link(fd), Clock::now()});
        }
      }
      // Whoever connects and says nothing is none of ours.
      std::erase_if(strangers_, [](const Stranger& s) { return Clock::now() - s.since > std::chrono::seconds(10); });
      if (!complete_ && Clock::now() > complete_by_) give_up();
      if (!complete_ && Clock::now() > remind_at_) remind();
      if (decide_at_ && Clock::now() >= *decide_at_) decide();
    }
  }

 private:
  struct Member {
    enum class State : char { absent, present, failed, left };
    Link link{};
    Hello hello{};
    State state = State::absent;
    int step = -1;  ///< How far it had come when somebody wanted to stop.
  };
  struct Stranger {
    Link link;
    Clock::time_point since;
  };
  struct Suspect {
    int rank;
    int code;
    std::string reason;
    bool died;          ///< Without having said so: nobody else's failure can be the reason.
    bool told = false;  ///< By the process that started it.
  };
  using State = Member::State;

  void let_in(std::size_t index) {
    Link& link = strangers_[index].link;
    const bool alive = link.read();
    const auto message = link.next();
    if (!message && alive) return;
    Link taken = std::move(link);
    strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(index));
    const auto hello = message && message->kind == Message::hello ? Hello::from(message->text) : std::nullopt;
    if (!hello) return;
    if (hello->run != options_.own.run) {
      taken.send({.kind = Message::other_run});
      return;
    }
    const std::string refusal = why_not(*hello);
    if (!refusal.empty()) {
      taken.send({.kind = Message::refused, .text = refusal});
      if (!complete_) suspect({hello->rank, 1, refusal, false});  // one of this job's ranks will never come
      return;
    }
    Member& member = members_[static_cast<std::size_t>(hello->rank)];
    member.link = std::move(taken);
    member.hello = *hello;
    member.state = State::present;
    member.link.send({.kind = Message::accepted, .text = options_.own.text()});
    const auto here = [](const Member& each) { return each.state != State::absent; };
    if (std::all_of(members_.begin(), members_.end(), here)) complete();
  }

  [[nodiscard]] std::string why_not(const Hello& hello) const {
    const std::string who = "process " + std::to_string(hello.pid) + " on " + hello.host;
    if (hello.size != options_.own.size) {
      return who + " takes part in a job of " + std::to_string(hello.size) + " processes, but rank 0 in one of " +
             std::to_string(options_.own.size) + ": start all with the same options";
    }
    if (hello.rank < 0 || hello.rank >= hello.size) {
      return who + " says that it is rank " + std::to_string(hello.rank) + " of " + std::to_string(hello.size);
    }
    const Member& member = members_[static_cast<std::size_t>(hello.rank)];
    if (member.state != State::absent) {
      return who + " says that it is rank " + std::to_string(hello.rank) + ", and so does process " +
             std::to_string(member.hello.pid) + " on " + member.hello.host +
             ": each process needs a rank of its own; look at the variables from which ranks are read";
    }
    return {};
  }

  void complete() {
    complete_ = true;
    const Hello& first = members_[0].hello;
    std::string own_address = "127.0.0.1";
    bool several_hosts = false;
    for (const Member& member : members_) {
      if (member.hello.network == first.network) continue;
      several_hosts = true;
      own_address = address_of(member.link.fd());  // by which somebody else reached this host
    }
    for (const Member& member : members_) {
      // Of those beside rank 0, only a loopback address is known not to be reached.
      const bool beside = member.hello.network == first.network;
      if (!several_hosts || (member.hello.chosen_by.empty() && (beside || !is_loopback(member.hello.device)))) continue;
      const std::string reason = Hello::why_unreachable(member.hello, beside ? 0 : member.hello.listens_at);
      if (!reason.empty()) return refuse_all(reason);
    }
    for (const Member& member : members_) {
      // Those beside rank 0 may know it by a loopback address only.
      const bool beside = member.hello.network == first.network;
      member.link.send(
          {.kind = Message::welcome, .number = options_.store_port, .text = beside ? own_address : std::string()});
    }
  }

  void refuse_all(const std::string& reason) {
    for (const Member& member : members_) {
      if (member.state == State::present) member.link.send({.kind = Message::refused, .text = reason});
    }
    ended_ = true;
  }

  [[nodiscard]] std::string missing() const {
    std::string missing;
    for (std::size_t i = 0; i < members_.size(); ++i) {
      if (members_[i].state == State::absent) missing += (missing.empty() ? "" : ", ") + std::to_string(i);
    }
    return missing;
  }

  void remind() {
    remind_at_ = Clock::time_point::max();
    const std::string text = "fabric: launch: rank 0 on " + options_.own.host + " still waits, of " +
                             std::to_string(options_.own.size) + " ranks, for these: " + missing() + "\n";
    if (options_.output >= 0) (void)!write(options_.output, text.data(), text.size());
  }

  void give_up() {
    complete_ = true;  // or as good as
    refuse_all("of " + std::to_string(options_.own.size) + " ranks these have not come within " +
               std::to_string(options_.timeout.count() / 1000) + " s: " + missing());
  }

  void hear(int rank) {
    Member& member = members_[static_cast<std::size_t>(rank)];
    const bool alive = member.link.read();
    while (const auto message = member.link.next()) {
      if (message->kind == Message::failed) {
        const bool itself = message->rank == rank;
        Member& about = members_[static_cast<std::size_t>(message->rank)];
        if (about.state == State::failed) continue;
        if (itself) about.state = State::failed;
        suspect({message->rank, message->number, message->text, !itself, !itself});
      } else if (message->kind == Message::goodbye) {
        member.state = State::left;
        const auto gone = [](const Member& each) { return each.state == State::left; };
        if (std::all_of(members_.begin(), members_.end(), gone)) {
          for (const Member& each : members_) each.link.send({.kind = Message::finished});
        }
        agree_on_stop();
      } else if (message->kind == Message::hold) {
        hold();
      } else if (message->kind == Message::at_step) {
        member.step = message->number;
        agree_on_stop();
      }
    }
    if (alive) return;
    member.link.close();
    if (member.state != State::present) return;
    suspect({rank, 128 + 9,
             "ended without a word: it was killed (for want of memory?), it crashed, or its host is gone", true,
             false});
  }

  void suspect(Suspect one) {
    if (ended_) return;
    for (Suspect& known : suspects_) {
      if (known.rank != one.rank || !known.died) continue;
      if (known.told) return;  // that its connection ends too is no news
      // How a child ended is better known to the process that started it, and then there is nothing to wait for.
      known = std::move(one);
      decide_at_ = Clock::now();
      return;
    }
    // A rank that dies takes the collectives of others along, and they may be heard first. But where a death is known
    // there is nothing to wait for, except the words of whoever started that process, who may be late on a busy host.
    const bool awaits_words = one.died && !one.told && options_.has_children;
    const int patience = awaits_words ? 2000 : one.died ? 0 : 300;
    const bool first_death =
        one.died && std::none_of(suspects_.begin(), suspects_.end(), [](const Suspect& s) { return s.died; });
    if (!decide_at_ || first_death) decide_at_ = Clock::now() + std::chrono::milliseconds(patience);
    suspects_.push_back(std::move(one));
  }

  void decide() {
    decide_at_.reset();
    if (std::exchange(ended_, true)) return;
    auto guilty = std::find_if(suspects_.begin(), suspects_.end(), [](const Suspect& s) { return s.died; });
    if (guilty == suspects_.end()) guilty = suspects_.begin();
    const bool known = guilty->rank >= 0 && guilty->rank < options_.own.size;
    const Hello who = known ? members_[static_cast<std::size_t>(guilty->rank)].hello : Hello{};
    std::string text = "fabric: rank " + std::to_string(guilty->rank) + " of " + std::to_string(options_.own.size);
    if (who.pid != 0) text += " (process " + std::to_string(who.pid) + " on " + who.host + ")";
    text += (guilty->died ? " " : " failed: ") + guilty->reason + "\nfabric: ending the other processes of this job\n";
    if (options_.output >= 0) (void)!write(options_.output, text.data(), text.size());
    const int code = guilty->code == 0 ? 1 : guilty->code;
    for (const Member& member : members_) {
      if (member.link.open()) member.link.send({Message::verdict, guilty->rank, code, text});
    }
  }

  void hold() {
    if (std::exchange(holding_, true)) return;
    for (const Member& member : members_) {
      if (member.state == State::present) member.link.send({.kind = Message::hold});
    }
  }
  void agree_on_stop() {
    if (!holding_ || stop_at_ >= 0) return;
    int last = -1;
    for (const Member& member : members_) {
      if (member.state == State::left) continue;
      if (member.step < 0) return;
      last = std::max(last, member.step);
    }
    stop_at_ = last + 1;
    for (const Member& member : members_) {
      if (member.state == State::present) member.link.send({.kind = Message::stop_at, .number = stop_at_});
    }
  }

  int listener_;
  HubOptions options_;
  std::vector<Member> members_;
  std::vector<Stranger> strangers_;
  std::vector<Suspect> suspects_;
  Clock::time_point complete_by_;
  Clock::time_point remind_at_;
  std::optional<Clock::time_point> decide_at_;
  bool complete_ = false;
  bool ended_ = false;
  bool holding_ = false;
  int stop_at_ = -1;
};

/// This host's name.
inline std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

/// Equal for processes that share a loopback interface.
inline std::string network_identity() {
  std::string identity;
  if (std::FILE* file = std::fopen("/proc/sys/kernel/random/boot_id", "re")) {
    char id[64] = "";
    if (std::fgets(id, sizeof id, file) != nullptr) identity.assign(id, std::strcspn(id, "\n"));
    std::fclose(file);
  }
  char space[PATH_MAX];
  const ssize_t length = readlink("/proc/self/ns/net", space, sizeof space);
  if (length > 0) identity.append(space, static_cast<std::size_t>(length));
  return identity.empty() ? host_name() : identity;
}

}  // namespace fabric::detail
