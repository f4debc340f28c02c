# SPDX-License-Identifier: Apache-2.0
"""What Python's bitsandbytes makes of tensors and layers: writes bitsandbytes.json.gz beside itself, or into the folder
that its argument names.

A tensor is {"dtype", "shape", "data"}, the data being its elements' bytes in hexadecimal. The file is the same on every x86
machine: kernels for particular CPUs are turned off.

One thing is not as the package has it. For the gradient of an int8-training weight, version 0.50.2 multiplies the codes
of the gradient's *rows* by the maxima of its *columns*; with rows of different sizes the result has little to do with the
gradient. Here the codes are the columns', which is what LLM.int8() means.
"""

import os
import sys

from same_everywhere import HERE, plain, run_again_without_special_kernels, write

run_again_without_special_kernels()

import logging

logging.disable(logging.WARNING)

import torch

try:
    import bitsandbytes.functional as F
except ImportError:
    print("skipped: there is no Python package bitsandbytes")
    sys.exit(77)
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
from bitsandbytes.nn import Linear4bit, Linear8bitLt

THRESHOLD = 6.0
GENERATOR = torch.Generator().manual_seed(5)
STEPS, ROWS = 50, 32


@torch.library.impl("bitsandbytes::int8_double_quant", "CPU")
def int8_double_quant(A, threshold=0.0):
    """The package has this for GPUs alone."""
    rows, row_stats, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant.default(A, threshold=threshold)
    if threshold > 0:
        A = A.masked_fill(A.abs() >= threshold, 0)
    column_stats = A.abs().amax(dim=0).float()
    columns = torch.round(A.mul(127.0) / column_stats.unsqueeze(0)).to(torch.int8)
    # Called without a threshold for gradients alone: see the top.
    return rows if threshold > 0 else columns, columns, row_stats, column_stats, outliers


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=GENERATOR) * scale).to(dtype)


def coarse(*shape):
    """Whole numbers of 256ths, which every dtype holds."""
    return torch.randint(-64, 65, shape, generator=GENERATOR) / 256


def tensors():
    cases = {
        "32-bit": random(24, 64),
        "bfloat16": random(16, 64, dtype=torch.bfloat16),
        "half": random(9, 64, dtype=torch.float16),
        "odd": random(5, 37),
        "odd blocks": random(3, 70, scale=0.02),
        "many blocks": random(260, 64, dtype=torch.bfloat16, scale=0.02),
        "a block of zeros": torch.cat([torch.zeros(2, 64), random(2, 64)]),
    }
    result = {}
    for name, tensor in cases.items():
        case = {"tensor": tensor}
        for kind in ("nf4", "fp4"):
            packed, state = F.quantize_4bit(tensor, blocksize=64, quant_type=kind)
            nested_packed, nested = F.quantize_4bit(tensor, blocksize=64, quant_type=kind, compress_statistics=True)
            assert torch.equal(packed, nested_packed)
            case[kind] = {
                "packed": packed,
                "absmax": state.absmax,
                "numbers": F.dequantize_4bit(packed, state),
                "nested_absmax": nested.state2.absmax,
                "nested_codes": nested.absmax,
                "nested_offset": nested.offset,
                "nested_numbers": F.dequantize_4bit(packed, nested),
                "state": state.as_dict(packed=True),
            }
        codes, state = F.quantize_blockwise(tensor, blocksize=256)
        case["8-bit"] = {"codes": codes, "absmax": state.absmax, "numbers": F.dequantize_blockwise(codes, state)}
        half = tensor.half()
        codes, maxima, _ = F.int8_vectorwise_quant(half.clone())
        case["rows"] = {"codes": codes, "absmax": maxima}
        codes, maxima, outliers = F.int8_vectorwise_quant((half * 3).clone(), threshold=THRESHOLD)
        case["rows without outliers"] = {"codes": codes, "absmax": maxima, "outliers": outliers}
        if name == "many blocks":  # of the size of a file, its numbers would be most
            for kind in ("nf4", "fp4", "8-bit"):
                case[kind].pop("numbers")
            for kind in ("nf4", "fp4"):
                case[kind]["nested_numbers"] = case[kind]["nested_numbers"][-2:].clone()
            case.pop("rows")
            case.pop("rows without outliers")
        result[name] = case
    codes = {"nf4": F.get_4bit_type("nf4", device="cpu"), "fp4": F.get_4bit_type("fp4", device="cpu")}
    return {"cases": result, "codes": codes, "dynamic_map": F.create_dynamic_map()}


def linear4bit(weight, bias, mode):
    layer = Linear4bit(
        weight.shape[1], weight.shape[0], compute_dtype=torch.bfloat16, compress_statistics=mode.endswith("dq"),
        quant_type=mode[:3],
    )
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return layer.to("cpu")  # quantises


def linear8bit(weight, bias):
    layer = Linear8bitLt(weight.shape[1], weight.shape[0], has_fp16_weights=False, threshold=THRESHOLD)
    layer.weight.data, layer.bias.data = weight.half(), bias.half()
    return layer.to("cpu")  # quantises


class Int8(torch.nn.Module):
    """bitsandbytes.nn.Linear8bitLt as it computes on a GPU; on a CPU the package takes another way while it trains."""

    def __init__(self, weight, bias, training):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight.half(), training), torch.nn.Parameter(bias.half())
        self.state = MatmulLtState()
        self.state.threshold, self.state.has_fp16_weights = THRESHOLD, training
        if not training:
            self.state.CB, self.state.SCB, _ = F.int8_vectorwise_quant(weight.half())

    def forward(self, x):
        return MatMul8bitLt.apply(x, self.weight, None, self.bias, self.state)


MODES = {
    **{mode: lambda w, b, mode=mode: linear4bit(w, b, mode) for mode in ("nf4", "nf4-dq", "fp4", "fp4-dq")},
    "int8": lambda w, b: Int8(w, b, training=False),
    "int8-training": lambda w, b: Int8(w, b, training=True),
}


def compute(mode):
    return torch.float16 if mode.startswith("int8") else torch.bfloat16


def layers():
    # Rows of whole blocks: with AVX-512 the package dequantises rows of 96, say, wrongly on CPUs.
    weight, bias, x, gradient = random(48, 128, scale=0.1), coarse(48), random(17, 128), random(17, 48)
    x[3, 7], x[5, 50], x[6, 7] = 9.0, -7.5, 6.0  # outliers, the last just one
    result = {"weight": weight, "bias": bias, "x": x, "gradient": gradient}
    for mode, make in MODES.items():
        layer = make(weight, bias)
        own = x.to(compute(mode)).requires_grad_()
        out = layer(own)
        out.backward(gradient.to(out.dtype))
        result[mode] = {"out": out.detach(), "x_gradient": own.grad, "bias_gradient": layer.bias.grad}
        if mode == "int8-training":
            result[mode]["weight_gradient"] = layer.weight.grad
        if mode.startswith(("nf4", "fp4")):
            result[mode]["state"] = dict(layer.state_dict())
        if mode == "int8":
            result[mode]["state"] = dict(linear8bit(weight, bias).state_dict())
    return result


def traces():
    """A quantised layer between two that train in 16 bits; with int8-training, it trains as well."""
    first, hidden, last = coarse(64, 24), random(32, 64, scale=0.15), coarse(8, 32)
    biases = [coarse(64), coarse(32), coarse(8)]
    x = torch.randint(-256, 257, (STEPS, ROWS, 24), generator=GENERATOR) / 256
    mix = torch.randint(-4, 5, (24, 8), generator=GENERATOR) / 8
    y = torch.tanh(x.double() @ mix.double()).float()
    result = {"weights": [first, hidden, last], "biases": biases, "x": x, "y": y, "lr": 0.125}
    for mode, make in MODES.items():
        dtype = compute(mode)
        ends = [torch.nn.Linear(24, 64), torch.nn.Linear(32, 8)]
        for end, weight, bias in zip(ends, (first, last), (biases[0], biases[2])):
            end.weight.data, end.bias.data = weight.to(dtype), bias.to(dtype)
        middle = make(hidden, biases[1])
        middle.bias.data = middle.bias.data.to(dtype)
        optimizer = torch.optim.SGD(
            [p for m in (ends[0], middle, ends[1]) for p in m.parameters() if p.requires_grad], lr=result["lr"]
        )
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            out = ends[1](torch.relu(middle(torch.relu(ends[0](x[step].to(dtype))))))
            loss = torch.nn.functional.mse_loss(out.float(), y[step])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        result[mode] = losses
    return result


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else HERE
    content = {"tensors": tensors(), "layers": layers(), "traces": traces()}
    write(os.path.join(folder, "bitsandbytes.json.gz"), plain(content))
