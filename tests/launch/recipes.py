# SPDX-License-Identifier: Apache-2.0
"""[issue-6.8] The recipes of docs/launch.md, run as they stand there."""

import os
import re
import shutil
import subprocess
import tempfile
import time

from launchers import Running, Slurm, environment, job, root, skip

with open(os.path.join(root, "docs", "launch.md")) as page:
    recipes = dict(re.findall(r"```sh\n# recipe: (\w+)\n(.*?)```", page.read(), re.S))
assert set(recipes) == {"ddp", "torchrun", "srun", "sbatch", "mpirun"}, recipes.keys()

folder = tempfile.mkdtemp(prefix="recipes-")
os.symlink(job, os.path.join(folder, "train"))
python = os.path.join(root, "third_party", "python", "bin")
os.environ["PATH"] += os.pathsep + python  # where torchrun is
os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
skipped = []


def check(name, text, ranks):
    assert text.count("result=") == 1, (name, text)
    for rank in range(ranks):
        assert len(re.findall(rf"rank {rank} is process \d+ .*size={ranks}", text)) == 1, (name, text)
    print(name, "works", flush=True)


def run(name, ranks, variables=None):
    running = Running(["sh", "-e", "-c", recipes[name]], variables, cwd=folder)
    assert running.wait(120) == 0, running.text
    check(name, running.text, ranks)


run("ddp", 2)
if os.access(os.path.join(python, "torchrun"), os.X_OK) and os.environ.get("PYTHON") != "off":
    run("torchrun", 2)
else:
    skipped.append("torchrun")
for mpirun in ("mpirun.openmpi", "mpirun.mpich"):
    if path := shutil.which(mpirun):
        bin = tempfile.mkdtemp(dir=folder)
        with open(os.path.join(bin, "mpirun"), "w") as file:
            file.write(f'#!/bin/sh\nexec {path} "$@"\n')
        os.chmod(file.name, 0o755)
        run("mpirun", 2, {"PATH": bin + os.pathsep + os.environ["PATH"]})
    else:
        skipped.append(mpirun)
here = {"MASTER_ADDR": "127.0.0.1"}  # the nodes' names are known to nobody
with Slurm():
    run("srun", 4, here)
    script = os.path.join(folder, "script")
    with open(script, "w") as file:
        file.write(recipes["sbatch"])
    subprocess.run(["sbatch", "--wait", "--output=output", script], env=environment(**here), cwd=folder, check=True, timeout=100)
    with open(os.path.join(folder, "output")) as file:
        check("sbatch", file.read(), 4)
shutil.rmtree(folder)
if skipped:
    skip("in part: " + ", ".join(skipped))
