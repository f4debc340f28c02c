# SPDX-License-Identifier: Apache-2.0
# labels: python sharding
# ranks: 2
# timeout: 600
"""[issue-8.accept] tests/reference/fsdp2.py writes the stored file again; with the same kernels of LibTorch, training here has the
losses of Python's FSDP2.
"""

import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference"))
from regenerate import regenerate
from same_everywhere import SETTINGS

regenerate("fsdp2.py", "fsdp2.json.gz")
program = os.path.join(os.environ["FABRIC_BIN"], "distributed_fsdp2_reference")
subprocess.run([program], env={**os.environ, **SETTINGS}, check=True, timeout=300)
