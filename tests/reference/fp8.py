# SPDX-License-Identifier: Apache-2.0
"""FP8 with delayed scaling in Python's PyTorch: writes fp8.json.gz beside itself, or into the folder that its argument
names.

The rules are those of NVIDIA Transformer Engine's DelayedScaling, written down once more here with PyTorch's FP8 types, since
that package runs on GPUs alone. All scales change when a backward ends. Tensors are as in quantised.py.
"""

import csv
import os
import sys

from same_everywhere import HERE, plain, run_again_without_special_kernels, write

run_again_without_special_kernels()

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
DIGITS = os.path.join(HERE, "../../examples/data/digits.csv")
GENERATOR = torch.Generator().manual_seed(3)
STEPS, ROWS, LR = 50, 32, 0.03125

RECIPES = {
    "default": {},
    "short history": {"amax_history_len": 4},
    "most recent": {"amax_history_len": 16, "amax_compute_algo": "most_recent"},
    "margin": {"margin": 3},
    "interval": {"interval": 5, "amax_history_len": 8},
    "E4M3": {"fp8_format": "E4M3", "amax_history_len": 16},
}


class Scaling:
    """The scale of one operand."""

    def __init__(self, dtype, margin=0, interval=1, amax_history_len=1024, amax_compute_algo="max", fp8_format="HYBRID"):
        self.dtype, self.margin, self.interval, self.algo = dtype, margin, interval, amax_compute_algo
        self.scale, self.history, self.steps = torch.tensor(1.0), torch.zeros(amax_history_len), 0

    def quantise(self, tensor):
        self.history[0] = torch.maximum(self.history[0], tensor.abs().max().float())
        largest = LARGEST[self.dtype]
        return (tensor.float() * self.scale).clamp(-largest, largest).to(self.dtype)

    def update(self):
        self.steps += 1
        if not torch.isfinite(self.history[0]):
            self.history[0] = 0
        amax = self.history.max() if self.algo == "max" else self.history[0].clone()
        if amax > 0 and self.steps % self.interval == 0:
            scale = torch.tensor(LARGEST[self.dtype]) / amax / 2**self.margin
            self.scale = torch.where(torch.isinf(scale), torch.tensor(torch.finfo(torch.float32).max), scale)
        self.history = torch.roll(self.history, -1)
        self.history[0] = 0


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        inverse_x, inverse_w = 1 / layer.x.scale, 1 / layer.w.scale
        x8, w8 = layer.x.quantise(x), layer.w.quantise(weight)
        ctx.save_for_backward(x8, w8, inverse_x, inverse_w)
        ctx.layer = layer
        return (x8.float() @ w8.float().t() * (inverse_x * inverse_w) + bias).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x8, w8, inverse_x, inverse_w = ctx.saved_tensors
        inverse_g = 1 / ctx.layer.g.scale
        g8 = ctx.layer.g.quantise(gradient)
        gx = (g8.float() @ w8.float() * (inverse_g * inverse_w)).to(gradient.dtype)
        gw = (g8.float().t() @ x8.float() * (inverse_g * inverse_x)).to(gradient.dtype)
        return gx, gw, gradient.sum(0), None


class Fp8Linear(torch.nn.Linear):
    def __init__(self, inputs, outputs, recipe):
        super().__init__(inputs, outputs)
        backward = E4M3 if recipe.get("fp8_format") == "E4M3" else E5M2
        self.x, self.w, self.g = Scaling(E4M3, **recipe), Scaling(E4M3, **recipe), Scaling(backward, **recipe)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return Product.apply(x.to(self.weight.dtype), self.weight, self.bias, self)

    def update(self):
        for scaling in (self.x, self.w, self.g):
            scaling.update()


class Net(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.first = Fp8Linear(64, 64, recipe)
        self.norm = torch.nn.LayerNorm(64)
        self.second = Fp8Linear(64, 32, recipe)
        self.head = torch.nn.Linear(32, 10)  # no multiple of 16

    def forward(self, x):
        return self.head(torch.relu(self.second(self.norm(torch.nn.functional.gelu(self.first(x))))))


def initial(net):
    """Whole numbers of 256ths, which bfloat16 holds exactly."""
    for name, parameter in net.named_parameters():
        if name.startswith("norm"):
            continue
        parameter.data = torch.randint(-48, 49, parameter.shape, generator=GENERATOR) / 256


def trace(recipe, dtype, weights):
    net = Net(recipe)
    net.load_state_dict(weights)
    net.to(dtype)
    with open(DIGITS) as file:
        rows = [[int(number) for number in row] for row, _ in zip(csv.reader(file), range(STEPS * ROWS // 2))]
    images = torch.tensor([row[:64] for row in rows], dtype=torch.float32) / 16
    labels = torch.tensor([row[64] for row in rows])
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        at = step * ROWS % len(rows)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = net(images[at : at + ROWS].to(dtype))
        loss = torch.nn.functional.cross_entropy(out.float(), labels[at : at + ROWS])
        loss.backward()
        optimizer.step()
        net.first.update()
        net.second.update()
        losses.append(loss.item())
    layer = net.second
    scales = torch.stack([layer.x.scale, layer.w.scale, layer.g.scale])
    histories = torch.stack([layer.x.history, layer.w.history, layer.g.history])[:, -16:]
    return {"losses": losses, "scale": scales, "amax_history": histories}


def codes():
    """Numbers around every border, and what each type makes of them at some scales."""
    edges = torch.tensor([0.0, -0.0, 447.9, 448, 449, 464, 480, 1e6, 57344, 57345, 61440, 1e30, float("inf"), float("nan")])
    small = 2.0 ** torch.arange(-20, 10)
    numbers = torch.cat([edges, -edges, small, small * 1.0625, -small * 1.9, torch.randn(200, generator=GENERATOR) * 30])
    result = {"numbers": numbers, "scales": torch.tensor([1.0, 0.375, 1000.0])}
    for name, dtype in (("E4M3", E4M3), ("E5M2", E5M2)):
        largest = LARGEST[dtype]
        scaled = [(numbers * scale).clamp(-largest, largest).to(dtype) for scale in result["scales"]]
        result[name] = [tensor.view(torch.uint8) for tensor in scaled]
    return result


def scalings():
    """Scales and histories of single operands whose magnitudes come in this order."""
    magnitudes = [3.0, 0.5, 0.0, float("inf"), 7.0, float("nan"), 1e-38, 1e-3, 2.0, 2.0, 1e5, 0.25]
    result = {"magnitudes": torch.tensor(magnitudes)}
    for name, recipe in RECIPES.items():
        recipe = {"amax_history_len": 5, **recipe}
        recipe["amax_history_len"] = min(recipe["amax_history_len"], 5)
        scaling, scales, histories = Scaling(E4M3, **recipe), [], []
        for magnitude in magnitudes:
            scaling.history[0] = magnitude
            scaling.update()
            scales.append(scaling.scale.clone())
            histories.append(scaling.history.clone())
        result[name] = {"scale": torch.stack(scales), "history": torch.stack(histories)}
    return result


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else HERE
    net = Net({})
    initial(net)
    weights = net.state_dict()
    traces = {"weights": weights, "lr": LR, "rows": ROWS}
    for name, recipe in RECIPES.items():
        traces[name] = trace(recipe, torch.bfloat16, weights)
    traces["half weights"] = trace({"amax_history_len": 16}, torch.float16, weights)
    write(os.path.join(folder, "fp8.json.gz"), plain({"codes": codes(), "scalings": scalings(), "traces": traces}))
