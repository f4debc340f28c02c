# SPDX-License-Identifier: Apache-2.0
"""[issue-6.2] torchrun: two agents that find each other by c10d; a worker that is killed, a restart, and how it goes on."""

import os
import re
import signal
import socket
import tempfile
import time

from launchers import Launcher, Running, free_port, job, root, skip

python = os.path.join(root, "third_party", "python", "bin", "python")
if os.environ.get("PYTHON") == "off" or not os.access(python, os.X_OK):
    skip("tools/install-python has made no third_party/python")


def agents(nodes, arguments, restarts=0):
    """A shell script that starts one agent a node and waits for all."""
    port = free_port()
    per_node = 2 // nodes
    agent = " ".join([python, "-m torch.distributed.run --no-python --nnodes", str(nodes), "--nproc-per-node", str(per_node),
                      "--max-restarts", str(restarts), "--monitor-interval 0.2 --rdzv-backend c10d --rdzv-id test",
                      "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr 127.0.0.1"])
    flags = ["--accelerator", "cpu", "--strategy", "ddp", "--devices", str(per_node), "--num-nodes", str(nodes), *arguments]
    one = " ".join([agent, job, *flags])
    script = one if nodes == 1 else f"{one} & {one}; first=$?; wait $! && exit $first"
    return Running(["sh", "-c", script])


class Torchrun(Launcher):
    name = "torchrun"
    says_itself = r"exitcode  : -9 \(pid: {}\)"

    def start(self, arguments, variables=None):
        return Running([python, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2",
                        "--monitor-interval", "0.2", job, *self.flags(*arguments)])

    def right_ranks(self):
        """Two agents, as on two nodes."""
        running = agents(2, ["--job", "train"])
        assert running.wait(120) == 0, running.text
        for rank in range(2):
            line = rf"rank {rank} is process \d+ local=0 node={rank} size=2"
            assert len(re.findall(line, running.text)) == 1, running.text
        assert running.text.count("result=") == 1, running.text

    def port_in_use(self):
        """One that is named is the agent's, which says that it is taken; its store tells ranks of another that is free."""
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            running = Running([python, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2",
                               "--master-addr", "127.0.0.1", "--master-port", port, job, *self.flags("--job", "train")])
            assert running.wait(60) != 0, running.text
            assert "EADDRINUSE" in running.text and port in running.text, running.text


def check_restart():
    """The worker is killed, all are started again, and the job goes on from its file to its end."""
    with tempfile.TemporaryDirectory() as folder:
        counter = os.path.join(folder, "counter")
        running = agents(2, ["--job", "count", "--counter", counter, "--steps", "150"], restarts=1)
        end = time.monotonic() + 60
        while not (os.path.exists(counter) and open(counter).read().strip().isdigit()):
            assert time.monotonic() < end, running.text
            time.sleep(0.05)
        os.kill(running.process_of(1), signal.SIGKILL)
        assert running.wait(120) == 0, running.text
        begins = [int(n) for n in re.findall(r"begins at step (\d+)", running.text)]
        assert len(begins) == 2 and begins[0] == 0 and begins[1] >= 10, running.text
        assert "result=150." in running.text, running.text
        assert len(re.findall(r"rank 1 is process \d+", running.text)) == 2, running.text


def check_restart_before_launch():
    """A worker ends before it launches, while another node's waits for it: that node's agent starts its own again without
    counting a failure, so that the agents disagree on the number of the attempt."""
    running = agents(2, ["--job", "train", "--dies", "--rank", "1"], restarts=1)
    assert running.wait(120) == 0, running.text
    assert "rank 1 dies before it launches" in running.text, running.text
    assert running.text.count("result=") == 1, running.text


check_restart()
check_restart_before_launch()
Torchrun().check()
