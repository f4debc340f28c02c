// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace bench {

/// What a process that measures is asked to do: `bench_sharding --measure time --strategy ddp --model small ...`.
struct Task {
  std::string measure;  ///< `time` or `memory`.
  std::string strategy;
  std::string model;
  std::string devices;
};

/// Trains in 32 bits. The first rank reads lines with a number of steps and answers each with the microseconds per step
/// and the last loss, until there are no more.
void measure_time(const Task& task);
/// Builds the model, takes three steps in mixed precision, and prints a line of JSON: how far the memory of the rank
/// that took most has grown, and the parts of what it should be, in bytes.
void measure_memory(const Task& task);

}  // namespace bench
