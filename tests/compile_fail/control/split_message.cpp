// SPDX-License-Identifier: Apache-2.0
// expect: first half.*second half
// harness: no line of the output matches: first half
#ifndef FABRIC_TWIN
static_assert(sizeof(int) == 0, "first half");
static_assert(sizeof(int) == 0, "second half");
#endif
