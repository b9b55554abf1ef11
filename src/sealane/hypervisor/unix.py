"""Connections to the unix sockets of QEMU and libvirt."""

import asyncio
import socket
from typing import Final

ACCEPTED_WITHIN_S: Final = 30.0
# Whoever listens takes its connections one by one; there is no way to be told of a free place.
_LOOK_AGAIN_S: Final = 0.01


async def connect_unix(path: str) -> socket.socket:
    """A non-blocking connection; waits while the listener's queue is full, as a blocking connect(2) does.

    Raises OSError; TimeoutError, which is one, after `ACCEPTED_WITHIN_S`.

    The event loop's own `sock_connect` takes that (EAGAIN, connect(2)) for a connection under way, and then for one that is made.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(ACCEPTED_WITHIN_S):
            while True:
                try:
                    connection.connect(path)
                except BlockingIOError:
                    await asyncio.sleep(_LOOK_AGAIN_S)
                else:
                    return connection
    except BaseException:
        connection.close()
        raise
