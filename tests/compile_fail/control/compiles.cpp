// SPDX-License-Identifier: Apache-2.0
// expect: anything
// harness: it compiles, but must not
int main() {}
