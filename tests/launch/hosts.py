# SPDX-License-Identifier: Apache-2.0
"""[issue-6.3] [issue-6.4] Two hosts: network namespaces of this machine, which a cable connects. Names that resolve as
Debian's do, interfaces that reach nobody, and a host that vanishes. Skipped without root, who may make namespaces."""

import os
import shutil
import subprocess
import time

from launchers import Running, ends, free_port, job, skip

hosts = [f"fabric{os.getpid()}{letter}" for letter in "ab"]
addresses = ["10.77.0.1", "10.77.0.2"]
names = ["node-a", "node-b"]


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, stderr=subprocess.PIPE, text=True)


def remove():
    for host in hosts:
        ip("netns", "delete", host, check=False)  # and with it its end of the cable
        shutil.rmtree(f"/etc/netns/{host}", ignore_errors=True)


def make():
    if ip("netns", "add", hosts[0], check=False).returncode != 0:
        skip("this user may not make network namespaces")
    ip("netns", "add", hosts[1])
    ip("-n", hosts[0], "link", "add", "cable0", "type", "veth", "peer", "name", "cable0", "netns", hosts[1])
    for i, host in enumerate(hosts):
        for words in (["link", "set", "lo", "up"], ["address", "add", addresses[i] + "/24", "dev", "cable0"],
                      ["link", "set", "cable0", "up"],
                      # As container engines leave one behind, with the same address on each host.
                      ["link", "add", "bridge0", "type", "veth", "peer", "name", "bridge1"], ["address", "add", "172.17.0.1/16", "dev", "bridge0"],
                      ["link", "set", "bridge0", "up"], ["link", "set", "bridge1", "up"]):
            ip("-n", host, *words)
        os.makedirs(f"/etc/netns/{host}")
        with open(f"/etc/netns/{host}/hosts", "w") as file:  # which is /etc/hosts there
            file.write(f"127.0.0.1 localhost\n127.0.1.1 {names[i]}\n{addresses[1 - i]} {names[1 - i]}\n")


def node(number, port, *arguments, **variables):
    """The same command on each host, but for the node's rank."""
    return Running(["ip", "netns", "exec", hosts[number], job, "--accelerator", "cpu", "--strategy", "ddp", "--devices", "2",
                    "--num-nodes", "2", *arguments],
                   {"MASTER_ADDR": names[0], "MASTER_PORT": str(port), "NODE_RANK": str(number), **variables})


def both(*arguments, first=None, second=None):
    port = free_port()
    return [node(0, port, *arguments, **(first or {})), node(1, port, *arguments, **(second or {}))]


def check_trained(running):
    for each in running:
        assert each.wait() == 0, each.text
    assert sum(each.text.count("result=") for each in running) == 1, [each.text for each in running]


def test_own_name_is_a_loopback_address():
    """Beside rank 0 its host's name leads to 127.0.1.1, where the other host reaches nobody."""
    check_trained(both())


def test_interface():
    cable = {"GLOO_SOCKET_IFNAME": "cable0"}
    check_trained(both(first=cable, second=cable))


def check_refused(running, rank, address, interface):
    for each in running:
        assert each.wait(30) != 0, each.text
    text = "".join(each.text for each in running)
    assert f"rank {rank} on " in text and f"would listen on {address}, where other hosts cannot reach it" in text, text
    assert f"because of GLOO_SOCKET_IFNAME={interface}" in text, text


def test_interface_that_reaches_nobody():
    bridge = {"GLOO_SOCKET_IFNAME": "bridge0"}
    check_refused(both(first=bridge, second=bridge), 0, "172.17.0.1", "bridge0")


def test_interface_of_one_host_that_reaches_nobody():
    check_refused(both(second={"GLOO_SOCKET_IFNAME": "bridge0"}), 2, "172.17.0.1", "bridge0")


def test_loopback_interface():
    check_refused(both(second={"GLOO_SOCKET_IFNAME": "lo"}), 2, "127.0.0.1", "lo")


def test_host_that_vanishes():
    """Nobody says goodbye, and no connection is closed."""
    running = both("--job", "wait")
    for rank in range(4):
        running[rank // 2].wait_for(rf"rank {rank} is ready")
    processes = [running[rank // 2].process_of(rank) for rank in range(4)]
    ip("-n", hosts[1], "link", "set", "cable0", "down")
    start = time.monotonic()
    for each in running:
        assert each.wait(30) != 0, each.text
    took = time.monotonic() - start
    ip("-n", hosts[1], "link", "set", "cable0", "up")
    assert took < 15, (took, running[0].text, running[1].text)
    assert all(ends(process) for process in processes)
    assert "fabric: rank 2 of 4" in running[0].text or "fabric: rank 3 of 4" in running[0].text, running[0].text
    assert "fabric: rank 0 of 4" in running[1].text, running[1].text
    print(f"a host that vanishes: both sides ended after {took:.1f} s", flush=True)


if not shutil.which("ip"):
    skip("no ip: install iproute2")
try:
    make()
    for test in [value for name, value in list(globals().items()) if name.startswith("test_")]:
        start = time.monotonic()
        test()
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s", flush=True)
finally:
    remove()
