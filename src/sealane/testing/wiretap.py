"""A man in the middle: a TCP relay that can read, change, hold back and cut what passes between two hosts.

It sees connections and bytes and knows nothing of what they mean. Faults are small objects with one method, so that a
test says in one line what the attacker does:

    with Wiretap(target, tampers=[flip_bit("forward", offset=70_000)]) as wire:
        connect(wire.address)

A tamper that only wants to look returns what it was given.
"""

import asyncio
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from sealane.testing.hosts import SimulatedHost
from sealane.testing.problems import RigError

Direction: TypeAlias = Literal["forward", "back"]
Address: TypeAlias = tuple[str, int]

# One read. With one buffer per direction and nothing read before the last is sent, this also bounds the relay's memory.
_CHUNK = 1 << 18
_START_TIMEOUT_S = 10.0


class Tamper(Protocol):
    """What an attacker does to the bytes of connections.

    Called in order for all bytes of all connections, each time with the offset in its direction of its connection that
    `data` has in the stream as the tampers before this one left it. Gives what is sent on in its place: the same, other,
    more, or none.
    """

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes, /) -> bytes:
        """The bytes to send on; CutConnection and StallConnection end or hold the direction."""
        ...


class CutConnection(Exception):
    """Raised by a tamper: send `before`, then break the connection, both ways, with a reset where `reset` is set."""

    def __init__(self, before: bytes = b"", *, reset: bool = False) -> None:
        super().__init__("cut")
        self.before = before
        self.reset = reset


class StallConnection(Exception):
    """Raised by a tamper: send `before`, then read nothing more this way until `Wiretap.release`, then `after`."""

    def __init__(self, before: bytes = b"", after: bytes = b"") -> None:
        super().__init__("stalled")
        self.before = before
        self.after = after


@dataclass
class _Edit:
    """Applies `change` to the bytes at `offset` to `offset + length`, held back until all of them have come.

    Where the connection ends first, the bytes held back are lost.
    """

    direction: Direction
    offset: int
    length: int
    change: Callable[[bytes], bytes]
    connection: int | None
    _held: dict[int, bytes] = field(default_factory=dict)

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        if direction != self.direction or self.connection not in (None, connection):
            return data
        end = self.offset + self.length
        start, stop = max(self.offset - offset, 0), end - offset
        if stop <= 0 or start >= len(data):
            return data
        held = self._held.get(connection, b"") + data[start:stop]
        if len(held) < self.length:
            self._held[connection] = held
            return data[:start]
        self._held.pop(connection, None)
        return data[:start] + self.change(held) + data[stop:]


def edit(
    direction: Direction, *, offset: int, length: int, change: Callable[[bytes], bytes], connection: int | None = None
) -> Tamper:
    """Replaces `length` bytes at `offset` by what `change` makes of them; of one connection, or of each."""
    return _Edit(direction, offset, length, change, connection)


def flip_bit(direction: Direction, *, offset: int, bit: int = 0, connection: int | None = None) -> Tamper:
    """Inverts one bit of the byte at `offset`."""
    return edit(
        direction, offset=offset, length=1, change=lambda data: bytes([data[0] ^ 1 << bit]), connection=connection
    )


def duplicate(direction: Direction, *, offset: int, length: int, connection: int | None = None) -> Tamper:
    """Sends a range of bytes twice."""
    return edit(direction, offset=offset, length=length, change=lambda data: data + data, connection=connection)


def drop(direction: Direction, *, offset: int, length: int, connection: int | None = None) -> Tamper:
    """Leaves a range of bytes out."""
    return edit(direction, offset=offset, length=length, change=lambda data: b"", connection=connection)


def swap(direction: Direction, *, offset: int, lengths: tuple[int, int], connection: int | None = None) -> Tamper:
    """Exchanges two neighbouring ranges of bytes, which need not be equally long."""
    first, second = lengths
    return edit(
        direction,
        offset=offset,
        length=first + second,
        change=lambda data: data[first:] + data[:first],
        connection=connection,
    )


def inject(direction: Direction, *, offset: int, data: Callable[[], bytes], connection: int | None = None) -> Tamper:
    """Puts foreign bytes before the byte at `offset`; `data` is asked when that byte comes (a Recorder may give them)."""
    return edit(direction, offset=offset, length=1, change=lambda here: data() + here, connection=connection)


def cut_after(direction: Direction, *, offset: int, connection: int | None = None, reset: bool = False) -> Tamper:
    """Breaks the connection when `offset` bytes have passed."""

    def tamper(index: int, way: Direction, start: int, data: bytes) -> bytes:
        if way == direction and connection in (None, index) and start + len(data) >= offset:
            raise CutConnection(data[: offset - start], reset=reset)
        return data

    return tamper


def stall_after(direction: Direction, *, offset: int, connection: int | None = None) -> Tamper:
    """Holds the direction when `offset` bytes have passed, until `Wiretap.release`."""

    def tamper(index: int, way: Direction, start: int, data: bytes) -> bytes:
        if way == direction and connection in (None, index) and start < offset <= start + len(data):
            raise StallConnection(data[: offset - start], data[offset - start :])
        return data

    return tamper


class Recorder:
    """A tamper that changes nothing and writes all it sees to files, one per connection and direction."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        """Appends to the connection's file."""
        with self.path(connection, direction).open("ab") as file:
            file.write(data)
        return data

    def path(self, connection: int, direction: Direction) -> Path:
        """The file of one connection and direction."""
        return self._directory / f"{connection}-{direction}.bin"

    def recorded(self, connection: int, direction: Direction) -> bytes:
        """What has passed there so far."""
        path = self.path(connection, direction)
        return path.read_bytes() if path.exists() else b""

    def contains(self, needle: bytes) -> bool:
        """Whether `needle` has passed on any connection, in either direction."""
        return any(needle in path.read_bytes() for path in self._directory.glob("*.bin"))


class Wiretap:
    """Listens on `address`, connects each connection on to `target`, and lets `tampers` at the bytes, in their order.

    A context manager; works in a thread of its own. With `host` it stands on that host's network: give it a third host
    of `make_hosts`, as an attacker would have one. `failures` collects what tampers raised by mistake; leaving the
    context raises the first.
    """

    def __init__(
        self,
        target: Address,
        *,
        tampers: Sequence[Tamper] = (),
        listen: Address = ("127.0.0.1", 0),
        host: SimulatedHost | None = None,
    ) -> None:
        self.target = target
        self.tampers: tuple[Tamper, ...] = tuple(tampers)
        self.failures: list[Exception] = []
        self.connections = 0
        self.stalled = threading.Event()
        self._listen = (host.address, 0) if host and listen == ("127.0.0.1", 0) else listen
        self._namespace = host.namespace if host else None
        self._address: Address | None = None
        self._started = threading.Event()
        self._start_error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="wiretap", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._released: asyncio.Event | None = None
        self._relays: dict[asyncio.Task[None], socket.socket] = {}
        self._is_cut = False

    @property
    def address(self) -> Address:
        """Where it listens."""
        if self._address is None:
            raise RigError("the wiretap was not started")
        return self._address

    def __enter__(self) -> "Wiretap":
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S) or self._address is None:
            raise RigError(f"the wiretap does not listen: {self._start_error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(self._stop)
        self._thread.join(_START_TIMEOUT_S)
        if kind is None and self.failures:
            raise self.failures[0]

    def release(self) -> None:
        """Lets every stalled direction go on, and later ones not stall."""
        self._signal(self._released)

    def cut(self) -> None:
        """Breaks every connection, and lets none through until `mend`; done on return."""
        done = threading.Event()

        def work() -> None:
            self._is_cut = True
            for task in self._relays:
                task.cancel()
            done.set()

        if self._loop:
            self._loop.call_soon_threadsafe(work)
            done.wait(_START_TIMEOUT_S)

    def go_down(self) -> None:
        """Lets no new connection through until `mend`; for tampers, which run in the relay's own thread."""
        self._is_cut = True

    def mend(self) -> None:
        """Lets new connections through again."""
        self._is_cut = False

    def _signal(self, event: asyncio.Event | None) -> None:
        if self._loop and event:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(event.set)

    def _work(self) -> None:
        try:
            if self._namespace is not None:
                enter_network(self._namespace)
            listener = socket.create_server(self._listen, backlog=64)
        except OSError as error:
            self._start_error = error
            self._started.set()
            return
        with listener:
            asyncio.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._released = asyncio.Event(), asyncio.Event()
        listener.setblocking(False)
        name = listener.getsockname()
        self._address = (name[0], name[1])
        self._started.set()
        relays = self._relays
        self._loop.add_reader(listener, self._accept, listener, relays)
        await self._stop.wait()
        self._loop.remove_reader(listener)
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
        # a relay that was cancelled before its first step has closed nothing
        for near in relays.values():
            near.close()

    def _accept(self, listener: socket.socket, relays: dict[asyncio.Task[None], socket.socket]) -> None:
        with suppress(BlockingIOError):
            near, _ = listener.accept()
            if self._is_cut:
                near.close()
                return
            for task in [task for task in relays if task.done()]:
                del relays[task]
            relays[asyncio.create_task(self._relay(self.connections, near))] = near
            self.connections += 1

    async def _relay(self, index: int, near: socket.socket) -> None:
        far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with near, far:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await asyncio.get_running_loop().sock_connect(far, self.target)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pump(index, "forward", near, far))
                    both.create_task(self._pump(index, "back", far, near))
            except* CutConnection as cuts:
                if any(isinstance(cut, CutConnection) and cut.reset for cut in cuts.exceptions):
                    for end in (near, far):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except* OSError:
                pass  # one end has broken the connection; closing breaks the other
            except* Exception as mistakes:
                self.failures.extend(error for error in mistakes.exceptions if isinstance(error, Exception))

    async def _pump(self, index: int, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        offsets = [0] * len(self.tampers)
        while data := await loop.sock_recv(source, _CHUNK):
            try:
                changed = self._tampered(index, direction, offsets, data)
            except CutConnection as cut:
                await loop.sock_sendall(sink, cut.before)
                raise
            except StallConnection as stall:
                await loop.sock_sendall(sink, stall.before)
                await self._stall()
                changed = stall.after
            await loop.sock_sendall(sink, changed)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _tampered(self, index: int, direction: Direction, offsets: list[int], data: bytes) -> bytes:
        for number, tamper in enumerate(self.tampers):
            offset = offsets[number]
            offsets[number] += len(data)
            data = tamper(index, direction, offset, data)
        return data

    async def _stall(self) -> None:
        self.stalled.set()
        if self._released:
            await self._released.wait()


_CLONE_NEWNET = 0x40000000  # <linux/sched.h>; os.setns came with Python 3.12


def enter_network(namespace: Path) -> None:
    """Moves the calling thread, and no other, into a network namespace: the sockets it makes then belong there."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(namespace))
    finally:
        os.close(descriptor)
