# SPDX-License-Identifier: Apache-2.0
"""[issue-6.2] Open MPI's and MPICH's mpirun."""

import os
import shutil
import socket

from launchers import Launcher, Running, job, skip


class Mpi(Launcher):
    ranks = 3

    def __init__(self, name, command, says_itself=None):
        self.name = name
        self.command = command
        self.says_itself = says_itself

    def start(self, arguments, variables=None):
        return Running([*self.command, "-n", "3", job, *self.flags(*arguments)], variables)

    def port_in_use(self):
        super().port_in_use()
        with socket.socket() as taken:  # nobody named a port: another one is found
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("0.0.0.0", 12910))
            taken.listen()
            self.check_trained(self.start(["--job", "train"]))


open_mpi, mpich = shutil.which("mpirun.openmpi"), shutil.which("mpiexec.hydra")
if open_mpi:
    # As root in tests, and with more processes than there are cores.
    os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    Mpi("mpirun (Open MPI)", [open_mpi, "--oversubscribe", "--bind-to", "none"]).check()
if mpich:
    # It kills all others at the first sign, mostly before anybody can say which rank it was, and may name one of those.
    Mpi("mpirun (MPICH)", [mpich], r"Killed \(signal 9\)").check()
if not (open_mpi and mpich):
    skip("in part: not installed: " + ("" if open_mpi else "Open MPI ") + ("" if mpich else "MPICH"))
