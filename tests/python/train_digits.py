# SPDX-License-Identifier: Apache-2.0
# ranks: 2
# timeout: 600
"""examples/train_digits against the same loop in Python on Lightning Fabric: step by step the same losses. [issue-3.9]

Equal seeds give equal weights and equal orders of rows in both, so that nothing has to be exchanged.
"""

import csv
import os
import subprocess
import sys
import tempfile

# precision, processes, the largest relative difference of a loss
CASES = [
    ("64-true", 1, 1e-12),
    ("32-true", 1, 1e-2),
    ("bf16-mixed", 1, 3e-2),
    ("64-true", 2, 1e-12),
    ("32-true", 2, 1e-2),
]
EPOCHS, BATCH, LR, SEED = 1, 32, 2e-3, 7
DATA = os.path.join(os.environ["FABRIC_SOURCE_DIR"], "examples/data/digits.csv")


def worker(precision, processes, log):
    """The loop of train_digits on Lightning Fabric."""
    import torch
    from lightning.fabric import Fabric

    class DigitNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(1, 32, 3, padding=1)
            self.second = torch.nn.Conv2d(32, 64, 3, padding=1)
            self.hidden = torch.nn.Linear(64 * 4 * 4, 128)
            self.logits = torch.nn.Linear(128, 10)

        def forward(self, images):
            x = torch.relu(self.first(images))
            x = torch.nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
            return self.logits(torch.relu(self.hidden(x.flatten(1))))

    fabric = Fabric(
        accelerator="cpu", strategy="ddp" if processes > 1 else "auto", devices=processes, precision=precision
    )
    fabric.launch()
    torch.manual_seed(SEED)
    with open(DATA) as file:
        rows = [[int(number) for number in row] for i, row in enumerate(csv.reader(file)) if i % 5 != 4]
    images = (torch.tensor([row[:64] for row in rows], dtype=torch.float32) / 16).view(-1, 1, 8, 8)
    labels = torch.tensor([row[64] for row in rows])
    with fabric.init_module():
        net = DigitNet()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=LR))
    sampler = torch.utils.data.DistributedSampler(
        images, num_replicas=fabric.world_size, rank=fabric.global_rank, shuffle=True, seed=SEED
    )
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))
        for index in order.split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    if fabric.is_global_zero:
        with open(log, "w") as file:
            file.write("\n".join(repr(loss) for loss in losses))
    fabric.barrier()
    sys.stdout.flush()
    os._exit(0)  # past the end of PyTorch's threads, at which a process sometimes aborts


def main():
    program = os.path.join(os.environ["FABRIC_BIN"], "train_digits")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    failures = 0
    for precision, processes, tolerance in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = os.path.join(folder, "ours.csv"), os.path.join(folder, "theirs.txt")
            strategy = ["--strategy", "ddp"] if processes > 1 else []
            subprocess.run(
                [program, "--accelerator", "cpu", "--devices", str(processes), "--precision", precision]
                + ["--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--lr", str(LR), "--seed", str(SEED)]
                + ["--log", ours] + strategy,
                check=True, timeout=200, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            subprocess.run(
                [sys.executable, os.path.abspath(__file__), "--worker", precision, str(processes), theirs],
                check=True, timeout=200, env=environment,
            )
            with open(ours) as file:
                rows = list(csv.DictReader(file))
            with open(theirs) as file:
                expected = [float(line) for line in file]
        assert [row["step"] for row in rows] == [str(i) for i in range(len(rows))], "steps count from 0"
        assert len(rows) == len(expected) > 20, f"{len(rows)} steps here, {len(expected)} in Python"
        worst = max(abs(float(row["loss"]) - loss) / abs(loss) for row, loss in zip(rows, expected))
        verdict = "ok" if worst <= tolerance else "DIFFERS"
        print(f"{precision:>10} on {processes}: largest relative difference {worst:.2e} of {len(rows)} losses: {verdict}")
        failures += worst > tolerance
    return failures


if __name__ == "__main__":
    if "--worker" in sys.argv:
        precision, processes, log = sys.argv[sys.argv.index("--worker") + 1 :][:3]
        worker(precision, int(processes), log)
    else:
        sys.exit(main())
