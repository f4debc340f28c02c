# SPDX-License-Identifier: Apache-2.0
# ranks: 2
"""[issue-3.5] A program joins the processes that torchrun starts, by the store that torchrun's agent serves."""

import os
import subprocess
import sys

program = os.path.join(os.environ["FABRIC_BIN"], "distributed_launch")


def torchrun(job, devices=2):
    launchers = ("MASTER_", "LT_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", str(devices),
               "--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint",
               "127.0.0.1:0", program, "job", job]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    print(result.stdout, result.stderr)
    return result


joined = torchrun("report")
assert joined.returncode == 0
lines = [line for line in joined.stdout.splitlines() if line.startswith("global=")]
assert len(lines) == 2, lines  # no process started others of its own
for rank in range(2):
    assert any(line.startswith(f"global={rank} local={rank} node=0 size=2 sum=3 LOCAL_RANK={rank}") for line in lines), rank
assert joined.stdout.count("printed by 0 of 2") == 1

refused = torchrun("report", devices=1)
assert refused.returncode != 0
assert "--nproc-per-node" in refused.stderr
