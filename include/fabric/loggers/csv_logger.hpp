// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fabric/error.hpp"
#include "fabric/loggers/logger.hpp"

namespace fabric {

/// Writes metrics to a CSV file with one column per name: "step" first, the others as they first appear. Numbers are
/// written so that reading them gives the same double. The file is complete after each row; a row that brings a new
/// name rewrites it once with a wider header.
class CsvLogger : public Logger {
 public:
  /// Replaces what is at `path`. The file comes into being with the first row. Throws fabric::Error when its folder
  /// cannot be made.
  explicit CsvLogger(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code error;
    if (path_.has_parent_path()) std::filesystem::create_directories(path_.parent_path(), error);
    if (error) throw Error("fabric: cannot make the folder of " + path_.string() + ": " + error.message());
  }

  void log_metrics(const Metrics& metrics, std::optional<std::int64_t> step) override {
    std::map<std::size_t, std::string> row;
    if (step) row[column("step")] = std::to_string(*step);
    for (const auto& [name, value] : metrics) row[column(name)] = text_of(value);
    if (header_changed_) widen();
    write(row);
    file_.flush();
    if (!file_) throw Error("fabric: cannot write " + path_.string());
  }

 private:
  std::size_t column(const std::string& name) {
    for (std::size_t i = 0; i < columns_.size(); ++i) {
      if (columns_[i] == name) return i;
    }
    columns_.push_back(name);
    header_changed_ = true;
    return columns_.size() - 1;
  }

  /// Copies the rows so far under the new header, with empty cells for the new columns.
  void widen() {
    file_.close();
    auto next = path_;
    next += ".tmp";
    std::ofstream wider(next, std::ios::trunc);
    for (std::size_t i = 0; i < columns_.size(); ++i) wider << (i == 0 ? "" : ",") << quoted(columns_[i]);
    wider << '\n';
    if (columns_written_ > 0) {
      std::ifstream narrow(path_);
      std::string line;
      std::getline(narrow, line);
      while (std::getline(narrow, line)) wider << line << std::string(columns_.size() - columns_written_, ',') << '\n';
    }
    wider.close();
    std::error_code error;
    if (wider) std::filesystem::rename(next, path_, error);
    if (!wider || error) throw Error("fabric: cannot write " + path_.string());
    file_.open(path_, std::ios::app);
    columns_written_ = columns_.size();
    header_changed_ = false;
  }

  void write(const std::map<std::size_t, std::string>& row) {
    for (std::size_t i = 0; i < columns_.size(); ++i) {
      const auto cell = row.find(i);
      file_ << (i == 0 ? "" : ",") << (cell == row.end() ? "" : cell->second);
    }
    file_ << '\n';
  }

  static std::string text_of(double value) {
    char buffer[32];
    return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr};
  }

  static std::string quoted(const std::string& name) {
    if (name.find_first_of(",\"\n") == std::string::npos) return name;
    std::string result = "\"";
    for (const char c : name) result += c == '"' ? std::string("\"\"") : std::string(1, c);
    return result + '"';
  }

  std::filesystem::path path_;
  std::ofstream file_;
  std::vector<std::string> columns_;
  std::size_t columns_written_ = 0;
  bool header_changed_ = false;
};

}  // namespace fabric
