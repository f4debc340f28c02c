// SPDX-License-Identifier: Apache-2.0
// expect: refused for the right reason
// harness: its twin .* must compile, but does not
static_assert(sizeof(int) == 0, "refused for the right reason");
