# SPDX-License-Identifier: Apache-2.0
"""[issue-6.3] [issue-6.2] How ranks find each other, and what is refused: duplicates, strangers, interfaces that reach
nobody. LSF's and Kubeflow's variables."""

import socket
import struct
import threading
import time

from launchers import Running, free_port, job

kinds = {"hello": b"h", "refused": b"r", "accepted": b"y", "other_run": b"o"}


def flags(devices, nodes=1):
    return ["--accelerator", "cpu", "--strategy", "ddp", "--devices", str(devices), "--num-nodes", str(nodes)]


def rank(number, port, size=2, **variables):
    return Running([job, *flags(size)], {"LOCAL_RANK": str(number), "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
                                         **variables})


def check_trained(*all_ranks):
    for running in all_ranks:
        assert running.wait() == 0, running.text
    assert sum(running.text.count("result=") for running in all_ranks) == 1


def test_late_rank_0():
    port = free_port()
    one = rank(1, port)
    time.sleep(0.5)
    check_trained(one, rank(0, port))


def test_duplicate_rank():
    port = free_port()
    all_ranks = [rank(0, port, 3), rank(1, port, 3), rank(1, port, 3)]
    for running in all_ranks:
        assert running.wait(30) != 0, running.text
    text = "".join(running.text for running in all_ranks)
    assert "says that it is rank 1, and so does process" in text, text


def test_duplicate_rank_0():
    port = free_port()
    first = rank(0, port)
    time.sleep(1.5)
    second = rank(0, port)
    assert second.wait(30) != 0 and first.wait(30) != 0, second.text
    assert "says that it is rank 0, and so does process" in second.text, second.text


def test_other_size():
    port = free_port()
    both = rank(0, port, 2), Running([job, *flags(3)], {"LOCAL_RANK": "1", "MASTER_PORT": str(port)})
    assert both[1].wait(30) != 0 and both[0].wait(30) != 0
    assert "in a job of 3 processes, but rank 0 in one of 2" in both[1].text, both[1].text


def test_other_run():
    """Two jobs were told the same port: the second finds it taken, and its ranks do not join the first."""
    port = free_port()
    first = rank(0, port, FABRIC_RUN_ID="first")
    time.sleep(1)
    second = [rank(n, port, FABRIC_RUN_ID="second") for n in (0, 1)]
    for running in second:
        assert running.wait(30) != 0, running.text
    assert f"MASTER_PORT {port} is taken" in second[0].text, second[0].text
    assert "another job meets there" in second[1].text, second[1].text
    check_trained(first, rank(1, port, FABRIC_RUN_ID="first"))


def test_stranger():
    """Somebody who connects and speaks something else disturbs nobody."""
    port = free_port()
    zero = rank(0, port)
    deadline = time.monotonic() + 30
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    check_trained(zero, rank(1, port))


def test_no_such_interface():
    running = Running([job, *flags(2)], {"GLOO_SOCKET_IFNAME": "ib7"})
    assert running.wait() != 0 and "GLOO_SOCKET_IFNAME ib7 is no interface of" in running.text, running.text
    assert "lo" in running.text


def test_loopback_interface_between_hosts():
    """A rank that comes from another host, which here only says so, and would listen on its own loopback interface."""
    port = free_port()
    zero = rank(0, port, FABRIC_RUN_ID="hosts")
    text = "hosts\nelsewhere\nnode7\n127.0.0.1\nGLOO_SOCKET_IFNAME=lo\n1 2 4711 0".encode()
    deadline = time.monotonic() + 30
    while True:
        try:
            one = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    one.sendall(struct.pack("=c3xiiII", kinds["hello"], 0, 0, len(text), 0xFAB51C01) + text)
    assert zero.wait(30) != 0
    assert "rank 1 on node7 would listen on 127.0.0.1" in zero.text and "because of GLOO_SOCKET_IFNAME=lo" in zero.text, zero.text


def test_loopback_address_on_another_node():
    start = time.monotonic()
    running = Running([job, *flags(1, 2)], {"LOCAL_RANK": "0", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                                            "MASTER_PORT": str(free_port())})
    assert running.wait(60) != 0 and time.monotonic() - start < 40
    assert "MASTER_ADDR 127.0.0.1 is this host itself" in running.text, running.text


def test_rank_that_does_not_come():
    """Rank 0 says whom it waits for, and goes on when they are there."""
    port = free_port()
    zero = rank(0, port, 3)
    one = rank(1, port, 3)
    zero.wait_for("still waits, of 3 ranks, for these: 2", 30)
    check_trained(zero, one, rank(2, port, 3))


def test_kubeflow():
    port = free_port()
    check_trained(*[Running([job, *flags(1, 2), "--environment", "kubeflow"],
                            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(n)})
                    for n in range(2)])


def test_lsf():
    check_trained(*[Running([job, *flags(2)],
                            {"LSB_JOBID": lsf_job, "LSB_MCPU_HOSTS": f"batch 1 {socket.gethostname()} 2", "JSM_NAMESPACE_SIZE": "2",
                             "JSM_NAMESPACE_RANK": str(n), "JSM_NAMESPACE_LOCAL_RANK": str(n)})
                    for n in range(2)])


lsf_job = str(time.time_ns() % 1_000_000)
failures = []
def run(test):
    start = time.monotonic()
    try:
        test()
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    except BaseException as error:
        failures.append(test.__name__)
        print(f"{test.__name__}: {error!r}", flush=True)


waiting = [test_loopback_address_on_another_node, test_rank_that_does_not_come]  # most of the time
slow = [threading.Thread(target=run, args=[test]) for test in waiting]
for thread in slow:
    thread.start()
for name, test in list(globals().items()):
    if name.startswith("test_") and test not in waiting:
        run(test)
for thread in slow:
    thread.join()
assert not failures, failures
