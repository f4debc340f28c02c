// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <sys/stat.h>

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
  explicit CsvLogger(std::string path) : path_(std::move(path)) {
    for (std::size_t slash = path_.find('/', 1); slash != std::string::npos; slash = path_.find('/', slash + 1)) {
      if (mkdir(path_.substr(0, slash).c_str(), 0777) != 0 && errno != EEXIST) fail("make the folder of");
    }
  }
  ~CsvLogger() override { close(); }
  CsvLogger(const CsvLogger&) = delete;
  CsvLogger& operator=(const CsvLogger&) = delete;

  void log_metrics(const Metrics& metrics, std::optional<std::int64_t> step) override {
    std::vector<std::string> row(columns_.size());
    const auto cell = [&](const std::string& name) -> std::string& {
      const std::size_t place = column(name);
      if (place == row.size()) row.emplace_back();
      return row[place];
    };
    if (step) cell("step") = std::to_string(*step);
    for (const auto& [name, value] : metrics) cell(name) = text_of(value);
    if (columns_.size() > columns_written_) widen();
    write(file_, row);
    if (std::fflush(file_) != 0) fail("write");
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error(std::string("fabric: cannot ") + what + " " + path_ + ": " + std::strerror(errno));
  }

  std::size_t column(const std::string& name) {
    for (std::size_t i = 0; i < columns_.size(); ++i) {
      if (columns_[i] == name) return i;
    }
    columns_.push_back(name);
    return columns_.size() - 1;
  }

  /// Copies the rows so far under the new header, with empty cells for the new columns.
  void widen() {
    close();
    const std::string next = path_ + ".tmp";
    std::FILE* wider = std::fopen(next.c_str(), "w");
    if (wider == nullptr) fail("write");
    std::vector<std::string> header;
    for (const std::string& name : columns_) header.push_back(quoted(name));
    write(wider, header);
    if (columns_written_ > 0) copy_rows(wider);
    const bool whole = std::fflush(wider) == 0 && std::ferror(wider) == 0;
    if (std::fclose(wider) != 0 || !whole || std::rename(next.c_str(), path_.c_str()) != 0) fail("write");
    file_ = std::fopen(path_.c_str(), "a");
    if (file_ == nullptr) fail("write");
    columns_written_ = columns_.size();
  }

  /// The rows behind the header of the file as it is, each with as many empty cells more as there are new columns.
  void copy_rows(std::FILE* wider) const {
    std::FILE* narrow = std::fopen(path_.c_str(), "r");
    if (narrow == nullptr) return;
    const std::string added(columns_.size() - columns_written_, ',');
    bool in_header = true;
    bool in_quotes = false;  // where a name's line ends are no row's
    for (int c = std::getc(narrow); c != EOF; c = std::getc(narrow)) {
      if (!in_header) {
        if (c == '\n') std::fputs(added.c_str(), wider);
        std::putc(c, wider);
      }
      in_quotes = in_quotes != (c == '"');
      in_header = in_header && (c != '\n' || in_quotes);
    }
    std::fclose(narrow);
  }

  static void write(std::FILE* file, const std::vector<std::string>& row) {
    for (std::size_t i = 0; i < row.size(); ++i) std::fprintf(file, "%s%s", i == 0 ? "" : ",", row[i].c_str());
    std::putc('\n', file);
  }

  void close() {
    if (file_ != nullptr) std::fclose(std::exchange(file_, nullptr));
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

  std::string path_;
  std::FILE* file_ = nullptr;
  std::vector<std::string> columns_;
  std::size_t columns_written_ = 0;  // of them, how many the file's header has
};

}  // namespace fabric
