// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <unistd.h>

/// Shows how training goes: for each epoch a bar with the loss, images per second and the time left. Only on a
/// terminal, and only for the rank that prints.
class Progress {
 public:
  /// `steps` and `images` are those of an epoch, over all ranks; `done` steps were made before.
  Progress(bool shown, int epochs, std::int64_t steps, std::int64_t images, std::int64_t done)
      : shown_(shown && isatty(STDERR_FILENO) != 0),
        epochs_(epochs),
        steps_(steps),
        images_(images),
        done_before_(done) {}

  /// `done` steps have been made, the last one with that loss, for which a GPU is not waited for more than ten times a
  /// second.
  void step(std::int64_t done, const at::Tensor& loss) {
    if (!shown_) return;
    constexpr int width = 30;
    const std::int64_t epoch = (done - 1) / steps_;
    const std::int64_t of_epoch = done - epoch * steps_;
    const auto now = Clock::now();
    if (of_epoch < steps_ && now - drawn_ < std::chrono::milliseconds(100)) return;
    drawn_ = now;
    const double seconds_each = std::chrono::duration<double>(now - start_).count() /
                                static_cast<double>(std::max<std::int64_t>(1, done - done_before_));
    const double images_each = static_cast<double>(images_) / static_cast<double>(steps_);
    fmt::print(stderr, "\repoch {}/{} [{:<{}}] loss {:.4f}  {:.0f} images/s  {:.0f} s left \033[K{}", epoch + 1,
               epochs_, fmt::format("{:#<{}}", "", width * of_epoch / steps_), width, loss.item<double>(),
               images_each / seconds_each, seconds_each * static_cast<double>(epochs_ * steps_ - done),
               of_epoch == steps_ ? "\n" : "");
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool shown_;
  int epochs_;
  std::int64_t steps_;
  std::int64_t images_;
  std::int64_t done_before_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_;
};
