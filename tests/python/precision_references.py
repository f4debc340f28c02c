# SPDX-License-Identifier: Apache-2.0
# ranks: 1
# labels: python precision
"""The reference data of precision and gradient scaling, made again by the real packages. [issue-5.accept]

The files come out as they are stored, but for the last digits of losses on machines with other kernels. With the fresh
file, the C++ traces are equal bit for bit where both use the same LibTorch.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile

REFERENCE = os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference")
sys.path.insert(0, REFERENCE)
from same_everywhere import SETTINGS

# The largest relative difference of a number, where the bytes differ.
TOLERANCE = {"64-true": 1e-12, "32-true": 1e-5, "16-true": 2**-11, "bf16-true": 2**-8, "bf16-mixed": 2**-8, "16-mixed": 1e-2}


def differences(old, new, path=()):
    """The places where two trees differ by more than the precision in their path allows."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [place for key in old for place in differences(old[key], new[key], (*path, key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [place for i, pair in enumerate(zip(old, new)) for place in differences(*pair, (*path, i))]
    tolerance = max([TOLERANCE[key] for key in path if key in TOLERANCE], default=0)
    if isinstance(old, float) and isinstance(new, float) and abs(old - new) <= tolerance * abs(old):
        return []
    return [] if old == new else [path]


def main():
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("grad_scaler", "training_traces"):
            script = os.path.join(REFERENCE, name + ".py")
            subprocess.run([sys.executable, script, folder], check=True, timeout=250, stderr=subprocess.DEVNULL)
            with open(os.path.join(REFERENCE, name + ".json.gz"), "rb") as file:
                old = file.read()
            with open(os.path.join(folder, name + ".json.gz"), "rb") as file:
                new = file.read()
            if old == new:
                print(f"{name}: the same file")
                continue
            places = differences(*(json.loads(gzip.decompress(data)) for data in (old, new)))
            print(f"{name}: other bytes; numbers differ too much at {places[:5]}" if places else f"{name}: other last digits")
            failures += len(places)

        program = os.path.join(os.environ["FABRIC_BIN"], "torch_tests")
        command = [program, "--filenames-as-tags", "[#training_traces]"]
        variables = {**os.environ, **SETTINGS, "FABRIC_FRESH_TRACES": folder}
        failures += subprocess.run(command, timeout=250, env=variables).returncode
    return failures


if __name__ == "__main__":
    sys.exit(main())
