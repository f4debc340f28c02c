# SPDX-License-Identifier: Apache-2.0
"""Python's FSDP2 or DistributedDataParallel on processes over gloo, with the C++ programs' model, weights and batches.

    sharding.py fsdp2|ddp DEVICES LAYERS WIDTH HEADS ROWS VOCABULARY TOKENS

Reads lines with a number of steps and answers each with the microseconds per step and the last loss.
"""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).view(x.size(0), x.size(1), 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, layers, width, heads, vocabulary, tokens):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text):
        x = self.tokens(text) + self.positions(torch.arange(text.size(1)))
        return self.head(self.norm(self.blocks(x)))


def make_loop(kind, devices, rank, layers, width, heads, rows, vocabulary, tokens):
    torch.manual_seed(0)
    model = Transformer(layers, width, heads, vocabulary, tokens)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (devices,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.manual_seed(1 + rank)
    text = torch.randint(vocabulary, (rows, tokens + 1))
    inputs, targets = text[:, :-1], text[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the fastest on a CPU

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def main():
    kind, devices, *shape = sys.argv[1:9]
    devices, shape = int(devices), [int(number) for number in shape]
    rank, port = (int(sys.argv[9]), int(sys.argv[10])) if len(sys.argv) > 9 else (0, 0)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, devices, rank == 0, wait_for_workers=False)
    others = []
    if rank == 0:
        for other in range(1, devices):
            command = [sys.executable, *sys.argv, str(other), str(store.port)]
            others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=devices)
    run = make_loop(kind, devices, rank, *shape)
    while True:
        steps = torch.tensor(int((sys.stdin.readline() if rank == 0 else "") or 0))
        dist.broadcast(steps, 0)
        if steps == 0:
            break
        dist.barrier()
        start = time.perf_counter()
        loss = run(steps.item())
        if rank == 0:
            print((time.perf_counter() - start) / steps.item() * 1e6, loss, flush=True)
    dist.destroy_process_group()
    for other in others:
        other.wait()


main()
