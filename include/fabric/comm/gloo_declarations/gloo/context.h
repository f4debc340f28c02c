// SPDX-License-Identifier: Apache-2.0
#pragma once

// LibTorch's wheel has gloo inside its library but ships no gloo headers, which ProcessGroupGloo.hpp includes. It uses
// gloo's types behind pointers only, so that these declarations of the same names are enough to compile against it.
// A program that has gloo's own headers never sees this folder: it comes last on the include path.

#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

namespace transport {

class Device;

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer() = 0;
};

}  // namespace transport

namespace rendezvous {

class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::vector<char>& data) = 0;
  virtual std::vector<char> get(const std::string& key) = 0;
  virtual void wait(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) = 0;
};

}  // namespace rendezvous
}  // namespace gloo
