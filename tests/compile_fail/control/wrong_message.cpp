// SPDX-License-Identifier: Apache-2.0
// expect: the message of another mistake
// harness: no line of the output matches: the message of another mistake
#include <a_header_that_does_not_exist.hpp>
