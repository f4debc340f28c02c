# SPDX-License-Identifier: Apache-2.0
"""What the tests of stored files share: made again, a file must be the same."""

import gzip
import json
import os
import subprocess
import sys
import tempfile

from same_everywhere import HERE, SETTINGS


def first_difference(stored, made, path=""):
    """Where two trees differ, or None."""
    if isinstance(stored, dict) and isinstance(made, dict):
        if stored.keys() != made.keys():
            return f"{path}: keys {sorted(stored.keys() ^ made.keys())}"
        items = ((key, stored[key], made[key]) for key in stored)
    elif isinstance(stored, list) and isinstance(made, list):
        if len(stored) != len(made):
            return f"{path}: {len(stored)} against {len(made)} entries"
        items = zip(range(len(stored)), stored, made)
    else:
        return None if stored == made else f"{path}: {str(stored)[:60]} against {str(made)[:60]}"
    return next((found for key, a, b in items if (found := first_difference(a, b, f"{path}/{key}"))), None)


def regenerate(script, name):
    """Runs a script of this folder and compares what it writes. Ends this test as skipped if the script says so."""
    with tempfile.TemporaryDirectory() as folder:
        code = subprocess.run([sys.executable, os.path.join(HERE, script), folder]).returncode
        if code == 77:
            sys.exit(77)
        if code != 0:
            sys.exit(f"{script} ended with {code}")
        with gzip.open(os.path.join(HERE, name)) as stored, gzip.open(os.path.join(folder, name)) as made:
            difference = first_difference(json.load(stored), json.load(made))
    if difference:
        sys.exit(f"{name}: {difference}")
    print(f"{name} is the same again")


def run_tests(tags):
    """Runs some of torch_tests with LibTorch's kernels chosen as for the stored files: there sums agree to the last
    digit, and the tests ask for that."""
    program = os.path.join(os.environ["FABRIC_BIN"], "torch_tests")
    subprocess.run([program, "--filenames-as-tags", tags], env={**os.environ, **SETTINGS}, check=True, timeout=300)
