"""Landlock without any rule: no file, no TCP port, no signal or abstract socket of others, from here on (landlock(7))."""

import ctypes
import os
from typing import Final

from sealane.errors import HostError

# include/uapi/linux/landlock.h; the numbers are the same on all architectures.
_CREATE_RULESET: Final = 444
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
# How many of the file system's access bits each ABI has; later ones have as many as the last.
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
NET_ABI: Final = 4
_NET_BIND_AND_CONNECT: Final = 3
SCOPE_ABI: Final = 6
_SCOPE_SOCKETS_AND_SIGNALS: Final = 3


class _Attributes(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


def restrict() -> int:
    """Give up all that Landlock can take, and say by which ABI. Raises HostError `enclave.unconfined` where it is not there.

    Needs no_new_privs, and a process with one thread.
    """
    library = ctypes.CDLL(None, use_errno=True)
    abi = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    if abi < 1:
        raise HostError("enclave.unconfined", "Landlock is not in this kernel, or not switched on")
    attributes = _Attributes((1 << _FS_BITS.get(abi, max(_FS_BITS.values()))) - 1, 0, 0)
    if abi >= NET_ABI:
        attributes.net = _NET_BIND_AND_CONNECT
    if abi >= SCOPE_ABI:
        attributes.scoped = _SCOPE_SOCKETS_AND_SIGNALS
    size = 8 * (1 + (abi >= NET_ABI) + (abi >= SCOPE_ABI))
    ruleset = library.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise HostError("enclave.unconfined", f"Landlock: {os.strerror(ctypes.get_errno())}")
    try:
        if library.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)):
            raise HostError("enclave.unconfined", f"Landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)
    return int(abi)
