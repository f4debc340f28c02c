#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that a source does not compile, and that the compiler says why in our words.

    // expect: <regex>     must match within one line of the compiler's output; one or more such lines
    // needs: torch        compile with LibTorch's flags
    #ifdef FABRIC_TWIN     the corrected form of the same code, which must compile
    // harness: <regex>    (controls only) what this script must complain about

Usage: run.py SOURCE COMPILER [FLAG...]
"""

import os
import re
import resource
import subprocess
import sys

MEMORY = 6 << 30  # bytes of address space; a compiler needs one or two


def compile(compiler, source, flags):
    # Without carets the output holds no line of the source, and so never the expectation itself.
    is_clang = "clang" in os.path.realpath(compiler)
    carets = "-fno-caret-diagnostics" if is_clang else "-fno-diagnostics-show-caret"
    command = [compiler, "-std=c++20", "-fsyntax-only", carets, *flags, source]
    # An error that sends a compiler round in circles ends here, rather than with the machine's memory.
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", preexec_fn=limit)
    return result.returncode, result.stderr + result.stdout


def complaint(source, text, compiler, flags):
    """Why the source fails this test, or None."""
    expected = re.findall(r"^// expect: (.+)$", text, re.M)
    if not expected:
        return "the source has no '// expect: <regex>' line"
    status, output = compile(compiler, source, flags)
    if status == 0:
        return "it compiles, but must not"
    if re.search(r"out of memory|internal compiler error|frontend command failed|stack dump", output, re.I):
        return f"the compiler itself failed:\n{output}"
    for regex in expected:
        if not any(re.search(regex, line) for line in output.splitlines()):
            return f"no line of the output matches: {regex}\n{output}"
    status, output = compile(compiler, source, ["-DFABRIC_TWIN", *flags])
    if status != 0:
        return f"its twin (-DFABRIC_TWIN) must compile, but does not:\n{output}"
    return None


def main():
    source, compiler, *flags = sys.argv[1:]
    text = open(source, encoding="utf-8").read()
    problem = complaint(source, text, compiler, flags)
    control = re.search(r"^// harness: (.+)$", text, re.M)
    if control:
        if problem and re.search(control[1], problem):
            print(f"the harness noticed, as it must: {problem.splitlines()[0]}")
            return 0
        print(f"the harness must complain '{control[1]}', but said: {problem}")
        return 1
    if problem:
        print(f"{source} with {compiler}: {problem}")
        return 1
    return 0


sys.exit(main())
