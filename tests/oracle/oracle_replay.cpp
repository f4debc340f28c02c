// SPDX-License-Identifier: Apache-2.0
// Reads rows in the oracle's schema and writes this library's answers: oracle_replay < rows.jsonl > answers.jsonl

#include <iostream>
#include <string>

#include "oracle/connector_row.hpp"

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    if (line.empty()) continue;
    std::cout << oracle::answer_connector_row(oracle::Json::parse(line)).dump() << '\n';
  }
}
