// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/types.h>

namespace fabric::detail {

/// A stream of a device beside the current one. It knows CUDA only through LibTorch's registry of devices, so that it
/// compiles without CUDA's headers.
class SideStream {
 public:
  explicit SideStream(at::Device device)
      : stream_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)), done_(device.type()) {}

  /// Calls `work` with this stream as the current one.
  template <class Work>
  auto run(Work&& work) const {
    const c10::StreamGuard guard(stream_);
    return std::forward<Work>(work)();
  }
  /// Lets this stream wait for what is queued on the current one.
  void follow() const {
    c10::Event here(stream_.device_type());
    here.record(current());
    here.block(stream_);
  }
  /// Marks what was queued until now as that which `join` is about.
  void mark() { done_.record(stream_); }
  /// Lets the current stream, which it returns, wait for the mark; the host does not wait.
  c10::Stream join() const {
    const c10::Stream here = current();
    done_.block(here);
    return here;
  }
  /// The host waits for all that was queued.
  void synchronize() const { stream_.synchronize(); }

  /// The memory of `tensor`, which the current stream has, is not given to anybody else before this one has done with
  /// it.
  void keep(const at::Tensor& tensor) const { tensor.record_stream(stream_); }

 private:
  [[nodiscard]] c10::Stream current() const {
    return c10::impl::VirtualGuardImpl(stream_.device_type()).getStream(stream_.device());
  }

  c10::Stream stream_;
  c10::Event done_;
};

}  // namespace fabric::detail
