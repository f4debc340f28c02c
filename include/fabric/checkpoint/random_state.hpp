// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <torch/types.h>

#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/value.hpp"
#include "fabric/comm/world.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// Stands for LibTorch's generators of random numbers, those of all ranks: on the CPU, and on each rank's own device.
/// In a state (`{"random", random}` with a `RandomState random;`) it makes dropout and the like go on after a resume as
/// if nothing had happened. The tensors are those of Python's `torch.get_rng_state()`.
class RandomState {
 public:
  /// On rank 0 {"cpu": [a tensor for each rank], "device": [a tensor or None for each rank]}.
  [[nodiscard]] Value state_dict(Ranks& ranks) const {
    List cpu;
    List device;
    for (const std::string& text : ranks.gather(bytes_of(generator(at::kCPU)))) cpu.items.push_back(tensor_of(text));
    const at::Device own = ranks.world().device;
    for (const std::string& text : ranks.gather(own.is_cuda() ? bytes_of(generator(own)) : "")) {
      device.items.push_back(text.empty() ? Value() : Value(tensor_of(text)));
    }
    return Dict{{"cpu", std::move(cpu)}, {"device", std::move(device)}};
  }

  /// Takes this rank's part. Throws fabric::Error if the job had another number of ranks.
  void load_state_dict(const Value& state, const World& world, bool check_only) {
    const Dict& dict = state.as<Dict>("the state of the random numbers");
    const at::Tensor cpu = part_of(dict, "cpu", world);
    const at::Tensor device = part_of(dict, "device", world);
    if (!cpu.defined()) throw Error("fabric: there is no state of the CPU's random numbers");
    if (device.defined() != world.device.is_cuda()) {
      throw Error(std::string("fabric: the random numbers were those of ") + (device.defined() ? "GPUs" : "CPUs") +
                  ", and this job runs on the other");
    }
    if (check_only) {
      check(at::kCPU, cpu);
      if (device.defined()) check(world.device, device);
      return;
    }
    set(at::kCPU, cpu);
    if (device.defined()) set(world.device, device);
  }

 private:
  static at::Generator generator(at::Device device) { return at::globalContext().defaultGenerator(device); }

  static std::string bytes_of(const at::Generator& of) {
    const at::Tensor state = of.get_state().contiguous();
    return {static_cast<const char*>(state.const_data_ptr()), state.nbytes()};
  }
  static at::Tensor tensor_of(const std::string& bytes) {
    at::Tensor tensor = at::empty({static_cast<std::int64_t>(bytes.size())}, at::kByte);
    std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
    return tensor;
  }
  /// A generator of the same kind says whether it can take a state.
  static void check(at::Device device, const at::Tensor& state) {
    try {
      generator(device).clone().set_state(state);
    } catch (const c10::Error& error) {
      throw Error(std::string("fabric: it is no state of random numbers: ") + error.what_without_backtrace());
    }
  }
  static void set(at::Device device, const at::Tensor& state) {
    at::Generator own = generator(device);
    const std::lock_guard lock(own.mutex());
    own.set_state(state.clone());
  }

  static at::Tensor part_of(const Dict& dict, const char* kind, const World& world) {
    const auto& parts = dict.at(kind).as<List>(kind).items;
    detail::check_ranks(parts.size(), world);
    const Value& own = parts[static_cast<std::size_t>(world.global_rank)];
    return own.is_none() ? at::Tensor() : own.as<at::Tensor>(kind);
  }
};

}  // namespace fabric
