// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
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

/// What may be chosen of a `CsvLogger`.
struct CsvLoggerOptions {
  /// Go on with the file that is there: its rows of the first step that is logged and of later ones go, all others
  /// stay. So all rows count their steps alike. Else the file is replaced.
  bool resume = false;
};

/// Writes metrics to a CSV file with one column per name: "step" first, the others as they first appear. Numbers are
/// written so that reading them gives the same double. The file is complete after each row; a row that brings a new
/// name rewrites it once with a wider header.
class CsvLogger : public Logger {
 public:
  /// The file comes into being with the first row. Throws fabric::Error when its folder cannot be made.
  explicit CsvLogger(std::string path, const CsvLoggerOptions& options = {})
      : path_(std::move(path)), options_(options) {
    for (std::size_t slash = path_.find('/', 1); slash != std::string::npos; slash = path_.find('/', slash + 1)) {
      if (mkdir(path_.substr(0, slash).c_str(), 0777) != 0 && errno != EEXIST) fail("make the folder of");
    }
  }
  ~CsvLogger() override { close(); }
  CsvLogger(const CsvLogger&) = delete;
  CsvLogger& operator=(const CsvLogger&) = delete;

  void log_metrics(const Metrics& metrics, std::optional<std::int64_t> step) override {
    if (options_.resume && (step || columns_.empty())) take_over(step);
    if (step) options_.resume = false;
    Row row(columns_.size());
    const auto cell = [&](const std::string& name) -> std::string& {
      const std::size_t place = column(name);
      if (place == row.size()) row.emplace_back();
      return row[place];
    };
    if (step) cell("step") = std::to_string(*step);
    for (const auto& [name, value] : metrics) cell(name) = text_of(value);
    if (columns_.size() > columns_written_) {
      std::vector<Row> rows;
      if (columns_written_ > 0) rows = read();
      if (!rows.empty()) rows.erase(rows.begin());
      rewrite(rows);
    }
    write(file_, row);
    if (std::fflush(file_) != 0) fail("write");
  }

 private:
  using Row = std::vector<std::string>;

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

  /// Writes the header and these rows, whose cells for new columns are empty, and goes on behind them.
  void rewrite(const std::vector<Row>& rows) {
    close();
    const std::string next = path_ + ".tmp";
    std::FILE* file = std::fopen(next.c_str(), "w");
    if (file == nullptr) fail("write");
    Row header;
    for (const std::string& name : columns_) header.push_back(quoted(name));
    write(file, header);
    for (Row row : rows) {
      row.resize(columns_.size());
      write(file, row);
    }
    const bool whole = std::fflush(file) == 0 && std::ferror(file) == 0;
    if (std::fclose(file) != 0 || !whole || std::rename(next.c_str(), path_.c_str()) != 0) fail("write");
    file_ = std::fopen(path_.c_str(), "a");
    if (file_ == nullptr) fail("write");
    columns_written_ = columns_.size();
  }

  /// The rows of the file, its header first; none if there is no file. A last row without its end is left out.
  [[nodiscard]] std::vector<Row> read() const {
    std::vector<Row> rows;
    std::FILE* file = std::fopen(path_.c_str(), "r");
    if (file == nullptr) {
      if (errno != ENOENT) fail("read");
      return rows;
    }
    Row row(1);
    bool in_quotes = false;
    int before = 0;
    for (int c = std::getc(file); c != EOF; c = std::getc(file)) {
      if (c == '"') {
        // Inside quotes, two of them stand for one: the text goes on.
        if (!in_quotes && before == '"') row.back() += '"';
        in_quotes = !in_quotes;
      } else if (in_quotes || (c != ',' && c != '\n')) {
        row.back() += static_cast<char>(c);
      } else if (c == ',') {
        row.emplace_back();
      } else {
        rows.push_back(std::exchange(row, Row(1)));
      }
      before = c;
    }
    const bool whole = std::ferror(file) == 0;
    std::fclose(file);
    if (!whole) fail("read");
    return rows;
  }

  /// Keeps what the file has of the steps before this one.
  void take_over(std::optional<std::int64_t> step) {
    std::vector<Row> rows = read();
    if (rows.empty()) return;
    columns_ = rows.front();
    rows.erase(rows.begin());
    const auto place = static_cast<std::size_t>(std::find(columns_.begin(), columns_.end(), "step") - columns_.begin());
    std::erase_if(rows, [&](const Row& row) {
      std::int64_t logged = 0;
      if (!step || place >= row.size()) return false;
      const std::string& cell = row[place];
      return std::from_chars(cell.data(), cell.data() + cell.size(), logged).ec == std::errc() && logged >= *step;
    });
    rewrite(rows);
  }

  static void write(std::FILE* file, const Row& row) {
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
  CsvLoggerOptions options_;
  std::FILE* file_ = nullptr;
  Row columns_;
  std::size_t columns_written_ = 0;  // of them, how many the file's header has
};

}  // namespace fabric
