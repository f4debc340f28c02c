# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder share."""

import gzip
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}


def run_again_without_special_kernels():
    """LibTorch chooses kernels by the CPU, and their sums differ in the last digit; these settings are read as it loads."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})


def plain(value, *, keep_tuples=False):
    """Lists, dicts, numbers and texts for a tree with tensors in it. A tuple is a list, or kept as {"tuple": [...]}."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": raw.hex()}
    if isinstance(value, dict):
        return {str(key): plain(entry, keep_tuples=keep_tuples) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [plain(entry, keep_tuples=keep_tuples) for entry in value]
        return {"tuple": entries} if keep_tuples and isinstance(value, tuple) else entries
    return value


def write(path, content):
    """The same content gives the same bytes."""
    with open(path, "wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped:
        zipped.write(json.dumps(content, allow_nan=False, separators=(",", ":")).encode())
