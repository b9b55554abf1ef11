"""The agent's side of one enclave: it hands it descriptors, hears what it says, and sees to its end.

The agent sees counters and the agents' messages, never a key of a lane nor a byte of the VM.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Protocol, TypeVar

from sealane.enclave.interface import (
    Abort,
    CallSocket,
    ClassesTold,
    Counters,
    Ecall,
    Failed,
    Finish,
    GuestUnknown,
    LanesClosed,
    LanesOpen,
    LaneTokens,
    Message,
    Ocall,
    PagesClassified,
    PeerEstablished,
    PeerFinished,
    PeerSeen,
    Sandboxed,
    Trust,
    VmWanted,
)
from sealane.errors import HostError, InternalError, PeerError, SealaneError, make_error
from sealane.host.migration import messages
from sealane.host.models import NotSent
from sealane.limits import ENCLAVE_START_TIMEOUT_S, LANES_MAX, TRUSTED_PER_CALL

T = TypeVar("T")
_EXIT_WAIT_S: Final = 8.0
_MESSAGES_WAITING_MAX: Final = 16
# More than a socket's buffer holds of them.
_OCALLS_WAITING_MAX: Final = 1000


class Closeable(Protocol):
    """A socket or a file."""

    def fileno(self) -> int:
        """Its descriptor."""

    def close(self) -> None:
        """Close it."""


class Child(Protocol):
    """A process to hold; `enclave_launcher.ChildProcess` in earnest."""

    pid: int
    exited: "asyncio.Future[int]"

    def kill(self) -> None:
        """End it at once; harmless when it has ended."""


class EnclaveProcess:
    """One enclave; `wait` for what it must say, `abort` or `finish` it, and always `reap` it."""

    def __init__(self, process: "Child", calls: CallSocket) -> None:
        loop = asyncio.get_running_loop()
        self._process, self._calls = process, calls
        self._left = False
        self.sandboxed: asyncio.Future[Sandboxed] = loop.create_future()
        self.established: asyncio.Future[PeerEstablished] = loop.create_future()
        self.lane_tokens: asyncio.Future[LaneTokens] = loop.create_future()
        self.lanes_open: asyncio.Future[LanesOpen] = loop.create_future()
        self.lanes_closed: asyncio.Future[LanesClosed] = loop.create_future()
        self.finished: asyncio.Future[None] = loop.create_future()
        self.failed: asyncio.Future[SealaneError] = loop.create_future()
        self.counters = Counters(0, 0)
        self.classes_told: asyncio.Future[None] = loop.create_future()
        self.on_pages_classified: Callable[[PagesClassified | GuestUnknown], None] = lambda what: None
        self.seen: PeerSeen | None = None  # of a peer that was refused, or was attested again
        self.on_peer_seen: Callable[[PeerSeen], None] = lambda seen: None
        self.on_vm_wanted: Callable[[int], None] = lambda lane: None
        self._lanes_wanting: set[int] = set()
        self._messages: asyncio.Queue[str] = asyncio.Queue(_MESSAGES_WAITING_MAX)
        loop.add_reader(calls.fileno(), self._on_readable)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def call(self, call: Ecall, *sockets: Closeable) -> None:
        """Send an ecall; the sockets, or files, are the enclave's afterwards and closed here."""
        try:
            self._calls.send(call, [each.fileno() for each in sockets])
        except BlockingIOError:
            raise HostError("enclave.slow", "the enclave does not take calls") from None
        except OSError as error:
            raise self._last_word() or HostError("enclave.died", f"the enclave is gone: {error.strerror}") from error
        finally:
            for each in sockets:
                each.close()

    async def tell_trusted(self, peers: Mapping[str, str]) -> dict[str, str]:
        """Tell the enclave whom to trust, in calls that fit; returns the rest, which Begin carries."""
        items = list(peers.items())
        while len(items) > TRUSTED_PER_CALL:
            await self._call_patiently(Trust(dict(items[:TRUSTED_PER_CALL])))
            del items[:TRUSTED_PER_CALL]
        return dict(items)

    async def _call_patiently(self, call: Ecall) -> None:
        """As `call`, but waits while the enclave has not taken the earlier ones; raises `enclave.slow` in the end."""
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        deadline = loop.time() + ENCLAVE_START_TIMEOUT_S
        while True:
            try:
                return self.call(call)
            except HostError as error:
                if error.code != "enclave.slow" or loop.time() > deadline:
                    raise
            loop.add_writer(self._calls.fileno(), writable.set)
            try:
                await self.wait(writable.wait(), ENCLAVE_START_TIMEOUT_S, "enclave.slow", "room for a call")
            finally:
                if self._calls.fileno() >= 0:
                    loop.remove_writer(self._calls.fileno())
            writable.clear()

    def _last_word(self) -> SealaneError | None:
        """Why the enclave is gone: what it said at its end may still wait to be read."""
        for _ in range(_OCALLS_WAITING_MAX):
            if self.failed.done() or self._calls.fileno() < 0:
                break
            self._on_readable()
        return self.failed.result() if self.failed.done() else None

    async def wait(self, awaitable: Awaitable[T], timeout_s: float | None, code: str, what: str) -> T:
        """The awaitable's result, unless the enclave fails first (its error) or the time passes (`code`)."""
        task = asyncio.ensure_future(awaitable)
        shared = isinstance(awaitable, asyncio.Future) and not isinstance(awaitable, asyncio.Task)
        try:
            both: set[asyncio.Future[Any]] = {task, self.failed}
            done, _ = await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done() and not shared:
                task.cancel()
                await asyncio.wait({task})  # what it has begun (a QEMU) is undone before anybody goes on
        if task in done:
            return task.result()
        if self.failed in done:
            raise self.failed.result()
        raise make_error(code, f"no {what} within {timeout_s:.0f} s")

    async def next_message(self, timeout_s: float | None, what: str) -> messages.Message:
        """The peer's next message; raises `peer.slow`, `peer.message`, or the enclave's failure."""
        return messages.parse_message(await self.wait(self._messages.get(), timeout_s, "peer.slow", what))

    async def expect(self, kind: type[T], timeout_s: float | None) -> T:
        """The peer's next message, which must be of this kind."""
        message = await self.next_message(timeout_s, f"`{kind.__name__.lower()}` from the peer")
        if not isinstance(message, kind):
            raise PeerError("peer.message", f"`{message.kind}` came out of turn")
        return message

    @property
    def not_sent(self) -> NotSent:
        """What the source did not send so far."""
        counted = self.counters
        return NotSent(
            zero_bytes=counted.zero_bytes, same_bytes=counted.same_bytes, zstd_bytes=counted.compressed_bytes
        )

    def costs(self) -> dict[str, Any]:
        """The enclave's CPU time and peak memory, once its lanes are closed; the names are `Result`'s."""
        if not self.lanes_closed.done():
            return {}
        closed = self.lanes_closed.result()
        return {"enclave_cpu_s": closed.cpu_s, "enclave_peak_rss_bytes": closed.peak_rss_bytes}

    def abort(self, error: SealaneError) -> None:
        """End the lanes and the channel now, and tell the peer why; harmless when the enclave is gone."""
        with contextlib.suppress(SealaneError):
            self.call(Abort(error.code, error.detail))

    def finish(self) -> None:
        """Say goodbye in order; harmless when the enclave is gone."""
        with contextlib.suppress(SealaneError):
            self.call(Finish())

    async def reap(self) -> None:
        """Wait for the process's end, which `abort`, `finish` or a failure has begun; kill it if it does not come."""
        if self._left:
            return
        try:
            async with asyncio.timeout(_EXIT_WAIT_S):
                await asyncio.shield(self._process.exited)
        except TimeoutError:
            self._process.kill()
            await asyncio.shield(self._process.exited)
        finally:
            self._stop_listening()

    def leave(self) -> None:
        """Speak with it no more: one that was told to outlive this agent goes on, any other ends. `reap` waits for neither."""
        self._left = True
        self._stop_listening()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def _stop_listening(self) -> None:
        if self._calls.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._calls.fileno())
            self._calls.close()

    def _on_readable(self) -> None:
        try:
            received = self._calls.receive()
        except (BlockingIOError, ConnectionResetError):
            return  # a reset comes before what the enclave said at its end, and once only: that is still to be read
        except (OSError, InternalError) as error:
            received = None
            self.fail(HostError("enclave.died", f"the enclave spoke nonsense: {error}"))
        if received is None:
            self._stop_listening()
            self.fail(HostError("enclave.died"))
            return
        call, sockets = received
        for each in sockets:  # an enclave has none to give
            each.close()
        self._heard(call)  # type: ignore[arg-type]

    def _heard(self, call: Ocall) -> None:
        match call:
            case Sandboxed():
                _resolve(self.sandboxed, call)
            case PeerEstablished():
                _resolve(self.established, call)
            case PeerSeen():
                self.seen = call
                self.on_peer_seen(call)
            case Message():
                self._heard_message(call.payload)
            case LaneTokens():
                _resolve(self.lane_tokens, call)
            case LanesOpen():
                _resolve(self.lanes_open, call)
            case VmWanted():
                self._heard_wanted(call.lane)
            case Counters():
                self.counters = call
            case LanesClosed():
                self.counters = Counters(
                    call.wire_bytes, call.plaintext_bytes, call.zero_bytes, call.same_bytes, call.compressed_bytes
                )
                _resolve(self.lanes_closed, call)
            case PeerFinished() | ClassesTold():
                _resolve(self.finished if isinstance(call, PeerFinished) else self.classes_told, None)
            case PagesClassified() | GuestUnknown():
                self.on_pages_classified(call)
            case Failed():
                self.fail(make_error(call.code, call.detail))

    def _heard_wanted(self, lane: int) -> None:
        """Each lane wants QEMU once: what more an enclave says is no reason to dial."""
        if 0 <= lane < LANES_MAX and lane not in self._lanes_wanting:
            self._lanes_wanting.add(lane)
            self.on_vm_wanted(lane)

    def _heard_message(self, payload: str) -> None:
        try:
            self._messages.put_nowait(payload)
        except asyncio.QueueFull:
            self.fail(PeerError("peer.message", "too many messages at once"))

    def fail(self, error: SealaneError) -> None:
        """Let everybody who waits for the enclave hear this error; the first one counts."""
        _resolve(self.failed, error)


def _resolve(future: "asyncio.Future[T]", value: T) -> None:
    if not future.done():
        future.set_result(value)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, however often the calling task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()
