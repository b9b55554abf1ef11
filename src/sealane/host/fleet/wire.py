"""One connection and the renewal that it feeds."""

import asyncio
import contextlib
import socket
from typing import Final, TypeVar

from sealane.errors import PeerError, SealaneError
from sealane.session.renewal import Event, Renewal

T = TypeVar("T", bound=Event)
_READ_BYTES: Final = 64 * 1024


class Wire:
    """Bytes in and out; the caller bounds the time and closes the socket."""

    def __init__(self, connection: socket.socket, renewal: Renewal) -> None:
        self._connection, self._renewal = connection, renewal
        self._events: list[Event] = []

    async def expect(self, kind: type[T]) -> T:
        """The next event, which has to be of this kind; raises what the renewal raises, or `peer.closed`."""
        loop = asyncio.get_running_loop()
        while not self._events:
            await self.flush()
            data = await loop.sock_recv(self._connection, _READ_BYTES)
            if not data:
                raise PeerError("peer.closed", "the other end closed the connection")
            self._events += self._renewal.receive(data)
        event = self._events.pop(0)
        if not isinstance(event, kind):
            raise PeerError("peer.message", "something came out of turn")
        return event

    async def flush(self) -> None:
        """Send what waits."""
        if data := self._renewal.bytes_to_send():
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def refuse(self, error: SealaneError) -> None:
        """Tell the other end why, if it still listens."""
        with contextlib.suppress(OSError, TimeoutError, SealaneError):
            self._renewal.refuse(error)
            async with asyncio.timeout(1.0):
                await self.flush()
