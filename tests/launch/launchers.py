# SPDX-License-Identifier: Apache-2.0
"""What every launcher must do, and a table of it in docs/launch.md.

A test names a launcher and how it starts a program, and calls `check`. Each cell of the launcher's row is tried, and the
row in the page must say of it what came out.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

root = os.environ["FABRIC_SOURCE_DIR"]
job = os.path.join(os.environ["FABRIC_BIN"], "launch_job")
cells = ["right ranks", "result of one process", "kill -9 of a rank", "exception on a rank", "port in use",
         "two jobs at once"]


def skip(why):
    print("skipped:", why)
    sys.exit(77)


def environment(**extra):
    """This process's variables without what launchers set."""
    launchers = ("MASTER_", "LT_", "SLURM_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "TORCHELASTIC", "FABRIC_RUN_ID")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers) or name == "SLURM_CONF"}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


class Running:
    """A program that runs, in a session of its own, and what it prints."""

    def __init__(self, command, variables=None, cwd=None):
        self.command = command
        self.text = ""
        self.process = subprocess.Popen(command, env=environment(**(variables or {})), stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=cwd,
                                        stdin=subprocess.DEVNULL, errors="replace")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, pattern, seconds=90):
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            if time.monotonic() > end or (self.process.poll() is not None and not self.reader.is_alive()):
                raise AssertionError(f"{self.command}: no {pattern!r} in:\n{self.text}")
            time.sleep(0.02)
        return found

    def wait(self, seconds=90):
        """The exit code, once nobody holds its output any more."""
        end = time.monotonic() + seconds
        self.reader.join(seconds)
        try:
            code = self.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        if code is None or self.reader.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"{self.command}: still there after {seconds} s:\n{self.text}")
        return code

    def process_of(self, rank):
        return int(self.wait_for(rf"rank {rank} is process (\d+)").group(1))


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(process, seconds=2):
    """Has the process ended, or does it now? The kernel closes a process's files before it is done with it, so that who
    has waited for the end of its output may still find it."""
    end = time.monotonic() + seconds
    while alive(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def expected_result():
    """What one process comes to."""
    alone = Running([job, "--accelerator", "cpu", "--strategy", "single_device", "--devices", "1"])
    assert alone.wait() == 0, alone.text
    return float(re.search(r"result=(\S+)", alone.text).group(1))


class Slurm:
    """A real Slurm of two nodes for the tests, while it is open; skips the test where there is none."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="slurm-")
        self.script = os.path.join(root, "tests", "support", "slurm")
        up = subprocess.run([self.script, "up", self.folder], stdout=subprocess.PIPE, text=True)
        if up.returncode != 0:
            self.__exit__()
            sys.exit(up.returncode)
        os.environ["SLURM_CONF"] = up.stdout.strip().partition("=")[2]
        return self

    def __exit__(self, *_):
        subprocess.run([self.script, "down", self.folder])
        shutil.rmtree(self.folder, ignore_errors=True)


class Launcher:
    """`start(arguments, variables)` starts the job with these arguments under the launcher."""

    name = ""
    ranks = 2
    nodes = 1
    one_process_is_parent = False  # it is rank 0's, so that killing rank 0 leaves nobody to tell
    counts_exits = True
    says_itself = None  # how the launcher itself names the process that was killed

    def start(self, arguments, variables=None):
        raise NotImplementedError

    def flags(self, *arguments):
        return ["--accelerator", "cpu", "--strategy", "ddp", "--devices", str(self.ranks // self.nodes), "--num-nodes",
                str(self.nodes), *arguments]

    def check_trained(self, running, ranks_only=False):
        assert running.wait() == 0, running.text
        per_node = self.ranks // self.nodes
        for rank in range(self.ranks):
            line = rf"rank {rank} is process \d+ local={rank % per_node} node={rank // per_node} size={self.ranks}\n"
            assert len(re.findall(line, running.text)) == 1, (rank, running.text)
        if ranks_only:
            return
        found = re.findall(r"result=(\S+)", running.text)
        assert len(found) == 1 and abs(float(found[0]) - expected_result()) < 1e-5, running.text

    def check_ended(self, running, start, within=10):
        code = running.wait(30)
        took = time.monotonic() - start
        assert code != 0 or not self.counts_exits, running.text
        assert took < within, (took, running.text)
        for rank in range(self.ranks):
            assert ends(running.process_of(rank)), (rank, running.text)

    def right_ranks(self):
        self.check_trained(self.start(["--job", "train"]), ranks_only=True)

    def result_of_one_process(self):
        self.check_trained(self.start(["--job", "train"]))

    def kill_9_of_a_rank(self):
        for rank in (0, self.ranks - 1):
            running = self.start(["--job", "wait"])
            for each in range(self.ranks):
                running.wait_for(rf"rank {each} is ready")
            start = time.monotonic()
            os.kill(running.process_of(rank), signal.SIGKILL)
            self.check_ended(running, start)
            if not (self.one_process_is_parent and rank == 0):
                named = rf"fabric: rank {rank} of {self.ranks}|fabric: rank {rank} \(process"
                if self.says_itself:
                    named += "|" + self.says_itself.format(running.process_of(rank))
                assert re.search(named, running.text), running.text

    def exception_on_a_rank(self):
        for rank in (0, self.ranks - 1):
            running = self.start(["--job", "throw", "--rank", str(rank)])
            running.wait_for(rf"rank {self.ranks - 1} is ready")
            self.check_ended(running, time.monotonic())
            assert re.search(rf"rank {rank} of {self.ranks} .*no more paper", running.text), running.text

    def port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            running = self.start(["--job", "train"], {"MASTER_PORT": port})
            assert running.wait(40) != 0 or not self.counts_exits, running.text
            assert f"MASTER_PORT {port} is taken" in running.text, running.text

    def two_jobs_at_once(self):
        both = [self.start(["--job", "train"]) for _ in range(2)]
        for running in both:
            self.check_trained(running)

    def check(self):
        """Tries every cell and compares with the page."""
        said = {}
        for cell in cells:
            start = time.monotonic()
            getattr(self, re.sub(r"[^a-z0-9]+", "_", cell))()
            said[cell] = "yes"
            print(f"{self.name}: {cell}: {time.monotonic() - start:.1f} s", flush=True)
        with open(os.path.join(root, "docs", "launch.md")) as page:
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in page if line.startswith("|")]
        header = next(row for row in rows if row[1:] == cells)
        row = next((row for row in rows if row[0] == f"`{self.name}`" and len(row) == len(header)), None)
        assert row is not None, f"docs/launch.md has no row of {self.name}"
        assert dict(zip(cells, row[1:])) == said, (row, said)
