# SPDX-License-Identifier: Apache-2.0
# ranks: 4
# timeout: 300
"""[issue-6.accept] Jobs of four processes, one after the other, in each of which a random process is killed at a random
moment: none hangs, and none leaves a process. FABRIC_SOAK says how many; 20 by default."""

import os
import random
import signal
import time

from launchers import Running, job

launches = int(os.environ.get("FABRIC_SOAK", "20"))
seed = int(os.environ.get("FABRIC_SEED", str(time.time_ns() % 1_000_000)))
random.seed(seed)
print(f"{launches} launches, FABRIC_SEED={seed}", flush=True)


def processes_of(session):
    """Those that belong to a job: all are in the session that its first process began."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, _, _, its_session = file.read().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(its_session) == session and state != "Z":
                found.append(int(name))
    return found


slowest = 0.0
moments = {"before all had joined": 0, "after": 0}
for launch in range(launches):
    strategy = random.choice(["ddp", "ddp", "ddp_spawn", "ddp_fork"])
    running = Running([job, "--accelerator", "cpu", "--strategy", strategy, "--devices", "4", "--job", "wait"])
    if random.random() < 0.5:
        running.wait_for(r"rank \d is ready")
    time.sleep(random.uniform(0, 1.5))
    ready = running.text.count("is ready") == 4
    moments["after" if ready else "before all had joined"] += 1
    victim = random.choice(processes_of(running.process.pid))
    what = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
    try:
        os.kill(victim, what)
    except ProcessLookupError:
        continue
    start = time.monotonic()
    try:
        code = running.wait(30)  # which also waits until nobody holds its output
        took = time.monotonic() - start
        assert code != 0, running.text
        assert took < 15, took
        # A child that had not come to its launch when its parent was killed ends there.
        while left := processes_of(running.process.pid):
            assert time.monotonic() - start < 15, left
            time.sleep(0.05)
    except AssertionError as error:
        raise AssertionError(f"launch {launch}, {strategy}, {what!r} to {victim}: {error}\n{running.text}") from error
    slowest = max(slowest, took)
print(f"{launches} launches, none hung, no process left; killed {moments}; the slowest end took {slowest:.1f} s")
