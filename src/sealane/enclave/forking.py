"""A fork whose child is a child of the launcher's parent: the agent starts, watches, ends and reaps its enclaves itself.

fork(2) would make the launcher the parent, and PR_SET_PDEATHSIG would follow the launcher's life instead of the agent's.
clone(2) with CLONE_PARENT gives the child to the caller's own parent, and CLONE_PIDFD a descriptor of it with no moment in
which its number could mean another process. clone3(2) would be the same on all architectures, but container runtimes
refuse it, because their filters cannot look into its arguments.

The C library does not hear of a raw clone. What its fork would mend: the interpreter's state (PyOS_BeforeFork and its
sisters, made for this), the thread id that it keeps (CLONE_CHILD_SETTID, at the address that the kernel remembers); its
locks need nothing, as the caller has one thread.
"""

import ctypes
import os
import platform
import signal
from typing import Final

from sealane.errors import HostError

# clone's number (asm/unistd.h), and whether its fourth argument is the child's thread id or the TLS (CONFIG_CLONE_BACKWARDS).
_CLONE: Final = {"x86_64": (56, False), "aarch64": (220, True), "riscv64": (220, True)}
_CLONE_PIDFD: Final = 0x1000
_CLONE_PARENT: Final = 0x8000
_CLONE_CHILD_SETTID: Final = 0x0100_0000
_CLONE_CHILD_CLEARTID: Final = 0x0020_0000
_PR_GET_TID_ADDRESS: Final = 40


def fork_for_parent() -> tuple[int, int]:
    """(pid, pidfd) in the caller, (0, -1) in the child; the pidfd is close-on-exec.

    Raises HostError `enclave.died` where there is more than one thread, the kernel refuses, or the processor is unknown.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise HostError("enclave.died", "the launcher has threads, which a fork would lose")
    if platform.machine() not in _CLONE:
        raise HostError("enclave.died", f"clone(2) is not known for {platform.machine()}")
    number, backwards = _CLONE[platform.machine()]
    library = ctypes.PyDLL(None, use_errno=True)  # the interpreter's lock stays held, as in os.fork
    descriptor, tid_address = ctypes.c_int(-1), _tid_address(library)
    flags = _CLONE_PARENT | _CLONE_PIDFD | (_CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID if tid_address else 0)
    last = (0, tid_address) if backwards else (tid_address, 0)
    words = [ctypes.c_long(each) for each in (number, flags | signal.SIGCHLD, 0, ctypes.addressof(descriptor), *last)]
    syscall, before, in_child, in_caller = (
        library.syscall,
        ctypes.pythonapi.PyOS_BeforeFork,
        ctypes.pythonapi.PyOS_AfterFork_Child,
        ctypes.pythonapi.PyOS_AfterFork_Parent,
    )
    syscall.restype = ctypes.c_long
    for hook in (before, in_child, in_caller):
        hook.restype = None
    before()
    pid = syscall(*words)
    if pid == 0:
        in_child()
        return 0, -1
    in_caller()
    if pid < 0:
        raise HostError("enclave.died", f"no process for the enclave: {os.strerror(ctypes.get_errno())}")
    return pid, descriptor.value


def _tid_address(library: ctypes.CDLL) -> int:
    """Where the C library keeps this thread's id; 0 where the kernel does not tell (no CONFIG_CHECKPOINT_RESTORE)."""
    address = ctypes.c_ulong(0)
    return 0 if library.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0) else address.value
