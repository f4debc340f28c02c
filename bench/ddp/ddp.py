# SPDX-License-Identifier: Apache-2.0
"""Python's DistributedDataParallel on two processes over gloo, in the same loop as the C++ ones.

Reads lines "LAYERS WIDTH STEPS" and answers each with the microseconds per step.
"""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import nn


def make_loop(layers, width, rank):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())])
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.manual_seed(1 + rank)
    inputs, targets = torch.randn(32, width), torch.rand(32, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()

    return run


def main():
    rank, port = (1, int(sys.argv[1])) if len(sys.argv) > 1 else (0, 0)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, wait_for_workers=False)
    if rank == 0:
        peer = subprocess.Popen([sys.executable, __file__, str(store.port)], stdin=subprocess.DEVNULL)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    loops = {}
    while True:
        line = sys.stdin.readline() if rank == 0 else ""
        order = torch.tensor([int(word) for word in line.split()] or [0, 0, 0])
        dist.broadcast(order, 0)
        layers, width, steps = order.tolist()
        if steps == 0:
            break
        if (layers, width) not in loops:
            loops[layers, width] = make_loop(layers, width, rank)
        dist.barrier()
        start = time.perf_counter()
        loops[layers, width](steps)
        if rank == 0:
            print((time.perf_counter() - start) / steps * 1e6, flush=True)
    dist.destroy_process_group()
    if rank == 0:
        peer.wait()


main()
