"""A monitor's connection that QEMU itself keeps open while no agent is there.

A QEMU whose main thread waits for a page of a postcopy answers nothing but out-of-band commands, and those only to a client
that has negotiated before: to a new one it says nothing until the page comes. So an agent that has such a QEMU run its VM gives
it a descriptor of the agent's own end of their connection (`add-fd`). The connection then outlives the agent, and the next one
takes it up with pidfd_getfd(2) (Linux 5.6), which asks for the right to trace that QEMU. While it is lent, QEMU greets nobody
else: a monitor has one client.
"""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

LENT: Final = "sealane: kept for the next agent"
_SYS_PIDFD_GETFD: Final = 438  # asm-generic/unistd.h; the same on every architecture


def borrow(path: str) -> tuple[int, socket.socket] | None:
    """The process that holds a client's end of its own monitor at `path`, and that end.

    None where there is none, or it cannot be had.

    Nobody connects for it: what is not greeted stays in the monitor's queue, which is short.
    """
    for pid in _processes_with(path):
        try:
            process = os.pidfd_open(pid)
        except (OSError, AttributeError):
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if _is_socket(pid, name) and (found := _client_of(process, int(name), path)):
                    return pid, found
        except OSError:
            pass
        finally:
            os.close(process)
    return None


def _processes_with(path: str) -> Iterator[int]:
    """Those whose command line names it."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.fsencode(path) in Path(f"/proc/{name}/cmdline").read_bytes():
                yield int(name)


def _is_socket(pid: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    except OSError:
        return False


def _client_of(process: int, number: int, path: str) -> socket.socket | None:
    """That descriptor of the process, where it is connected to `path`: the monitor's own end has no such peer."""
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), process, number, 0)
    if descriptor < 0:
        return None
    found = socket.socket(fileno=descriptor)
    try:
        if found.family == socket.AF_UNIX and found.getpeername() == path:
            found.setblocking(False)
            return found
    except OSError:
        pass
    found.close()
    return None
