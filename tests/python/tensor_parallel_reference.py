# SPDX-License-Identifier: Apache-2.0
# ranks: 2
# labels: python sharding
"""[issue-8.1] tests/reference/tensor_parallel.py, which uses Python's parallelize_module, writes the stored file again."""

import os
import sys

sys.path.insert(0, os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference"))
from regenerate import regenerate

regenerate("tensor_parallel.py", "tensor_parallel.json.gz")
