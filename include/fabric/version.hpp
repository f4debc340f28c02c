// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Version of the library; CMake reads it from these three lines.
#define FABRIC_VERSION_MAJOR 0
#define FABRIC_VERSION_MINOR 1
#define FABRIC_VERSION_PATCH 0
