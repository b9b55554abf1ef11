"""Whose descriptors are taken for a monitor's: only those of the process that was launched. With real QEMU: `test_qmp.py`."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sealane.hypervisor.lent import borrow
from sealane.hypervisor.process import LaunchedMachine, start_time_ticks

# What QEMU's process looks like from outside while a connection is lent: it names the monitor, serves it, and holds a client's end.
_HOLDS_BOTH_ENDS = """
import socket, sys
server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
client.connect(sys.argv[1])
print("holds", flush=True)
sys.stdin.read()
"""


@contextmanager
def process_that_holds(path: Path) -> Iterator[LaunchedMachine]:
    argv = [sys.executable, "-c", _HOLDS_BOTH_ENDS, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        yield LaunchedMachine(process.pid, start_time_ticks(process.pid) or 0)
        assert process.stdin is not None
        process.stdin.close()


def test_another_process_is_not_believed(tmp_path: Path) -> None:
    """Who can make a socket of that name somewhere could play a QEMU to the agent: the launched process alone is asked."""
    path = tmp_path / "s"
    with process_that_holds(path):
        path.unlink()
        with process_that_holds(path) as launched:
            taken = borrow(str(path), launched)
            assert taken is not None
            with taken:
                assert taken.getpeername() == str(path)
                assert _listener_of(taken) == launched.pid
    with process_that_holds(tmp_path / "t") as forger:
        assert borrow(str(tmp_path / "t"), LaunchedMachine(os.getpid(), start_time_ticks(os.getpid()) or 0)) is None
        assert borrow(str(tmp_path / "other"), forger) is None


def test_a_pid_that_was_given_out_again_is_not_believed(tmp_path: Path) -> None:
    with process_that_holds(tmp_path / "s") as later:
        earlier = LaunchedMachine(later.pid, later.start_time_ticks - 1)
        assert borrow(str(tmp_path / "s"), earlier) is None


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    with process_that_holds(tmp_path / "s") as ended:
        pass
    assert borrow(str(tmp_path / "s"), ended) is None


def _listener_of(connection: socket.socket) -> int:
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
