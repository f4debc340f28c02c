// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <iostream>
#include <optional>
#include <string>

#include <boost/timer/progress_display.hpp>
#include <fmt/format.h>
#include <unistd.h>

/// Shows how training goes: a bar per epoch on a terminal, then a line with the loss, images per second and the time
/// left. Only for the rank that prints.
class Progress {
 public:
  Progress(bool shown, int epochs, std::size_t steps, std::size_t images)
      : shown_(shown),
        bar_shown_(shown && isatty(STDERR_FILENO) != 0),
        epochs_(epochs),
        steps_(steps),
        images_(images) {}

  void begin_epoch() {
    epoch_start_ = Clock::now();
    if (bar_shown_) bar_.emplace(steps_, std::cerr);
  }
  void step() {
    if (bar_) ++*bar_;
  }
  /// `loss` is the epoch's last.
  void end_epoch(int epoch, double loss) {
    if (!shown_) return;
    const double seconds = std::chrono::duration<double>(Clock::now() - epoch_start_).count();
    const double so_far = std::chrono::duration<double>(Clock::now() - start_).count();
    const double left = so_far / (epoch + 1) * (epochs_ - epoch - 1);
    fmt::print(stderr, "epoch {}/{}  loss {:.4f}  {:.0f} images/s  {:.0f} s left\n", epoch + 1, epochs_, loss,
               static_cast<double>(images_) / seconds, left);
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool shown_;
  bool bar_shown_;
  int epochs_;
  std::size_t steps_;
  std::size_t images_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point epoch_start_;
  std::optional<boost::timer::progress_display> bar_;
};
