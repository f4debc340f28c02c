# SPDX-License-Identifier: Apache-2.0
"""[issue-3.1] What CMake insists on when `make demo` configures is among the packages that `make demo` installs.

usage: packages.py SOURCE_DIR
"""

import pathlib
import re
import sys

# Where Debian and Ubuntu have what find_package looks for.
PACKAGES = {
    "Boost": "libboost-dev",
    "CLI11": "libcli11-dev",
    "Catch2": "catch2",
    "Python3": "python3",
    "fmt": "libfmt-dev",
    "nlohmann_json": "nlohmann-json3-dev",
}

root = pathlib.Path(sys.argv[1])
script = (root / "tools" / "install-packages").read_text()
installed = re.search(r"^demo='([^']*)'", script, re.M).group(1).split()

folders = [root / name for name in ("bench", "examples", "tests", "tools")]
files = [root / "CMakeLists.txt"]
files += [file for folder in folders for kind in ("CMakeLists.txt", "*.cmake") for file in sorted(folder.rglob(kind))]
required = {}
for file in files:
    if "consumer" in file.parts:
        continue  # a project of its own
    for name in re.findall(r"^\s*find_package\((\w+)[^)]*\bREQUIRED\b", file.read_text(), re.M):
        required.setdefault(name, file.relative_to(root))

problems = [f"{file} needs {name}, which no package here is known to have" for name, file in required.items()
            if name not in PACKAGES]
problems += [f"{file} needs {name}, but `make demo` does not install {PACKAGES[name]}"
             for name, file in required.items() if name in PACKAGES and PACKAGES[name] not in installed]
if len(required) < len(PACKAGES):
    problems.append(f"only {sorted(required)} were found, of {sorted(PACKAGES)}")
sys.exit("\n".join(problems) or 0)
