"""What an attacker on the wire can do to Sealane: tampers for the Wiretap that know prefaces, records and TLS records.

A lane's connection is a preface (towards the destination) and then records; a channel's is a preface and then TLS. Each
tamper here holds bytes back until a record is whole and decides what goes on in its place:

    Wiretap(target, tampers=[on_record(lane=1, which=20, change=flip("tag"))])

`which` is a record's number in its lane and direction, or the kind of the one that is meant (the first of that kind).
"""

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from sealane.seal.records import HEADER_BYTES, OVERHEAD_BYTES, Kind
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, parse_preface
from sealane.testing.hosts import SimulatedHost
from sealane.testing.wiretap import CutConnection, Direction, StallConnection, Tamper

T = TypeVar("T")
Part: TypeAlias = Literal["kind", "length", "sequence", "identifier", "body", "tag"]
Change: TypeAlias = Callable[[bytes], bytes]

_TLS_HEADER_BYTES: Final = 5
# Where a bit is flipped, from the record's start or, for the tag, from its end.
_PLACES: Final[dict[Part, int]] = {"kind": 0, "length": 5, "sequence": 15, "identifier": 16, "body": 24, "tag": -1}


@dataclass(frozen=True)
class SeenRecord:
    """One record of a lane, or one TLS record of the channel (lane None, kind None), as it passed."""

    lane: int | None
    direction: Direction
    number: int
    kind: Kind | None
    data: bytes

    def __repr__(self) -> str:
        return f"SeenRecord(lane {self.lane}, {self.direction}, {self.number}, {len(self.data)} bytes)"


class _Stream:
    """One direction of one connection, cut into records."""

    def __init__(self, lane: int | None, direction: Direction) -> None:
        self._lane, self._direction = lane, direction
        self._buffer = bytearray()
        self._number = 0

    def take(self, data: bytes) -> list[SeenRecord]:
        self._buffer += data
        records = []
        while (end := self._end()) is not None and len(self._buffer) >= end:
            whole = bytes(self._buffer[:end])
            del self._buffer[:end]
            kind = None if self._lane is None else Kind(whole[0])
            records.append(SeenRecord(self._lane, self._direction, self._number, kind, whole))
            self._number += 1
        return records

    def _end(self) -> int | None:
        if self._lane is None:
            if len(self._buffer) < _TLS_HEADER_BYTES:
                return None
            return _TLS_HEADER_BYTES + int(struct.unpack_from(">H", self._buffer, 3)[0])
        if len(self._buffer) < HEADER_BYTES:
            return None
        return OVERHEAD_BYTES + int(struct.unpack_from(">I", self._buffer, 4)[0])


class RecordTamper:
    """Shows every record of every connection to `act`, which gives the bytes that go on in its place.

    `act` may raise CutConnection and StallConnection, as any tamper.
    """

    def __init__(self, act: Callable[[SeenRecord], bytes]) -> None:
        self._act = act
        self._lanes: dict[int, int | None] = {}
        self._streams: dict[tuple[int, Direction], _Stream] = {}
        self._prefaces: dict[int, bytes] = {}

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        """A `Tamper`."""
        before = b""
        if direction == "forward" and connection not in self._lanes:
            before, data = self._take_preface(connection, data)
            if connection not in self._lanes:
                return b""
        key = (connection, direction)
        stream = self._streams.setdefault(key, _Stream(self._lanes.get(connection), direction))
        return self._pass(before, stream.take(data))

    def _take_preface(self, connection: int, data: bytes) -> tuple[bytes, bytes]:
        have = self._prefaces.get(connection, b"") + data
        self._prefaces[connection] = have
        if len(have) < PREFACE_BYTES:
            return b"", b""
        preface = parse_preface(have[:PREFACE_BYTES])
        self._lanes[connection] = preface.lane if preface.kind is ConnectionKind.LANE else None
        return have[:PREFACE_BYTES], have[PREFACE_BYTES:]

    def _pass(self, out: bytes, records: list[SeenRecord]) -> bytes:
        for at, record in enumerate(records):
            try:
                out += self._act(record)
            except CutConnection as cut:
                raise CutConnection(out + cut.before, reset=cut.reset) from None
            except StallConnection as stall:
                after = self._pass(stall.after, records[at + 1 :])
                raise StallConnection(out + stall.before, after) from None
        return out


def on_record(*, lane: int, which: int | Kind, change: Change, direction: Direction = "forward") -> RecordTamper:
    """Replace one record of a lane by what `change` makes of it."""
    done = False

    def act(record: SeenRecord) -> bytes:
        nonlocal done
        wanted = record.kind is which if isinstance(which, Kind) else record.number == which
        if done or record.lane != lane or record.direction != direction or not wanted:
            return record.data
        done = True
        return change(record.data)

    return RecordTamper(act)


def on_channel(*, armed: threading.Event, change: Change, direction: Direction, number: int = 0) -> RecordTamper:
    """Replace one TLS record of the channel: the first, or a later one, of those that pass once `armed` is set."""
    passed = 0

    def act(record: SeenRecord) -> bytes:
        nonlocal passed
        if record.lane is not None or record.direction != direction or not armed.is_set():
            return record.data
        passed += 1
        return change(record.data) if passed == number + 1 else record.data

    return RecordTamper(act)


# What to do to a record


def flip(part: Part, *, bit: int = 0) -> Change:
    """Invert a bit of that part of the record."""

    def change(data: bytes) -> bytes:
        at = _PLACES[part] % len(data)
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return change


def replay(data: bytes) -> bytes:
    """Send it twice."""
    return data * 2


def drop(data: bytes) -> bytes:
    """Leave it out."""
    return b""


def append(more: bytes) -> Change:
    """Send something after it."""
    return lambda data: data + more


def cut(*, reset: bool = False) -> Change:
    """Break the connection in its middle."""

    def change(data: bytes) -> bytes:
        raise CutConnection(data[: len(data) // 2], reset=reset)

    return change


def cut_before(data: bytes) -> bytes:
    """Break the connection in its stead, without a half record."""
    raise CutConnection


def stall(data: bytes) -> bytes:
    """Hold the direction in its middle until the wiretap releases it."""
    middle = len(data) // 2
    raise StallConnection(data[:middle], data[middle:])


def swap_with_next(*, lane: int, which: int, direction: Direction = "forward") -> RecordTamper:
    """Exchange a record and the one after it."""
    held = b""

    def act(record: SeenRecord) -> bytes:
        nonlocal held
        if record.lane != lane or record.direction != direction:
            return record.data
        if record.number == which:
            held = record.data
            return b""
        if record.number == which + 1:
            return record.data + held
        return record.data

    return RecordTamper(act)


def take_from_lane(other: int, *, into: int) -> RecordTamper:
    """Send a record of lane `other` in the place of one of lane `into`."""
    stolen = b""
    done = False

    def act(record: SeenRecord) -> bytes:
        nonlocal stolen, done
        if record.direction != "forward" or record.kind is not Kind.DATA:
            return record.data
        if record.lane == other:
            stolen = record.data
        elif record.lane == into and stolen and not done:
            done = True
            return stolen
        return record.data

    return RecordTamper(act)


class LaneRecorder(RecordTamper):
    """Changes nothing and keeps the first records of each lane, so that a later migration can be given them."""

    def __init__(self, keep: int = 40) -> None:
        super().__init__(self._record)
        self._keep = keep
        self.records: dict[int, list[bytes]] = {}

    def _record(self, record: SeenRecord) -> bytes:
        if record.lane is not None and record.direction == "forward" and record.number < self._keep:
            self.records.setdefault(record.lane, []).append(record.data)
        return record.data

    def splice(self, lane: int) -> RecordTamper:
        """Send the recorded lane, from its first record on, in the place of the present one."""
        return RecordTamper(lambda record: self._instead(record, lane))

    def _instead(self, record: SeenRecord, lane: int) -> bytes:
        if record.lane != lane or record.direction != "forward":
            return record.data
        recorded = self.records[lane]
        return recorded[record.number] if record.number < len(recorded) else b""


def on_preface(*, lane: int | None, change: Change) -> Tamper:
    """Change the preface of a lane's connection, or of the channel's (None)."""
    held: dict[int, bytes] = {}

    def tamper(connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        if direction != "forward" or offset >= PREFACE_BYTES:
            return data
        have = held.get(connection, b"") + data
        held[connection] = have
        if len(have) < PREFACE_BYTES:
            return b""
        preface = parse_preface(have[:PREFACE_BYTES])
        is_meant = (preface.lane if preface.kind is ConnectionKind.LANE else None) == lane
        return (change(have[:PREFACE_BYTES]) if is_meant else have[:PREFACE_BYTES]) + have[PREFACE_BYTES:]

    return tamper


# Peers that are none


def on_network_of(host: SimulatedHost, do: Callable[[], T]) -> T:
    """The result of `do` on the host's network: what sockets it makes belong there."""
    if host.namespace is None:
        return do()
    namespace = host.namespace
    results: list[Any] = []

    def work() -> None:
        with open(namespace, "rb") as there:
            _enter(there.fileno())
        results.append(do())

    thread = threading.Thread(target=work, name=f"on {host.name}")
    thread.start()
    thread.join()
    result: T = results[0]
    return result


def dial(host: SimulatedHost, target: SimulatedHost) -> socket.socket:
    """A connection from one host to the other's agent."""
    return on_network_of(host, lambda: socket.create_connection((target.address, target.port), timeout=10.0))


def serve(host: SimulatedHost) -> socket.socket:
    """A listening socket on the host."""
    return on_network_of(host, lambda: socket.create_server((host.address, 0)))


_CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>; os.setns came with Python 3.12


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
