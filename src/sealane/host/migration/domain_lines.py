"""The connections of a domain's migration: libvirt's client, the two libvirtd, and the lane between the hosts.

    source       client --local.sock--> gate --> libvirtd
                 client --remote.sock--> lane 0 ==== lane 0 --> filter --> libvirtd       destination

At the source the gate keeps the client's last word back (`sealane.libvirt.gate`), at the destination the filter reads all that
the source says (`sealane.libvirt.rpcfilter`). Where one leg ends or fails, so does the other.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sealane.errors import HostError, InternalError, SealaneError
from sealane.hypervisor.unix import connect_unix
from sealane.libvirt.gate import ConfirmGate
from sealane.libvirt.rpcfilter import RpcFilter

_READ_BYTES: Final = 256 * 1024


def _as_it_is(data: bytes) -> bytes:
    return data


async def dial(path: Path) -> socket.socket:
    """A connection to a unix socket of this host; raises `libvirt.unreachable`."""
    try:
        return await connect_unix(str(path))
    except OSError as error:
        raise HostError("libvirt.unreachable", f"{path}: {error.strerror or 'it takes no connection'}") from error


class Line:
    """Two connections joined, each direction through a function of its own; `ended` is set once both have ended."""

    def __init__(
        self,
        near: socket.socket,
        far: socket.socket,
        *,
        forward: Callable[[bytes], bytes] = _as_it_is,
        back: Callable[[bytes], bytes] = _as_it_is,
    ) -> None:
        self.near, self.far = near, far
        self.failure: SealaneError | None = None
        self._tasks = (
            asyncio.create_task(self._pump(near, far, forward)),
            asyncio.create_task(self._pump(far, near, back)),
        )
        self.ended = asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(source, _READ_BYTES):
                if passed := change(data):
                    await loop.sock_sendall(sink, passed)
        except SealaneError as error:
            self.failure = self.failure or error
        except OSError:
            pass
        except Exception as error:  # a leg that ended without a word would be a migration that stands still
            self.failure = self.failure or InternalError("internal.error", f"a line to libvirt: {type(error).__name__}")
            raise
        finally:
            # libvirt's protocol knows no half-closed connection: what one end closed is closed for both
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """End both directions and close both connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.near.close()
        self.far.close()


class SourceLines:
    """The client's two sockets in `directory`; `close` them whatever happened."""

    def __init__(self, directory: Path, daemon: Path, lane: socket.socket) -> None:
        self.local, self.remote = directory / "local.sock", directory / "remote.sock"
        self.gate = ConfirmGate()
        self.last_word = asyncio.Event()
        self._daemon, self._lane = daemon, lane
        self._lines: list[Line] = []
        self._to_daemon: Line | None = None
        self._listeners = [self._listen(self.local), self._listen(self.remote)]
        self._accepting = (
            asyncio.create_task(self._serve_local(self._listeners[0])),
            asyncio.create_task(self._serve_remote(self._listeners[1])),
        )

    @staticmethod
    def _listen(path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
        return listener

    async def _serve_local(self, listener: socket.socket) -> None:
        near, _ = await asyncio.get_running_loop().sock_accept(listener)
        near.setblocking(False)
        try:
            far = await dial(self._daemon)
        except SealaneError:
            near.close()
            return
        self._to_daemon = Line(near, far, forward=self._pass_gate)
        self._lines.append(self._to_daemon)

    async def _serve_remote(self, listener: socket.socket) -> None:
        near, _ = await asyncio.get_running_loop().sock_accept(listener)
        near.setblocking(False)
        self._lines.append(Line(near, self._lane))

    def _pass_gate(self, data: bytes) -> bytes:
        passed = self.gate.feed(data)
        if self.gate.word is not None:
            self.last_word.set()
        return passed

    @property
    def is_over(self) -> bool:
        """Whether the client has come, and has ended its connection to the source's libvirtd."""
        return self._to_daemon is not None and self._to_daemon.ended.done()

    async def over(self, timeout_s: float) -> None:
        """Wait for that, for so long at most."""
        if self._to_daemon is not None:
            await asyncio.wait({self._to_daemon.ended}, timeout=timeout_s)

    def end_lane(self) -> None:
        """Say no more to the destination's libvirtd: its lane can close."""
        with contextlib.suppress(OSError):
            self._lane.shutdown(socket.SHUT_WR)

    async def let_go(self) -> None:
        """Pass the word that ends the source's copy."""
        if self._to_daemon is not None and (word := self.gate.let_go()):
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._to_daemon.far, word)

    async def close(self) -> None:
        """Close everything; the client's calls fail then."""
        for task in self._accepting:
            task.cancel()
        await asyncio.wait(self._accepting)
        for listener in self._listeners:
            listener.close()
        for line in self._lines:
            await line.close()
        self._lane.close()


class FilteredLine:
    """The destination's end: the lane's connection on one side, this host's libvirtd on the other, the filter between."""

    def __init__(self, lane: socket.socket, daemon: socket.socket, rpc: RpcFilter) -> None:
        self.filter = rpc
        self.prepared = asyncio.Event()  # libvirtd has launched QEMU, which listens
        self._line = Line(lane, daemon, forward=rpc.from_source, back=self._back)

    def _back(self, data: bytes) -> bytes:
        passed = self.filter.from_daemon(data)
        if self.filter.has_prepared:
            self.prepared.set()
        return passed

    async def ended(self) -> None:
        """Return once the source has said all, or raise what the filter said: `libvirt.refused`, `libvirt.malformed`."""
        await asyncio.shield(self._line.ended)
        if self._line.failure is not None:
            raise self._line.failure

    @property
    def failure(self) -> SealaneError | None:
        """What the filter said, if it ended the connection."""
        return self._line.failure

    async def close(self) -> None:
        """Close both ends: libvirtd then destroys what has not come to its Finish."""
        await self._line.close()
