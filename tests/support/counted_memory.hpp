// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace fabric::tests {

/// While alive, counts the bytes that tensors on the CPU have.
class CountedMemory : public c10::Allocator {
 public:
  CountedMemory() : inner_(c10::GetCPUAllocator()) {
    c10::SetCPUAllocator(this, priority);
    forget_peak();
  }
  ~CountedMemory() override { c10::SetCPUAllocator(inner_, priority); }
  CountedMemory(const CountedMemory&) = delete;
  CountedMemory& operator=(const CountedMemory&) = delete;

  [[nodiscard]] std::int64_t now() const { return now_; }
  [[nodiscard]] std::int64_t peak() const { return peak_; }
  void forget_peak() { peak_ = now_.load(); }

  c10::DataPtr allocate(std::size_t bytes) override {
    auto* begin = static_cast<unsigned char*>(std::aligned_alloc(alignment, rounded(bytes) + alignment));
    if (begin == nullptr) throw std::bad_alloc();
    std::memcpy(begin, &bytes, sizeof bytes);
    now_ += static_cast<std::int64_t>(bytes);
    peak_ = std::max(peak_.load(), now_.load());
    return {begin + alignment, begin + alignment, &release, at::Device(at::kCPU)};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static constexpr std::size_t alignment = 64;
  static std::size_t rounded(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }
  static void release(void* data) {
    if (data == nullptr) return;
    auto* begin = static_cast<unsigned char*>(data) - alignment;
    std::size_t bytes = 0;
    std::memcpy(&bytes, begin, sizeof bytes);
    now_ -= static_cast<std::int64_t>(bytes);
    std::free(begin);
  }

  static constexpr std::uint8_t priority = 100;
  // Static, since tensors may outlive it.
  inline static std::atomic<std::int64_t> now_ = 0;
  inline static std::atomic<std::int64_t> peak_ = 0;
  c10::Allocator* inner_;
};

}  // namespace fabric::tests
