# SPDX-License-Identifier: Apache-2.0
"""tests/reference/optimizers.py computes again what tests/reference/optimizers.json.gz holds. [issue-5.3] [issue-5.4]

The same instruction set gives the same bytes of every tensor; another one may round otherwise, and then only what the
optimizers are called with has to be the same.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile

folder = os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference")


def read(path):
    with gzip.open(path) as file:
        return json.load(file)


def inputs(data):
    """What does not depend on how a processor rounds."""
    traces = [
        {key: trace[key] for key in ("name", "optimizer", "options", "groups", "parameters")}
        | {"steps": [{key: step[key] for key in ("gradients", "grad_scale", "found_inf")} for step in trace["steps"]]}
        for trace in data["optimizers"]
    ]
    return traces, [{key: case[key] for key in ("by", "bound", "norm_type", "before")} for case in data["clipping"]]


stored = read(os.path.join(folder, "optimizers.json.gz"))
with tempfile.TemporaryDirectory() as temporary:
    path = os.path.join(temporary, "again.json.gz")
    subprocess.run([sys.executable, os.path.join(folder, "optimizers.py"), path], check=True)
    again = read(path)

assert again["torch"] == stored["torch"], (again["torch"], stored["torch"])
assert len(stored["optimizers"]) == 55 and len(stored["clipping"]) == 43
assert inputs(again) == inputs(stored)
if again["instructions"] == stored["instructions"]:
    assert again == stored
    print("the same bytes")
else:
    print(f"the same inputs; results are of {stored['instructions']}, this is {again['instructions']}")
