"""A monitor's connection that QEMU itself keeps open while no agent is there.

A QEMU whose main thread waits for a page of a postcopy answers nothing but out-of-band commands, and those only to a client
that has negotiated before: to a new one it says nothing until the page comes. So an agent that has such a QEMU run its VM gives
it a descriptor of the agent's own end of their connection (`add-fd`). The connection then outlives the agent, and the next one
takes it up with pidfd_getfd(2) (Linux 5.6), which asks for the right to trace that QEMU. While it is lent, QEMU greets nobody
else: a monitor has one client.

Only the process that the journal says was launched for the VM is asked for it. Any other could hold a socket of the same name,
in a mount namespace of its own, and play a QEMU behind it.
"""

import ctypes
import os
import socket
from contextlib import suppress
from typing import Final

from sealane.hypervisor.process import LaunchedMachine, start_time_ticks

LENT: Final = "sealane: kept for the next agent"
_SYS_PIDFD_GETFD: Final = 438  # asm-generic/unistd.h; the same on every architecture


def borrow(path: str, holder: LaunchedMachine) -> socket.socket | None:
    """The client's end of the monitor at `path` that this launched QEMU keeps; None where it keeps none, or it cannot be had.

    Nobody connects for it: what is not greeted stays in the monitor's queue, which is short.
    """
    try:
        process = os.pidfd_open(holder.pid)
    except (OSError, AttributeError):
        return None
    try:
        if start_time_ticks(holder.pid) != holder.start_time_ticks:  # the pid was given out again
            return None
        names = os.listdir(f"/proc/{holder.pid}/fd")
        sockets = (int(name) for name in names if _is_socket(holder.pid, name))
        return next((found for number in sockets if (found := _client_of(process, number, path))), None)
    except OSError:
        return None
    finally:
        os.close(process)


def _is_socket(pid: int, name: str) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return False


def _client_of(process: int, number: int, path: str) -> socket.socket | None:
    """That descriptor of the process, where it is connected to `path`: the monitor's own end has no such peer."""
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), process, number, 0)
    if descriptor < 0:
        return None
    found = socket.socket(fileno=descriptor)
    with suppress(OSError):
        if found.family == socket.AF_UNIX and found.getpeername() == path:
            found.setblocking(False)
            return found
    found.close()
    return None
