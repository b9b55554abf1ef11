"""A real launcher whose enclaves try one forbidden act from inside the sandbox, instead of serving, and say how it went.

    python probe.py DESCRIPTOR UID GID ACT REMOVED

The launcher, the fork and the sandbox are those of `sealane.enclave`; REMOVED names measures that are left out (joined by
commas, or `none`), which shows that the act fails because of them. UID `-` stays with the caller's user.
"""

import ctypes
import fcntl
import mmap
import os
import resource
import socket
import sys
from collections.abc import Callable

from sealane.enclave import landlock, launcher, sandbox
from sealane.enclave.seccomp import SystemCallFilter

HOLD_BYTES = 32 << 20
LOCKED_BYTES_MAX = 64 << 10  # far less than an enclave has, and no more than what any system gives
CAP_IPC_LOCK, CAP_SYS_RESOURCE = 14, 24
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def connect() -> None:
    with socket.socket() as dialling:
        dialling.connect(("127.0.0.1", int(os.environ["PORT"])))


def listen() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))


def datagram() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.sendto(b"a key", os.environ["DATAGRAMS"])


def signal_by_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fcntl.fcntl(ours, fcntl.F_SETOWN, os.getppid())


def fork() -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def gain() -> None:
    os.setuid(0)


def mount() -> None:
    checked(LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None))


HELD: list[bytearray] = []


def hold() -> None:
    HELD.append(bytearray(os.urandom(HOLD_BYTES)))


def lose_the_right_to_lock() -> None:
    """What a user without privileges has: a limit on locked memory, and nothing to lift it or pass it by."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LOCKED_BYTES_MAX, LOCKED_BYTES_MAX))
    header, sets = (ctypes.c_uint32 * 2)(0x2008_0522, 0), (ctypes.c_uint32 * 6)()
    checked(LIBC.capget(ctypes.byref(header), ctypes.byref(sets)))
    for index in range(3):  # effective, permitted, inheritable; the capabilities below 32
        sets[index] &= ~(1 << CAP_IPC_LOCK | 1 << CAP_SYS_RESOURCE)
    checked(LIBC.capset(ctypes.byref(header), ctypes.byref(sets)))


ACTS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "hold": hold,
    "open": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)),
    "create": lambda: os.close(os.open(os.environ["TMP_FILE"], os.O_CREAT | os.O_WRONLY)),
    "connect": connect,
    "listen": listen,
    "datagram": datagram,
    "signal by descriptor": signal_by_descriptor,
    "fork": fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close(),
    "signal": lambda: os.kill(os.getppid(), 0),
    "ptrace": lambda: checked(LIBC.ptrace(0x4206, os.getppid(), 0, 0)),
    "gain": gain,
    "mount": mount,
    "outlive": sandbox.outlive_parent,
    "another death signal": lambda: checked(LIBC.prctl(1, 15, 0, 0, 0)),
    "dumpable": lambda: checked(LIBC.prctl(4, 1, 0, 0, 0)),
    "limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)),
    "many descriptors": lambda: [os.dup(1) for _ in range(1000)],
}


def without(removed: set[str]) -> None:
    """Leave measures out."""
    if "calls" in removed:
        SystemCallFilter.load = lambda self: None  # type: ignore[method-assign]
    if "files" in removed:
        landlock.restrict = lambda: 0
    if "privileges" in removed:
        kept = sandbox._prctl
        sandbox._prctl = lambda option, value: 0 if option == 38 else kept(option, value)
    if "capabilities" in removed:
        sandbox._drop_capabilities = lambda: None
    if "limits" in removed:
        sandbox.resource = type("NoLimits", (), {**vars(resource), "setrlimit": staticmethod(lambda *_: None)})  # type: ignore[attr-defined, assignment]
    if "memory" in removed:
        sandbox._lock_memory = lambda: ""
    if "the right to lock" in removed:
        lose_the_right_to_lock()
    if "locked memory's limit" in removed:
        told = resource.getrlimit
        none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.getrlimit = lambda which: none if which == resource.RLIMIT_MEMLOCK else told(which)
    if "descriptors" in removed:
        os.closerange = lambda *_: None


def attempt(act: str, removed: set[str]) -> Callable[[int, sandbox.Sandbox], None]:
    def main(descriptor: int, confinement: sandbox.Sandbox) -> None:
        if "dumpable" in removed:
            LIBC.prctl(4, 1, 0, 0, 0)
        calls = socket.socket(fileno=descriptor)
        measures = confinement.enter(frozenset({descriptor}))
        calls.send(repr(measures).encode())
        try:
            ACTS[act]()
        except OSError as error:
            calls.send(f"{type(error).__name__}: {error}".encode())
        else:
            calls.send(b"done")
        calls.recv(1)  # until the test has looked from outside

    return main


if __name__ == "__main__":
    number, uid, gid, act, left_out = sys.argv[1:]
    removed = set(left_out.split(","))
    without(removed)
    launcher.main = attempt(act, removed)  # type: ignore[attr-defined, assignment]
    launcher.launch(int(number), None if uid == "-" else int(uid), None if gid == "-" else int(gid))
