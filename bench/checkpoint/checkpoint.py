# SPDX-License-Identifier: Apache-2.0
"""Python's torch.save and torch.load on a dict of tensors.

Reads lines "save PATH", "load PATH" and "load_mmap PATH", the file for loading being the one that C++ saved, and answers
each with the seconds that it took; "ready" with 0. A load ends with the values in tensors that were there before.
"""

import os
import sys
import time

import torch


def main():
    tensors, elements = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    state = {f"weight {i}": torch.randn(elements) for i in range(tensors)}
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        start = time.perf_counter()
        if command == "save":
            path += ".python"
            with open(path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        elif command.startswith("load"):
            loaded = torch.load(path, weights_only=True, mmap=command == "load_mmap")
            for key, value in state.items():
                value.copy_(loaded[key])
        print(time.perf_counter() - start if command != "ready" else 0, flush=True)


main()
