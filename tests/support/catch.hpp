// SPDX-License-Identifier: Apache-2.0
#pragma once

// Catch2 2.x (Debian 12) has one header, 3.x (Ubuntu 24.04) another; tests include this one.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
using Catch::Matchers::ContainsSubstring;
#else
#include <string>

#include <catch2/catch.hpp>
inline auto ContainsSubstring(const std::string& text) { return Catch::Matchers::Contains(text); }
#endif
