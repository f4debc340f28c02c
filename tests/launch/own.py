# SPDX-License-Identifier: Apache-2.0
"""[issue-6.1] The processes that the library starts itself, and processes that are started one by one."""

import os

from launchers import Launcher, Running, free_port, job


class Own(Launcher):
    def __init__(self, strategy, parent):
        self.name = strategy
        self.one_process_is_parent = parent

    def start(self, arguments, variables=None):
        flags = self.flags(*arguments)
        flags[flags.index("--strategy") + 1] = self.name
        return Running([job, *flags], variables)


class OneByOne(Launcher):
    """A shell script that starts a process for each rank and waits for all."""

    name = "by hand"

    def start(self, arguments, variables=None):
        port = (variables or {}).get("MASTER_PORT", str(free_port()))
        one = " ".join([job, *self.flags(*arguments)])
        script = f"LOCAL_RANK=1 {one} & LOCAL_RANK=0 {one}; first=$?; wait $! && exit $first"
        return Running(["sh", "-c", script], {"MASTER_PORT": port, "WORLD_SIZE": "2"})


for launcher in (Own("ddp", True), Own("ddp_spawn", False), Own("ddp_fork", False), Own("ddp_notebook", False), OneByOne()):
    launcher.check()
