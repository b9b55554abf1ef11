"""Who asks on the agent's unix socket: peer credentials, and the user database.

The kernel names the process that connected (unix(7), SO_PEERCRED); nothing that the caller says is believed.
"""

import asyncio
import grp
import os
import pwd
import socket
import struct
from contextlib import suppress
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from sealane.host.policy import UNKNOWN_CALLER, Caller

_UCRED: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_BY_NUMBER: Final = "uid:"


class CallerProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 that also tells each request, as `state.caller_uid`, who opened its connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask the kernel once for each connection."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        with suppress(OSError, AttributeError):
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            _, uid, _ = _UCRED.unpack(data)
            self.app_state = {**self.app_state, "caller_uid": uid}


def caller_of_uid(uid: int) -> Caller:
    """The user of that number with its groups; one that the database lacks is called by its number."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Caller(f"{_BY_NUMBER}{uid}", uid)
    return Caller(entry.pw_name, uid, _groups(entry))


def caller_called(name: str | None) -> Caller:
    """The user of that name, or of that number written as `uid:1000`; an unknown one is in no group."""
    if name is None:
        return UNKNOWN_CALLER
    number = name.removeprefix(_BY_NUMBER)
    if name.startswith(_BY_NUMBER) and number.isascii() and number.isdigit():
        return Caller(name, int(number))
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return Caller(name, -1)
    return Caller(name, entry.pw_uid, _groups(entry))


def _groups(entry: pwd.struct_passwd) -> tuple[str, ...]:
    found = []
    for number in os.getgrouplist(entry.pw_name, entry.pw_gid):
        with suppress(KeyError):
            found.append(grp.getgrgid(number).gr_name)
    return tuple(sorted(set(found)))
