# SPDX-License-Identifier: Apache-2.0
"""The transformer of the C++ loops in Python: autocast to bfloat16, AdamW(fused=True) and clip_grad_norm_.

Reads lines "LAYERS WIDTH HEADS VOCABULARY POSITIONS TOKENS ROWS STEPS" and answers each with the microseconds per step
and the last loss.
"""

import os
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "optimizers"))
from optimizers import Gpt  # noqa: E402


def make_loop(layers, width, heads, vocabulary, positions, tokens, rows):
    torch.manual_seed(0)
    model = Gpt(layers, width, heads, vocabulary, positions).cuda()
    text = torch.randint(vocabulary, (rows, tokens + 1)).cuda()
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return run


def main():
    loops = {}
    for line in sys.stdin:
        *task, steps = map(int, line.split())
        if tuple(task) not in loops:
            loops.clear()
            loops[tuple(task)] = make_loop(*task)
        start = time.perf_counter()
        loss = loops[tuple(task)](steps)
        print((time.perf_counter() - start) / steps * 1e6, loss, flush=True)


if __name__ == "__main__":
    main()
