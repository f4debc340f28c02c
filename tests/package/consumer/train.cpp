// SPDX-License-Identifier: Apache-2.0
#include <fabric/libtorch.hpp>

int main() { return torch::ones({2}).sum().item<int>() == 2 ? 0 : 1; }
