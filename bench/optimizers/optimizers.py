# SPDX-License-Identifier: Apache-2.0
"""Python's AdamW(fused=True) and clip_grad_norm_, on the networks of the C++ loops.

Reads lines "mlp LAYERS WIDTH STEPS" or "gpt LAYERS WIDTH HEADS VOCABULARY POSITIONS TOKENS STEPS" and answers each with the
microseconds of processor time per step and the last loss.
"""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


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
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, layers, width, heads, vocabulary, positions):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def make_mlp(layers, width):
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())])
    return model, torch.randn(32, width), torch.rand(32, width), F.mse_loss


def make_gpt(layers, width, heads, vocabulary, positions, tokens):
    model = Gpt(layers, width, heads, vocabulary, positions)
    text = torch.randint(vocabulary, (1, tokens + 1))

    def loss_of(outputs, targets):
        return F.cross_entropy(outputs.view(-1, vocabulary), targets.flatten())

    return model, text[:, :-1], text[:, 1:], loss_of


def make_loop(kind, shape):
    torch.manual_seed(0)
    model, inputs, targets, loss_of = (make_mlp if kind == "mlp" else make_gpt)(*shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return run


def main():
    torch.set_num_threads(1)
    loops = {}
    for line in sys.stdin:
        kind, *shape, steps = line.split()
        key = (kind, *map(int, shape))
        if key not in loops:
            loops[key] = make_loop(kind, key[1:])
        start = time.process_time()
        loss = loops[key](int(steps))
        print((time.process_time() - start) / int(steps) * 1e6, loss, flush=True)


if __name__ == "__main__":
    main()
