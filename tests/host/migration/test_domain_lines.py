"""Two connections joined: how the line ends."""

import asyncio
import socket

import pytest

from sealane.errors import PeerError
from sealane.host.migration.domain_lines import Line


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("a bug"), "internal.error"), (PeerError("peer.message"), "peer.message"), (OSError("gone"), None)],
)
async def test_a_leg_that_fails_ends_the_other(error: Exception, code: str | None) -> None:
    def fail(_data: bytes) -> bytes:
        raise error

    (near, client), (far, daemon) = socket.socketpair(), socket.socketpair()
    for each in (near, client, far, daemon):
        each.setblocking(False)
    line = Line(near, far, forward=fail)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(20):
            await loop.sock_sendall(client, b"what it does not take")
            assert await loop.sock_recv(daemon, 1) == b""
            assert await loop.sock_recv(client, 1) == b""
            await line.ended
        assert (line.failure and line.failure.code) == code
    finally:
        await line.close()
        client.close()
        daemon.close()
