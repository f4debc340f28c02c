# SPDX-License-Identifier: Apache-2.0
"""Loss curves of a small CNN and a small transformer under each precision of Lightning Fabric on a CPU.

    training_traces.py [FOLDER]    writes training_traces.json.gz there, by default beside this script

The weights are whole numbers of 256ths, which every precision can hold; the batches are the first 1600 handwritten digits in
their order. Kernels for particular CPUs are turned off, so that x86 machines agree on the file.
"""

import csv
import os
import sys

from same_everywhere import HERE, run_again_without_special_kernels, write

if __name__ == "__main__":
    run_again_without_special_kernels()

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

DIGITS = os.path.join(HERE, "../../examples/data/digits.csv")
PRECISIONS = ["64-true", "32-true", "16-true", "bf16-true", "bf16-mixed", "16-mixed"]
STEPS, ROWS, LR, MOMENTUM = 50, 32, 0.02, 0.5
SCALER = {"init_scale": 2.0**24, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 8}
MAX_NORM = 1.0  # clipping, for 16-mixed alone


class Cnn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.second = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = torch.nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x.unsqueeze(1))))
        return self.head(torch.relu(self.second(x)).flatten(1))


class Transformer(torch.nn.Module):
    """The rows of an image are its tokens."""

    def __init__(self):
        super().__init__()
        self.position = torch.nn.Parameter(torch.zeros(8, 16))
        self.embed = torch.nn.Linear(8, 16)
        self.norm1 = torch.nn.LayerNorm(16)
        self.qkv = torch.nn.Linear(16, 48)
        self.proj = torch.nn.Linear(16, 16)
        self.norm2 = torch.nn.LayerNorm(16)
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm1(x)).view(-1, 8, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def initial_weights(model):
    """Numbers of 256ths, near PyTorch's own initialisation."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            values = torch.full(parameter.shape, 256.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * 256 / fan_in**0.5
        weights[name] = values.round().int().flatten().tolist()
    return weights


def batches():
    with open(DIGITS) as file:
        rows = [[int(number) for number in row] for row, _ in zip(csv.reader(file), range(STEPS * ROWS))]
    images = torch.tensor([row[:64] for row in rows]).view(-1, ROWS, 8, 8) / 16.0 - 0.5
    return list(zip(images, torch.tensor([row[64] for row in rows]).view(-1, ROWS)))


def train(make, weights, precision):
    scaler = None
    if precision == "16-mixed":  # Lightning would fall back to bf16-mixed on a CPU if asked by the flag
        scaler = torch.amp.GradScaler("cpu", **SCALER)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision(precision, "cpu", scaler))
    else:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with fabric.init_module():
        module = make()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_((torch.tensor(weights[name]) / 256.0).view_as(parameter))
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM, foreach=False))
    trace = {"losses": []}
    for x, y in batches():
        optimizer.zero_grad()
        # In 64 bits, so that what is compared is the model's digits.
        loss = torch.nn.functional.cross_entropy(model(x).double(), y)
        fabric.backward(loss)
        if scaler:
            trace.setdefault("scales", []).append(scaler.get_scale())
            norm = fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM, error_if_nonfinite=False).item()
            trace.setdefault("norms", []).append(norm if norm < float("inf") else None)
        optimizer.step()
        trace["losses"].append(loss.item())
    return trace


def main():
    torch.set_num_threads(1)
    content = {"steps": STEPS, "rows": ROWS, "lr": LR, "momentum": MOMENTUM, "scaler": SCALER, "max_norm": MAX_NORM}
    for name, make in [("cnn", Cnn), ("transformer", Transformer)]:
        weights = initial_weights(make())
        traces = {precision: train(make, weights, precision) for precision in PRECISIONS}
        content[name] = {"weights": weights, "traces": traces}
    write(os.path.join(sys.argv[1] if len(sys.argv) > 1 else HERE, "training_traces.json.gz"), content)


if __name__ == "__main__":
    main()
