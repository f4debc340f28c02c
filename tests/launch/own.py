# SPDX-License-Identifier: Apache-2.0
"""[issue-6.1] The processes that the library starts itself, and processes that are started one by one."""

import os
import re
import signal
import tempfile

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


def check_preemption():
    """Asked to stop while it sets up, before the first step: all ranks save, and the job goes on from there."""
    with tempfile.TemporaryDirectory() as folder:
        counter = os.path.join(folder, "counter")
        arguments = ["--job", "count", "--counter", counter, "--steps", "30", "--setup", "1500"]
        for strategy in ("ddp", "ddp_spawn"):
            first = Own(strategy, True).start(arguments)
            first.wait_for("begins at step 0")
            os.kill(first.process.pid, signal.SIGUSR1)
            assert first.wait() == 75, first.text
            stops = re.findall(r"rank [01] stops after step (\d+)", first.text)
            assert len(stops) == 2 and stops[0] == stops[1] and int(stops[0]) < 5, first.text
            second = Own(strategy, True).start(arguments)
            assert second.wait() == 0 and f"begins at step {stops[0]}\n" in second.text, second.text
            os.unlink(counter + ".pt")


def check_log_dir():
    """One file a rank, in a folder that need not be there; the console has nothing of what ranks print."""
    with tempfile.TemporaryDirectory() as folder:
        logs = os.path.join(folder, "of", "today")
        running = Own("ddp", True).start(["--job", "train", "--log-dir", logs])
        assert running.wait() == 0 and "is process" not in running.text, running.text
        for rank in range(2):
            with open(os.path.join(logs, f"rank_{rank}.log")) as file:
                assert re.findall(r"rank (\d) is process", file.read()) == [str(rank)]
        assert sorted(os.listdir(logs)) == ["rank_0.log", "rank_1.log"]
        # Whoever looks at the console only is told why.
        failing = Own("ddp", True).start(["--job", "throw", "--rank", "1", "--log-dir", logs])
        assert failing.wait() != 0 and "no more paper" in failing.text, failing.text


check_preemption()
check_log_dir()
for launcher in (Own("ddp", True), Own("ddp_spawn", False), Own("ddp_fork", False), Own("ddp_notebook", False), OneByOne()):
    launcher.check()
