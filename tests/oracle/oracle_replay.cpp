// SPDX-License-Identifier: Apache-2.0
// Reads rows in the oracle's schema and writes this library's answers: oracle_replay < rows.jsonl > answers.jsonl

#include <iostream>
#include <string>

#include "oracle/answer.hpp"

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    if (!line.empty()) std::cout << oracle::answer(oracle::Json::parse(line)).dump() << '\n';
  }
}
