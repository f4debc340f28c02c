// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string_view>

#include "fabric/policy/text.hpp"

namespace fabric {

/// One environment variable.
struct Variable {
  std::string_view name;
  std::string_view value;
};

/// The answer to "is there one, and which": tested like a pointer. It is no pointer because g++ 12 takes the comparison
/// of a list in braces' address with null for no constant expression.
template <class T>
class Found {
 public:
  constexpr Found() = default;
  constexpr explicit Found(const T& value) : there_(true), value_(value) {}

  constexpr explicit operator bool() const { return there_; }
  constexpr const T* operator->() const { return &value_; }
  constexpr const T& operator*() const { return value_; }

 private:
  bool there_ = false;
  T value_{};
};

/// A view of environment variables. `capture_variables()` in `fabric/connector/probe.hpp` makes one of the process's
/// own; in a test or a static_assert a list in braces does: `{{"RANK", "0"}, {"WORLD_SIZE", "2"}}` (alive until the end
/// of the full expression, like any list in braces).
class Variables {
 public:
  constexpr Variables() = default;
  constexpr Variables(std::initializer_list<Variable> list) : count_(list.size()) {
    const Variable* const first = list.begin();  // by way of a local: g++ warns of a member made from begin()
    first_ = first;
  }
  constexpr Variables(const Variable* first, std::size_t count) : first_(first), count_(count) {}

  /// The variable of that name. One that is set but empty is found.
  [[nodiscard]] constexpr Found<Variable> find(std::string_view name) const {
    for (std::size_t i = 0; i < count_; ++i) {
      if (first_[i].name == name) return Found(first_[i]);
    }
    return {};
  }
  [[nodiscard]] constexpr bool has(std::string_view name) const { return bool(find(name)); }
  /// The value of that name, or `otherwise`.
  [[nodiscard]] constexpr std::string_view get(std::string_view name, std::string_view otherwise = {}) const {
    const Found<Variable> v = find(name);
    return v ? v->value : otherwise;
  }

  [[nodiscard]] constexpr const Variable* begin() const { return first_; }
  [[nodiscard]] constexpr const Variable* end() const { return first_ + count_; }

 private:
  const Variable* first_ = nullptr;
  std::size_t count_ = 0;
};

/// A file's text, for the few files that an environment consists of (LSF's rank file).
struct HostFile {
  std::string_view path;
  std::string_view text;
};

/// What an MPI library says of this process, for programs that are linked with one. None is needed: the launchers'
/// variables say the same.
struct MpiFacts {
  bool available = false;
  int size = 1;
  int rank = 0;
  int local_rank = 0;
  int main_port = 0;  ///< A port that rank 0 chose and told the others; 0 = none was agreed on.
  /// The host name of each rank, in order.
  const std::string_view* hosts = nullptr;
  std::size_t host_count = 0;
};

/// What the resolver knows of the machine. The defaults are a plain machine without accelerators;
/// `probe_host` in `fabric/connector/probe.hpp` asks the real one.
struct Host {
  int cuda_devices = 0;             ///< Visible NVIDIA GPUs, counted without creating a CUDA context.
  bool mps = false;                 ///< Has an Apple GPU.
  int tpu_devices = 0;              ///< XLA devices.
  bool interactive = false;         ///< Runs inside a notebook or REPL, so that the program cannot be started again.
  bool fork = true;                 ///< Can fork.
  bool srun = false;                ///< `srun` is on PATH.
  bool xla_engine = true;           ///< torch_xla was found.
  bool deepspeed_engine = true;     ///< The DeepSpeed engine was built.
  bool bitsandbytes_engine = true;  ///< The quantisation engine was built.
  bool transformer_engine = true;   ///< The FP8 engine was built.
  std::string_view hostname = "localhost";
  MpiFacts mpi{};
  const HostFile* files = nullptr;
  std::size_t file_count = 0;
  int cores = 0;  ///< Processor cores that this process may use; 0: not known.

  /// The file of that path, unless it cannot be read.
  [[nodiscard]] constexpr Found<HostFile> file(std::string_view path) const {
    for (std::size_t i = 0; i < file_count; ++i) {
      if (files[i].path == path) return Found(files[i]);
    }
    return {};
  }
};

}  // namespace fabric
