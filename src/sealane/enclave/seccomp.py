"""The system calls that an enclave may make: one table, each group with its reason; all others end the process.

libseccomp (which QEMU itself needs) knows the numbers and compiles the filter. Calls that libraries try in passing and can do
without are refused with an error instead of ending the process: a file that cannot be opened is then an ordinary exception.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import socket
from dataclasses import dataclass
from typing import Final

from sealane.errors import HostError

_ALLOW: Final = 0x7FFF_0000
_KILL_PROCESS: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000
_MASKED_EQUAL: Final = 7
_EQUAL: Final = 4
_ATTRIBUTE_NO_NEW_PRIVILEGES: Final = 3
_FIONBIO: Final = 0x5421
_FIOCLEX: Final = 0x5451
_CLONE_THREAD: Final = 0x0001_0000
_AT_EMPTY_PATH: Final = 0x1000
_SOCKET_TYPE_MASK: Final = 0xF
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_VMA: Final = 0x53_564D41
LIBRARY: Final = "libseccomp.so.2"


@dataclass(frozen=True)
class Word:
    """A condition on an argument: (argument & mask) == value; a mask of None compares all of it."""

    argument: int
    value: int
    mask: int | None = None


@dataclass(frozen=True)
class Calls:
    """Calls with one answer: allowed (`refused` is 0), or refused with this errno; `where` narrows them, `why` is the reason."""

    names: str
    why: str
    where: tuple[Word, ...] = ()
    refused: int = 0


_EXECUTABLE: Final = mmap.PROT_EXEC
_BY_DESCRIPTOR: Final = Word(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)
_STREAMS: Final = Word(1, socket.SOCK_STREAM, _SOCKET_TYPE_MASK)

TABLE: Final = (
    # What it is for
    Calls("recvfrom recvmsg sendto sendmsg read write readv writev", "pump bytes between the descriptors it was given"),
    Calls("accept accept4", "QEMU dials the listener that the agent handed over"),
    Calls("shutdown close", "end a lane"),
    Calls("pread64 preadv preadv2 lseek", "read guest memory, and its own status, from descriptors it was given"),
    Calls(
        "getsockopt setsockopt getsockname getpeername fstat", "ask and set up connections; Python looks at each socket"
    ),
    Calls("newfstatat", "fstat, as glibc makes it (a path beside it would tell sizes and times)", (_BY_DESCRIPTOR,)),
    Calls("dup", "a second name for a descriptor it has"),
    *(
        Calls(
            "fcntl", "the same, close-on-exec, non-blocking; no owner, whom a descriptor would signal", (Word(1, each),)
        )
        for each in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)
    ),
    Calls("ioctl", "non-blocking sockets; nothing else that ioctl does", (Word(1, _FIONBIO),)),
    Calls("ioctl", "close-on-exec for descriptors that came over the call socket", (Word(1, _FIOCLEX),)),
    Calls("pipe2 eventfd2", "wake its own loop: ends that nobody else has"),
    Calls("socketpair", "the same; one for datagrams would send to whatever socket's path it is told", (_STREAMS,)),
    Calls("epoll_create1 epoll_ctl epoll_wait epoll_pwait poll ppoll select pselect6", "wait for descriptors"),
    # Memory
    Calls("mmap mprotect", "memory that cannot be executed: no code comes after the start", (Word(2, 0, _EXECUTABLE),)),
    Calls("mmap mprotect", "executable memory", (Word(2, _EXECUTABLE, _EXECUTABLE),), errno.EACCES),
    Calls("munmap mremap madvise brk mincore", "the allocators of C, Python, OpenSSL, numpy, zstd"),
    # Threads
    Calls("clone", "threads of its own", (Word(0, _CLONE_THREAD, _CLONE_THREAD),)),
    Calls("clone", "processes", (Word(0, 0, _CLONE_THREAD),), errno.EPERM),
    Calls("clone3", "its arguments cannot be looked at; the C library then takes clone", (), errno.ENOSYS),
    Calls("futex futex_waitv set_robust_list rseq sched_yield membarrier", "locks between threads"),
    Calls("sched_getaffinity getcpu sysinfo uname", "how many processors there are, for libraries that ask"),
    Calls("prctl", "names of threads", (Word(0, _PR_SET_NAME),)),
    Calls("prctl", "names of mappings, by the C library", (Word(0, _PR_SET_VMA),)),
    Calls("prctl", "outlive its agent: no signal at its death", (Word(0, _PR_SET_PDEATHSIG), Word(1, 0))),
    Calls("prlimit64", "how large a thread's stack may be: asked of itself, not set", (Word(0, 0), Word(2, 0))),
    # Time, chance, itself
    Calls("clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times", "what time it is; waiting"),
    Calls("getrandom", "keys and nonces"),
    Calls("getpid gettid getppid getuid geteuid getgid getegid getrusage getrlimit", "ask who and how large it is"),
    Calls("rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall", "Python's signals"),
    Calls("exit exit_group", "end"),
    # Tried in passing by libraries; without them they go on
    Calls(
        "open openat openat2 creat stat lstat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd "
        "statfs fstatfs",
        "files: tracebacks, late imports, OpenSSL's configuration",
        (),
        errno.EACCES,
    ),
    Calls("newfstatat", "files, by their path", (Word(3, 0, _AT_EMPTY_PATH),), errno.EACCES),
    Calls("socket connect bind listen", "connections of its own: it has those it was given", (), errno.EACCES),
    Calls("memfd_create", "file descriptors that could be executed", (), errno.EACCES),
)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


class SystemCallFilter:
    """The table as libseccomp has it; made once in the launcher, loaded in each enclave."""

    def __init__(self, table: tuple[Calls, ...] = TABLE) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY, use_errno=True)
        except OSError:
            raise HostError("enclave.unconfined", f"{LIBRARY} is not installed") from None
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(_KILL_PROCESS)))
        if not self._context:
            raise HostError("enclave.unconfined", "libseccomp makes no filter")
        _check(self._library.seccomp_attr_set(self._context, _ATTRIBUTE_NO_NEW_PRIVILEGES, ctypes.c_uint32(0)))
        for calls in table:
            for name in calls.names.split():
                self._add(name, calls)

    def _add(self, name: str, calls: Calls) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return  # this processor, or this libseccomp, does not know it: then it stays forbidden
        words = (_Comparison * len(calls.where))(
            *(
                _Comparison(word.argument, _EQUAL, word.value, 0)
                if word.mask is None
                else _Comparison(word.argument, _MASKED_EQUAL, word.mask, word.value)
                for word in calls.where
            )
        )
        action = ctypes.c_uint32(_ERRNO | calls.refused if calls.refused else _ALLOW)
        _check(self._library.seccomp_rule_add_array(self._context, action, number, len(calls.where), words))

    def load(self) -> None:
        """Put the process, and every thread that it starts, under the filter; needs no_new_privs. Raises HostError."""
        _check(self._library.seccomp_load(self._context))


def _check(result: int) -> None:
    if result < 0:
        raise HostError("enclave.unconfined", f"seccomp: {os.strerror(-result)}")
