# SPDX-License-Identifier: Apache-2.0
# labels: python precision
# timeout: 600
"""[issue-5.5] tests/reference/fp8.py writes the stored file again, and with the same kernels of LibTorch, training here has Python's
losses to the last digit.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference"))
from regenerate import regenerate, run_tests

regenerate("fp8.py", "fp8.json.gz")
run_tests("[#fp8]")
