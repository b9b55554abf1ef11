"""What the launcher, and so the enclave, gives up before it reads a word: privileges to gain, core dumps, being read.

The sandbox proper (own user, seccomp, Landlock, keys in memfd_secret) is not here yet; `harden` is its place.
"""

import ctypes
import os
import resource
import signal
from typing import Any, Final

from sealane.errors import HostError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38


def harden() -> None:
    """Apply prctl(2) and setrlimit(2); raises HostError `host.permission` where the kernel refuses."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` dies; ends the process at once where it is dead already. A fork clears it: call it again."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """What ps(1) shows of this process, besides its command line."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def _prctl(option: int, value: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise HostError("host.permission", f"prctl({option}): {os.strerror(ctypes.get_errno())}")
