# SPDX-License-Identifier: Apache-2.0
# labels: checkpoint python example
# ranks: 2
# timeout: 300
"""examples/train_digits and its checkpoints: it survives kill -9 at any moment, goes on bit for bit, and Python reads and
makes what it loads. [issue-7.6]"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

PROGRAM = os.path.join(os.environ["FABRIC_BIN"], "train_digits")
KILLS = int(os.environ.get("FABRIC_SOAK", "6"))
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")
COMMON = ["--accelerator", "cpu", "--batch-size", "32", "--seed", "3"]
LONG, SHORT = ["--epochs", "2"], ["--epochs", "1"]
TWO = ["--strategy", "ddp", "--devices", "2"]


class DigitNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.logits = nn.Linear(128, 10)


def run(*arguments, kill_after=None):
    """The program's last line; None if it was killed before it ended."""
    process = subprocess.Popen([PROGRAM, *COMMON, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=kill_after if kill_after is not None else 200)
    except subprocess.TimeoutExpired:
        assert kill_after is not None, "it hangs"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    assert process.returncode == 0, err
    return out.strip().splitlines()[-1]


def losses(path):
    with open(path) as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file)}


def survives_kills(folder, devices):
    log, part = os.path.join(folder, "whole.csv"), os.path.join(folder, "part.csv")
    expected = run(*LONG, "--log", log, *devices)
    whole = losses(log)
    save = os.path.join(folder, "run")
    arguments = ["--save", save, "--checkpoint-every", "3", "--resume", "--log", part, *LONG, *devices]
    killed, read = 0, 0
    began = time.monotonic()
    while killed < KILLS:
        if run(*arguments, kill_after=random.uniform(0.3, 2.5)) is not None:
            break
        killed += 1
        if os.path.exists(os.path.join(save, "latest")):
            checkpoint = torch.load(os.path.join(save, "latest"), weights_only=True)
            DigitNet().load_state_dict(checkpoint["model"])
            read += 1
    print(f"  killed {killed} times in {time.monotonic() - began:.0f} s, a whole checkpoint after {read} of them")
    assert run(*arguments) == expected
    assert losses(part) == whole, "the losses after a resume are others, or not there once each"
    assert run(*arguments) == expected  # nothing is left to do
    assert losses(part) == whole, "a run that does nothing has changed the log"


def crosses_the_border(folder):
    init, saved = os.path.join(folder, "init.pt"), os.path.join(folder, "saved.pt")
    torch.manual_seed(17)
    net = DigitNet()
    torch.save(net.state_dict(), init)
    run(*SHORT, "--init", init, "--save-init", saved)
    for key, value in torch.load(saved, weights_only=True).items():
        assert torch.equal(value, net.state_dict()[key]), key
    DigitNet().load_state_dict(torch.load(saved, weights_only=True))
    run(*SHORT, "--precision", "bf16-true", "--lr", "1e-4", "--eps", "1e-4", "--init", init)
    del net.logits
    torch.save(net.state_dict(), init)
    process = subprocess.run([PROGRAM, *COMMON, "--init", init], env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode != 0 and "logits.weight" in process.stderr, process.stderr


def main():
    random.seed(1)
    torch.set_num_threads(1)
    for name, part in (("on one", lambda folder: survives_kills(folder, [])),
                       ("on two", lambda folder: survives_kills(folder, TWO)), ("both ways", crosses_the_border)):
        with tempfile.TemporaryDirectory() as folder:
            part(folder)
            print(f"{name}: ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
