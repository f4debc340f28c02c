# SPDX-License-Identifier: Apache-2.0
"""What torch.amp.GradScaler does, step by step, while infinities and NaNs are put into the gradients of two optimizers.

    grad_scaler.py [FOLDER]    writes grad_scaler.json.gz there, by default beside this script

Each case is a scaler with other settings. The loss of an iteration is a.dot(x) + b.dot(y), so that the gradients are x and
y. Where `clip` says so, a's gradients are unscaled and halved by hand before the step.
"""

import os
import sys

import torch
from same_everywhere import HERE, write

ITERATIONS = 40
CASES = [
    {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3},
    {"init_scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 1},
    {"init_scale": 2.0**125, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1},  # as far as floats go
    {"init_scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
]
# What is put into the first gradient of a and of b, by iteration.
BAD = {3: ("inf", None), 9: (None, "nan"), 10: ("nan", "-inf"), 11: ("inf", "inf"), 17: (None, "inf"), 30: ("-inf", None)}
CLIPPED = {0, 3, 5, 9, 17, 18, 31}
RELOADED = 20  # from here on another scaler goes on, from the state of the first


def text(tensor):
    return [str(float(number)) for number in tensor]


def run(settings):
    a, b = (torch.nn.Parameter(torch.ones(n)) for n in (3, 2))
    first = torch.optim.SGD([a], lr=0.5, momentum=0.5)
    second = torch.optim.SGD([b], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", **settings)
    rows = []
    for i in range(ITERATIONS):
        if i == RELOADED:
            state = scaler.state_dict()
            scaler = torch.amp.GradScaler("cpu")
            scaler.load_state_dict(state)
        x = torch.tensor([(i % 5 - 2) / 8, 0.25, -0.5])
        y = torch.tensor([(i % 3 - 1) / 4, 0.125])
        for gradients, bad in zip((x, y), BAD.get(i, (None, None))):
            if bad:
                gradients[0] = float(bad)
        row = {"x": text(x), "y": text(y), "clip": i in CLIPPED}
        first.zero_grad()
        second.zero_grad()
        loss = a.dot(x) + b.dot(y)
        scaled = scaler.scale(loss)
        row["scale"] = scaler.get_scale()
        scaled.backward()
        if row["clip"]:
            scaler.unscale_(first)
            a.grad.mul_(0.5)
        stepped = []
        for optimizer, parameter in ((first, a), (second, b)):
            before = parameter.detach().clone()
            scaler.step(optimizer)
            stepped.append(not torch.equal(before, parameter.detach()))
        row["found_inf"] = [scaler._found_inf_per_device(optimizer)[torch.device("cpu")].item() for optimizer in (first, second)]
        scaler.update()
        row.update(stepped=stepped, a=text(a.detach()), b=text(b.detach()), a_grad=text(a.grad), state=scaler.state_dict())
        rows.append(row)
    return {"settings": settings, "rows": rows}


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else HERE
    content = {"reloaded": RELOADED, "cases": [run(settings) for settings in CASES]}
    write(os.path.join(folder, "grad_scaler.json.gz"), content)


if __name__ == "__main__":
    main()
