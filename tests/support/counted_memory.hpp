// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace fabric::tests {

/// While alive, counts the bytes that tensors on the CPU have.
class CountedMemory : public c10::Allocator {
 public:
  CountedMemory() : inner_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, priority); }
  ~CountedMemory() override { c10::SetCPUAllocator(inner_, priority); }
  CountedMemory(const CountedMemory&) = delete;
  CountedMemory& operator=(const CountedMemory&) = delete;

  [[nodiscard]] std::int64_t now() const { return now_; }
  [[nodiscard]] std::int64_t peak() const { return peak_; }
  void forget_peak() { peak_ = now_; }

  c10::DataPtr allocate(std::size_t bytes) override {
    auto data = inner_->allocate(bytes);
    void* pointer = data.get();
    now_ += static_cast<std::int64_t>(bytes);
    peak_ = std::max(peak_, now_);
    return {pointer, new Counted{std::move(data), static_cast<std::int64_t>(bytes)}, &release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Counted {
    c10::DataPtr data;
    std::int64_t bytes;
  };
  static void release(void* context) {
    auto* counted = static_cast<Counted*>(context);
    now_ -= counted->bytes;
    delete counted;
  }

  static constexpr std::uint8_t priority = 100;
  // Static, since tensors may outlive it.
  inline static std::int64_t now_ = 0;
  inline static std::int64_t peak_ = 0;
  c10::Allocator* inner_;
};

}  // namespace fabric::tests
