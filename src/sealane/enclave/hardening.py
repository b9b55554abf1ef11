"""What the enclave gives up before it reads a word: privileges to gain, core dumps, being read by a debugger.

The sandbox proper (own user, seccomp, Landlock, keys in memfd_secret) is not here yet; `harden` is its place. Called
once, before any descriptor is served.
"""

import ctypes
import os
import resource
import signal
from typing import Final

from sealane.errors import HostError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38


def harden() -> None:
    """Apply prctl(2) and setrlimit(2); raises HostError `host.permission` where the kernel refuses."""
    library = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if library.prctl(option, value, 0, 0, 0):
            raise HostError("host.permission", f"prctl({option}): {os.strerror(ctypes.get_errno())}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's business
