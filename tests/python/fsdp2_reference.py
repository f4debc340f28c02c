# SPDX-License-Identifier: Apache-2.0
# labels: python sharding
# ranks: 2
"""[issue-8.accept] Python's FSDP2 gives again what tests/reference/fsdp2.json.gz holds, with which distributed/fsdp2_reference.cpp
compares.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.environ["FABRIC_SOURCE_DIR"], "tests/reference"))
from regenerate import regenerate

regenerate("fsdp2.py", "fsdp2.json.gz")
