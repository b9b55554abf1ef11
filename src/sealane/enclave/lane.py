"""One lane: a TCP connection to the peer, a unix connection to QEMU, and a thread for each direction between them.

    outbound   QEMU --recv_into--> frame --seal in place--> TCP        what has come goes out at once
    inbound    TCP --recv_into--> frame --open in place--> QEMU        only authentic, in-order plaintext

A source that may reduce what it sends has `outbound.Outbound` for its first half, and one whose protection tells pages apart
`marked.MarkedOutbound`.

Bounded by one record a direction: a slow reader stops the sender, and so QEMU. Threads tell what happened by `post`;
nothing here decides what it means for the migration.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from sealane.enclave.compressing import threads_for
from sealane.enclave.marked import Guard, MarkedOutbound
from sealane.enclave.outbound import Outbound, Saved
from sealane.errors import InternalError, PeerError, SealaneError, make_error
from sealane.seal.codecs import PageCodec
from sealane.seal.effort import Effort
from sealane.seal.keys import Direction, LaneKeys, derive_digest_key
from sealane.seal.marks import PageMarker
from sealane.seal.protect import SEALED, is_weak
from sealane.seal.records import DataReceived, LaneClosed, LaneOpened, RecordReader, RecordSealer
from sealane.seal.reduce import LaneReducer
from sealane.seal.seen import PagesSeen


@dataclass(frozen=True)
class Opened:
    """The peer has proved that it holds this lane's keys."""

    lane: int


@dataclass(frozen=True)
class Wanted:
    """Bytes for QEMU are there and no connection to it yet."""

    lane: int


@dataclass(frozen=True)
class Closed:
    """Both directions ended with their authenticated close."""

    lane: int


@dataclass(frozen=True)
class Broken:
    """The lane is over."""

    lane: int
    error: SealaneError


Event: TypeAlias = Opened | Wanted | Closed | Broken


SEALED_GUARD: Final = Guard(SEALED)


class Reduction:
    """What the lanes of one source share to send less."""

    def __init__(self, lanes: int, migration_secret: bytes) -> None:
        self.lanes = lanes
        self._seen = PagesSeen(lanes)
        self._key = derive_digest_key(migration_secret)

    def of(self, lane: int) -> tuple[LaneReducer, Effort]:
        """One lane's part."""
        return LaneReducer(self._seen, lane, self._key), Effort(self.lanes)


class Lane:
    """One lane at one end; `start` it, `attach` QEMU to it, `abort` it at any time."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        index: int,
        is_source: bool,
        migration_secret: bytes,
        post: Callable[[Event], None],
        reduction: Reduction | None = None,
        guard: Guard = SEALED_GUARD,
    ) -> None:
        away, back = (
            (Direction.TO_DESTINATION, Direction.TO_SOURCE)
            if is_source
            else (Direction.TO_SOURCE, Direction.TO_DESTINATION)
        )
        self.index = index
        self._is_source = is_source
        self._connection = connection
        self._sealer = RecordSealer(LaneKeys(migration_secret, lane=index, direction=away))
        marks_allowed = None if is_source else guard.marks_allowed(migration_secret, index)
        self._reader = RecordReader(LaneKeys(migration_secret, lane=index, direction=back), marks_allowed)
        self._marker: PageMarker | None = None
        self._codec: PageCodec | None = None
        if is_source and is_weak(guard.protection):
            self._codec = guard.make_codec(migration_secret, index)
            self._marker = PageMarker(guard.is_user, has_codec=self._codec is not None)
        self._reduction = reduction
        self._outbound_pump: Outbound | None = None
        self._post = post
        self._vm: socket.socket | None = None
        self._attached = threading.Event()
        self._halves_open = 2
        self._lock = threading.Lock()
        self._aborted = False
        self._vm_closed = False
        self._threads: list[threading.Thread] = []
        self._wire_bytes = 0
        self._vm_bytes = 0

    def start(self, preface: bytes = b"") -> None:
        """Begin the opening handshake: a source speaks first (after its preface), a destination answers."""
        self._connection.settimeout(None)
        if self._is_source:
            self._connection.sendall(preface + bytes(self._sealer.open_lane()))
        self._run(self._inbound)

    def attach(self, vm: socket.socket) -> None:
        """Connect the lane to QEMU."""
        vm.settimeout(None)
        self._vm = vm
        self._attached.set()
        self._run(self._outbound)

    def abort(self) -> None:
        """Close everything and wake both threads; harmless when done before."""
        self._aborted = True
        self._attached.set()
        for end in (self._connection, self._vm):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads after `abort` or the close."""
        for thread in self._threads:
            thread.join(timeout_s)
        for end in (self._connection, self._vm):
            if end is not None:
                end.close()

    @property
    def wire_bytes(self) -> int:
        """Bytes of records, both directions."""
        return self._wire_bytes + (self._outbound_pump.wire_bytes if self._outbound_pump else 0)

    @property
    def plaintext_bytes(self) -> int:
        """Bytes of QEMU's at this end, both directions."""
        return self._vm_bytes + (self._outbound_pump.vm_bytes if self._outbound_pump else 0)

    @property
    def saved(self) -> Saved:
        """Bytes of QEMU's that were not sent."""
        return self._outbound_pump.saved if self._outbound_pump else Saved()

    @property
    def digests(self) -> bytes:
        """The digests of both directions, towards the destination first; the same at both ends once closed."""
        mine, other = self._sealer.digest, self._reader.digest
        return mine + other if self._is_source else other + mine

    def _run(self, half: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guard, args=(half,), name=f"{half.__name__}-{self.index}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guard(self, half: Callable[[], None]) -> None:
        try:
            half()
        except SealaneError as error:
            self._break(error)
        except OSError as error:
            self._break(PeerError("lane.cut", f"lane {self.index}: {error.strerror or error}"))
        except BaseException as error:  # a thread that ended without a word would be a lane that stands still
            self._break(InternalError("internal.error", f"lane {self.index}: {type(error).__name__}"))
            raise
        else:
            with self._lock:
                self._halves_open -= 1
                done = not self._halves_open
            if done and not self._aborted:
                self._post(Closed(self.index))

    def _break(self, error: SealaneError) -> None:
        if not self._aborted:
            self._post(Broken(self.index, error))

    def _outbound(self) -> None:
        assert self._vm is not None  # noqa: S101 - attach set it; for the type checker
        self._outbound_pump = self._make_pump(self._vm)
        if self._outbound_pump is None:
            self._pump_as_it_is(self._vm)
        else:
            self._outbound_pump.run()
        self._vm_closed = True
        if not self._aborted:
            self._connection.sendall(self._sealer.close_lane())
            self._connection.shutdown(socket.SHUT_WR)

    def _make_pump(self, vm: socket.socket) -> Outbound | None:
        """What pumps instead of `_pump_as_it_is`, where something is to be done to the stream."""
        reduction = None if self._reduction is None else self._reduction.of(self.index)
        if self._marker is not None:
            return MarkedOutbound(vm, self._connection, self._sealer, self._marker, self._codec, reduction)
        if self._reduction is None or reduction is None:
            return None
        return Outbound(vm, self._connection, self._sealer, *reduction, threads_for(self._reduction.lanes))

    def _pump_as_it_is(self, vm: socket.socket) -> None:
        payload, receive = self._sealer.payload, vm.recv_into
        seal, send = self._sealer.seal_data, self._connection.sendall
        while True:
            try:
                count = receive(payload)
            except ConnectionResetError:
                return
            if not count:
                return
            record = seal(count)
            send(record)
            self._wire_bytes += len(record)
            self._vm_bytes += count

    def _inbound(self) -> None:
        reader, receive = self._reader, self._connection.recv_into
        while True:
            count = receive(reader.space())
            if not count:
                reader.ended()
                return
            self._wire_bytes += count
            event = reader.filled(count)
            if isinstance(event, DataReceived):
                self._deliver(event.data)
            elif isinstance(event, LaneOpened):
                self._opened()
            elif isinstance(event, LaneClosed):
                self._close_vm()

    def _opened(self) -> None:
        if not self._is_source:
            self._connection.sendall(self._sealer.open_lane())
        self._post(Opened(self.index))

    def _deliver(self, data: memoryview) -> None:
        self._vm_bytes += len(data)
        if self._vm is None:
            self._post(Wanted(self.index))
            self._attached.wait()
        if self._vm is None or self._aborted:
            raise PeerError("lane.cut", f"lane {self.index} ended")
        try:
            self._vm.sendall(data)
        except OSError as error:
            # A source's QEMU closes its end once it has heard all that it waits for; what comes after is not for it.
            if not self._is_source:
                raise make_error("migration.destination-died", f"lane {self.index}: {error.strerror}") from error

    def _close_vm(self) -> None:
        if self._vm is not None:
            with contextlib.suppress(OSError):
                self._vm.shutdown(socket.SHUT_WR)
        elif not self._is_source:
            self._never_used()

    def _never_used(self) -> None:
        """The peer closed a lane that carried nothing: answer its close, as QEMU will never be attached."""
        with contextlib.suppress(OSError):
            self._connection.sendall(self._sealer.close_lane())
            self._connection.shutdown(socket.SHUT_WR)
        with self._lock:
            self._halves_open -= 1
