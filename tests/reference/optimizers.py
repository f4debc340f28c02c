# SPDX-License-Identifier: Apache-2.0
"""What Python's fused optimizers and clipping functions do, step by step: writes optimizers.json.gz beside itself, or to
the file that its argument names. Running it again gives the same bytes.

A tensor is {"dtype", "shape", "data"}, the data being its elements' bytes in hexadecimal, so that infinities and all bits
survive. A tuple is {"tuple": [...]}.
"""

import math
import os
import sys

import same_everywhere
import torch

SHAPES = [(3, 7), (33,), (2, 2, 2), ()]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def plain(value):
    return same_everywhere.plain(value, keep_tuples=True)


def trace(name, optimizer, options, *, dtypes=(F32,) * 4, groups=None, steps=4, missing=(), scales=None, schedule=None):
    """Steps of an optimizer. `groups` are (options, number of parameters); `missing` are (step, parameter) without a
    gradient; `scales` are (grad_scale or None, found_inf) for each step; `schedule` is lr's factor after each step."""
    generator = torch.Generator().manual_seed(len(name) + 17 * len(options))

    def random(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    parameters = [torch.nn.Parameter(random(shape, dtype)) for shape, dtype in zip(SHAPES, dtypes)]
    groups = groups or [({}, len(parameters))]
    python_groups, first = [], 0
    for own, count in groups:
        python_groups.append({"params": parameters[first : first + count], **own})
        first += count
    stepper = getattr(torch.optim, optimizer)(python_groups, fused=True, **options)
    result = {
        "name": name,
        "optimizer": optimizer,
        "options": options,
        "groups": [{"options": own, "count": count} for own, count in groups],
        "parameters": plain(parameters),
        "steps": [],
    }
    for step in range(steps):
        scale, found_inf = scales[step] if scales else (None, None)
        gradients = []
        for i, parameter in enumerate(parameters):
            gradient = random(parameter.shape, parameter.dtype) * (scale or 1)
            if found_inf and i == 1:
                gradient[3] = math.inf
            parameter.grad = None if (step, i) in missing else gradient
            gradients.append(None if parameter.grad is None else gradient.clone())
        if scales:
            stepper.grad_scale = None if scale is None else torch.tensor(float(scale))
            stepper.found_inf = torch.tensor(float(found_inf))
        stepper.step()
        result["steps"].append(
            {
                "gradients": plain(gradients),
                "grad_scale": scale,
                "found_inf": found_inf,
                "lr": [group["lr"] for group in stepper.param_groups],
                "gradients_after": plain([parameter.grad for parameter in parameters]) if scales else None,
                "parameters": plain(parameters),
                "state_dict": plain(stepper.state_dict()),
            }
        )
        if schedule:
            for group in stepper.param_groups:
                group["lr"] *= schedule
    return result


def optimizer_traces():
    two_groups = [({"lr": 0.02, "weight_decay": 0.3}, 1), ({"lr": 0.003}, 3)]
    scales = [(1024.0, 0.0), (512.0, 1.0), (256.0, 0.0), (None, 1.0), (None, 0.0)]
    scaled = {"scales": scales, "steps": len(scales)}
    skipped_at_once = {"scales": [(64.0, 1.0)] + scales, "steps": len(scales) + 1}
    missing = {"missing": {(0, 1), (1, 3), (2, 0), (2, 1)}}
    mixed = (F32, F64, BF16, F32)
    for optimizer in ("AdamW", "Adam"):
        options = {"lr": 0.01}
        yield trace("defaults", optimizer, {})
        yield trace("weight decay", optimizer, {**options, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6})
        yield trace("amsgrad", optimizer, {**options, "amsgrad": True})
        yield trace("maximize", optimizer, {**options, "maximize": True, "weight_decay": 0.1})
        yield trace("groups", optimizer, options, groups=two_groups)
        yield trace("groups, one climbs", optimizer, options, groups=[({"maximize": True}, 2), ({}, 2)])
        yield trace("missing gradients", optimizer, options, **missing)
        yield trace("schedule", optimizer, options, schedule=0.5)
        yield trace("float64", optimizer, options, dtypes=(F64,) * 4)
        yield trace("bfloat16", optimizer, options, dtypes=(BF16,) * 4)
        yield trace("float16", optimizer, {**options, "eps": 1e-4}, dtypes=(F16,) * 4)
        yield trace("mixed dtypes", optimizer, options, dtypes=mixed)
        yield trace("scaled", optimizer, {**options, "amsgrad": True}, **scaled)
        yield trace("skipped at once", optimizer, options, **skipped_at_once)
    options = {"lr": 0.05}
    momentum = {**options, "momentum": 0.9}
    yield trace("defaults", "SGD", {})
    yield trace("weight decay", "SGD", {**options, "weight_decay": 0.2})
    yield trace("momentum", "SGD", momentum)
    yield trace("dampening", "SGD", {**momentum, "dampening": 0.3, "weight_decay": 0.1})
    yield trace("nesterov", "SGD", {**momentum, "nesterov": True, "weight_decay": 0.1})
    yield trace("maximize", "SGD", {**momentum, "maximize": True})
    yield trace("groups", "SGD", momentum, groups=[({"lr": 0.2, "momentum": 0.0}, 2), ({"nesterov": True}, 2)])
    yield trace("missing gradients", "SGD", momentum, missing={(1, 3), (2, 0), (2, 1)})
    yield trace("missing gradients, no momentum", "SGD", options, **missing)
    yield trace("schedule", "SGD", momentum, schedule=0.5)
    yield trace("float64", "SGD", momentum, dtypes=(F64,) * 4)
    yield trace("bfloat16", "SGD", momentum, dtypes=(BF16,) * 4)
    yield trace("mixed dtypes", "SGD", momentum, dtypes=mixed)
    yield trace("scaled", "SGD", {**momentum, "dampening": 0.3}, **scaled)
    yield trace("skipped at once, no momentum", "SGD", options, **skipped_at_once)
    yield trace("defaults", "Adagrad", {})
    yield trace("weight decay", "Adagrad", {**options, "weight_decay": 0.2, "lr_decay": 0.1, "eps": 1e-6})
    yield trace("initial accumulator", "Adagrad", {**options, "initial_accumulator_value": 0.5})
    yield trace("maximize", "Adagrad", {**options, "maximize": True})
    yield trace("groups", "Adagrad", options, groups=two_groups)
    yield trace("missing gradients", "Adagrad", options, **missing)
    yield trace("schedule", "Adagrad", options, schedule=0.5)
    yield trace("float64", "Adagrad", options, dtypes=(F64,) * 4)
    yield trace("bfloat16", "Adagrad", options, dtypes=(BF16,) * 4)
    yield trace("mixed dtypes", "Adagrad", options, dtypes=mixed)
    yield trace("scaled", "Adagrad", options, **scaled)
    yield trace("skipped at once", "Adagrad", options, **skipped_at_once)


def clipping(by, bound, norm_type=2.0, *, dtypes=(F32,) * 4, missing=(), bad=None):
    """Gradients before and after clipping, and the norm from before."""
    generator = torch.Generator().manual_seed(5)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(SHAPES, dtypes)]
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if bad is not None and i == 1:
            gradient[2] = bad
        parameter.grad = None if i in missing else gradient
    before = plain([parameter.grad for parameter in parameters])
    if by == "norm":
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound, norm_type, foreach=True)
    else:
        norm = torch.nn.utils.clip_grad_value_(parameters, bound, foreach=True)
    after = plain([parameter.grad for parameter in parameters])
    norm_type = str(norm_type)  # JSON has no infinity
    return {"by": by, "bound": bound, "norm_type": norm_type, "before": before, "after": after, "norm": plain(norm)}


def clippings():
    for norm_type in (2.0, 1.0, 3.0, 0.5, math.inf):
        for max_norm in (0.3, 1.7, 1e6, 0.0):
            yield clipping("norm", max_norm, norm_type)
    for max_norm in (12.0, 9.35, 9.34):  # the norm is 9.3418
        yield clipping("norm", max_norm)
    for dtypes in ((F64,) * 4, (BF16,) * 4, (F16,) * 4, (F32, F64, BF16, F32)):
        yield clipping("norm", 0.7, dtypes=dtypes)
        yield clipping("norm", 0.7, math.inf, dtypes=dtypes)
        yield clipping("value", 0.7, dtypes=dtypes)
    yield clipping("norm", 0.7, missing=(0, 3))
    yield clipping("value", 0.7, missing=(0, 3))
    for bad in (math.inf, -math.inf, math.nan):
        yield clipping("norm", 0.7, bad=bad)
        yield clipping("value", 0.7, bad=bad)


def main():
    torch.set_num_threads(1)
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(same_everywhere.HERE, "optimizers.json.gz")
    data = {
        "torch": torch.__version__.split("+")[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "optimizers": list(optimizer_traces()),
        "clipping": list(clippings()),
    }
    same_everywhere.write(path, data)


main()
