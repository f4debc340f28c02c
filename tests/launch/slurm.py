# SPDX-License-Identifier: Apache-2.0
# timeout: 240
"""[issue-6.2] [issue-6.6] A real Slurm: srun on two nodes, inside salloc, torchrun inside an allocation; preemption."""

import os
import re
import subprocess
import sys
import time

from launchers import Launcher, Running, Slurm, environment, job, root, skip

# The two nodes are this machine under two names, which nothing resolves.
here = {"MASTER_ADDR": "127.0.0.1"}


class Srun(Launcher):
    name = "srun"
    ranks = 4
    nodes = 2

    def start(self, arguments, variables=None):
        # --kill-on-bad-exit=0: the library ends its processes itself.
        return Running(["srun", "--kill-on-bad-exit=0", "--nodes=2", "--ntasks-per-node=2", job, *self.flags(*arguments)],
                       {**here, **(variables or {})})


class SrunInAllocation(Srun):
    def start(self, arguments, variables=None):
        return Running(["salloc", "--job-name=train", "--nodes=2", "--ntasks-per-node=2", "srun", job, *self.flags(*arguments)], {**here, **(variables or {})})


def slurm_says(*command, check=True):
    return subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=check).stdout


def wait_until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return value


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def check_torchrun_in_allocation(folder):
    """One agent a node, which start two ranks each."""
    python = os.path.join(root, "third_party", "python", "bin", "python")
    if not os.access(python, os.X_OK):
        return False
    flags = Srun().flags("--job", "train")
    running = Running(["salloc", "--nodes=2", "--ntasks-per-node=1", "srun", python, "-m", "torch.distributed.run",
                       "--no-python", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                       "--rdzv-endpoint", "127.0.0.1:29411", "--rdzv-id", "allocation", job, *flags])
    assert running.wait(120) == 0, running.text
    assert len(re.findall(r"rank \d is process \d+ local=[01] node=[01] size=4", running.text)) == 4, running.text
    assert running.text.count("result=") == 1, running.text
    return True


def check_preemption(folder):
    """By the recipe of docs/launch.md: the ranks save and leave together when the job is signalled, and go on where they
    were once it is requeued."""
    counter, output, script, train = (os.path.join(folder, name) for name in ("counter", "output", "script", "train"))
    steps = 400
    with open(os.path.join(root, "docs", "launch.md")) as page:
        recipe = re.search(r"```sh\n# recipe: sbatch\n(.*?)```", page.read(), re.S).group(1)
    with open(script, "w") as file:
        file.write(recipe)
    with open(train, "w") as file:
        file.write(f'#!/bin/sh\nexec {job} --job count --counter {counter} --steps {steps} "$@"\n')
    os.chmod(train, 0o755)
    submitted = subprocess.run(["sbatch", "--parsable", "--output=" + output, script], env=environment(**here), cwd=folder,
                               stdout=subprocess.PIPE, text=True, check=True)
    number = submitted.stdout.strip()
    wait_until(lambda: re.search(r"begins at step 0\n", read(output)))
    slurm_says("scancel", "--signal=USR1", number)
    wait_until(lambda: len(re.findall(r"rank \d stops after step \d+", read(output))) == 4)
    first = read(output)
    stops = re.findall(r"rank \d stops after step (\d+)", first)
    assert len(set(stops)) == 1, first
    wait_until(lambda: "Restarts=1" in slurm_says("scontrol", "show", "job", number))
    # Slurm lets a job rest for two minutes before it begins again: not here. Begun before its old steps are gone from the
    # nodes, it may fail there without having run: that is Slurm's, and then it is put back once more.
    patience = time.monotonic() + 20

    def begins_again():
        if f"begins at step {stops[0]}\n" in read(output):
            return True
        if "JobState=FAILED" in slurm_says("scontrol", "show", "job", number):
            slurm_says("scontrol", "requeue", number, check=False)
        if "PENDING" in slurm_says("scontrol", "show", "job", number):
            steps_run = subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{number}\."], stdout=subprocess.DEVNULL)
            if steps_run.returncode or time.monotonic() > patience:
                slurm_says("scontrol", "update", "JobId=" + number, "StartTime=now", check=False)
        return False

    try:
        wait_until(begins_again, 100)
        wait_until(lambda: f"result={steps}." in read(output), 60)
    except AssertionError:
        print(read(output), slurm_says("squeue"), slurm_says("scontrol", "show", "job", number))
        raise


with Slurm() as slurm:
    Srun().check()
    SrunInAllocation().right_ranks()
    unnamed = Running(["salloc", "--nodes=2", "--ntasks-per-node=2", "srun", job, *Srun().flags()], here)
    assert unnamed.wait() != 0 and "name the job, or set LT_ENVIRONMENT=slurm" in unnamed.text, unnamed.text
    torchrun_is_here = check_torchrun_in_allocation(slurm.folder)
    check_preemption(slurm.folder)
if not torchrun_is_here:
    skip("in part: no torchrun")
