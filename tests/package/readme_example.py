#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that the example in the README is the program that the package tests build and run. Usage: README PROGRAM"""

import re
import sys

readme, program = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
example = re.search(r"```cpp\n(.*?)```", readme, re.S)[1]
if example.strip() not in program:
    sys.exit(f"{sys.argv[2]} is not the example of {sys.argv[1]}")
