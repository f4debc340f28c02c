# SPDX-License-Identifier: Apache-2.0
"""Training curves of Python's FSDP2 (`fully_shard`) on two processes: a transformer and a CNN with BatchNorm.

    fsdp2.py [FOLDER]    writes fsdp2.json.gz there, by default beside this script

Weights and batches come from `numbers`, which tests/support/sharding_models.hpp computes too, and exactly, so that none of
them is stored. Kernels for particular CPUs are turned off, so that x86 machines agree on the file.
"""

import os
import subprocess
import sys

from same_everywhere import HERE, run_again_without_special_kernels, write

if __name__ == "__main__":
    run_again_without_special_kernels()

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

RANKS, STEPS, ROWS, BATCHES = 2, 20, 4, 4  # ROWS of each rank; the batches come again and again
LR, EPS, WEIGHT_DECAY, MAX_NORM = 2e-3, 1e-6, 0.1, 1.0
WIDTH, HEADS, LAYERS, VOCABULARY, TOKENS = 32, 2, 4, 29, 12
# The masters' dtype, what is computed in, what gradients are summed in, the bound of their norm. In bfloat16 what differs in
# the last digit is soon a whole rounding apart, and a norm depends on the order of its sum: there is no clipping.
PRECISIONS = {
    "f64": (torch.float64, None, None, MAX_NORM),
    "f32": (torch.float32, None, None, MAX_NORM),
    "bf16": (torch.float32, torch.bfloat16, torch.float32, 1e9),
    "bf16, reduced in bf16": (torch.float32, torch.bfloat16, torch.bfloat16, 1e9),
}


def numbers(count, salt):
    """`count` whole numbers that look random, from -128 to 127."""
    mask = 0xFFFFFFFF
    index = torch.arange(count, dtype=torch.int64)
    x = (index * 2654435761 + salt * 40503) & mask
    x = ((x ^ (x >> 15)) * 2246822519) & mask
    return ((x ^ (x >> 13)) & 255) - 128


class Block(torch.nn.Module):
    """Attention and a feed-forward network, each on a normalised copy of its input."""

    def __init__(self):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = torch.nn.Linear(WIDTH, WIDTH)
        self.norm2 = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).view(x.size(0), x.size(1), 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(torch.nn.Module):
    """Tokens to the logits of the next ones."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.positions = torch.nn.Embedding(TOKENS, WIDTH)
        self.blocks = torch.nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1)))
        return self.head(self.norm(self.blocks(x)))

    @staticmethod
    def batch(step, rank):
        text = (numbers(ROWS * (TOKENS + 1), 1000 + (step % BATCHES) * 64 + rank) + 128) % VOCABULARY
        text = text.view(ROWS, TOKENS + 1)
        return text[:, :-1], text[:, 1:]


class Stage(torch.nn.Module):
    """A convolution that halves the image, normalised over the batch."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(channels_out)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Cnn(torch.nn.Module):
    """Grey images of 16 x 16 to the logits of 10 classes."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(Stage(1, 6), Stage(6, 10), Stage(10, 16))
        self.head = torch.nn.Linear(16 * 2 * 2, 10)

    def forward(self, x):
        return self.head(self.blocks(x).flatten(1))

    @staticmethod
    def batch(step, rank):
        salt = 5000 + (step % BATCHES) * 64 + rank
        return numbers(ROWS * 256, salt).view(ROWS, 1, 16, 16) / 128.0, (numbers(ROWS, salt + 7) + 128) % 10


def set_weights(model):
    """The n-th parameter from `numbers(n)`, near PyTorch's own initialisation: bounds are powers of two."""
    for salt, (name, parameter) in enumerate(model.named_parameters()):
        values = numbers(parameter.numel(), salt).view(parameter.shape) / 128.0
        bound = 0.125
        if parameter.dim() > 1:
            bound = 1.0
            while bound * bound * parameter[0].numel() > 1:
                bound /= 2
        values *= bound
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            values += 1
        with torch.no_grad():
            parameter.copy_(values)


def checksum(tensor, salt):
    """A sum in which each element has a weight of its own."""
    return (tensor.double().flatten() * numbers(tensor.numel(), 7000 + salt)).sum().item()


def train(make, precision, mesh, rank):
    dtype, param_dtype, reduce_dtype, max_norm = PRECISIONS[precision]
    model = make()
    set_weights(model)
    model.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        x, y = make.batch(step, rank)
        if x.is_floating_point():
            x = x.to(dtype)
        optimizer.zero_grad()
        # In 64 bits, so that what is compared is the model's digits.
        loss = torch.nn.functional.cross_entropy(model(x).double().flatten(0, -2), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).full_tensor()
        optimizer.step()
        all_losses = [torch.zeros((), dtype=torch.float64) for _ in range(RANKS)]
        dist.all_gather(all_losses, loss.detach())
        losses.append([entry.item() for entry in all_losses])
        norms.append(norm.item())
    trace = {"max_norm": max_norm, "losses": losses, "norms": norms, "parameters": {}, "buffers": {}}
    for salt, (name, parameter) in enumerate(model.named_parameters()):
        assert isinstance(parameter, DTensor)
        trace["parameters"][name] = checksum(parameter.detach().full_tensor(), salt)
    for name, buffer in model.named_buffers():  # rank 0's
        trace["buffers"][name] = checksum(buffer, 0)
    return trace


def work(rank, port):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, RANKS, rank == 0, wait_for_workers=False)
    if rank == 0:
        others = [subprocess.Popen([sys.executable, __file__, "--rank", str(other), str(store.port)]) for other in range(1, RANKS)]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    content = {"ranks": RANKS, "steps": STEPS, "rows": ROWS, "batches": BATCHES, "lr": LR, "eps": EPS,
               "weight_decay": WEIGHT_DECAY}
    for name, make in [("transformer", Transformer), ("cnn", Cnn)]:
        # A CPU has no BatchNorm of bfloat16 whose statistics are floats, which is what FSDP2 makes of it.
        precisions = [precision for precision in PRECISIONS if make is Transformer or not precision.startswith("bf16")]
        content[name] = {precision: train(make, precision, mesh, rank) for precision in precisions}
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        for other in others:
            assert other.wait() == 0
    return content


def main():
    if len(sys.argv) > 3:
        work(int(sys.argv[2]), int(sys.argv[3]))
        os._exit(0)  # past the end of PyTorch's threads, at which a process sometimes aborts
    content = work(0, 0)
    write(os.path.join(sys.argv[1] if len(sys.argv) > 1 else HERE, "fsdp2.json.gz"), content)
    os._exit(0)


if __name__ == "__main__":
    main()
