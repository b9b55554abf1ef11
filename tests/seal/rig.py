"""Records for tests: sealed, forged, fed to a reader in any pieces."""

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from hypothesis import settings

from sealane.crypto.aead import TAG_BYTES
from sealane.errors import PeerError
from sealane.seal.keys import Direction, LaneKeys
from sealane.seal.records import DataReceived, Kind, LaneClosed, LaneOpened, RecordReader, RecordSealer

# Every property test of these rooms: the same examples on every run, no clock, no files.
PROPERTY: Final = settings(derandomize=True, deadline=None, database=None, max_examples=120)

SECRET: Final = bytes(range(32))
HEADER: Final = struct.Struct(">BBHIQ8s")


def keys(secret: bytes = SECRET, lane: int = 0, direction: Direction = Direction.TO_DESTINATION) -> LaneKeys:
    """Fresh keys of one lane and direction."""
    return LaneKeys(secret, lane=lane, direction=direction)


def seal_all(sealer: RecordSealer, payloads: Iterable[bytes]) -> list[bytes]:
    """OPEN, one DATA a payload, CLOSE; each record as it crosses the wire."""
    records = [bytes(sealer.open_lane())]
    for payload in payloads:
        sealer.payload[: len(payload)] = payload
        records.append(bytes(sealer.seal_data(len(payload))))
    return [*records, bytes(sealer.close_lane())]


def records(*payloads: bytes, of: LaneKeys | None = None) -> list[bytes]:
    """The records of a whole lane."""
    return seal_all(RecordSealer(of or keys()), payloads)


def forge(kind: int, sequence: int, payload: bytes = b"", **changes: int | bytes) -> bytes:
    """A record whose tag is right and whose header says what it likes: what only a holder of the keys can make."""
    own = keys()
    fields = {"coding": 0, "marks": 0, "length": len(payload), "identifier": own.identifier, **changes}
    header = HEADER.pack(kind, fields["coding"], fields["marks"], fields["length"], sequence, fields["identifier"])
    sealed = bytearray(len(payload) + TAG_BYTES)
    own.at(sequence).seal_into(own.nonce(sequence), payload, header, sealed)
    return header + bytes(sealed)


@dataclass
class Told:
    """What a reader said: events as plain values, and the error that ended it."""

    events: list[str | bytes] = field(default_factory=list)
    error: PeerError | None = None

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None

    @property
    def plaintext(self) -> bytes:
        return b"".join(event for event in self.events if isinstance(event, bytes))


def feed(reader: RecordReader, data: bytes, sizes: Sequence[int] = (), *, end: bool = True) -> Told:
    """Give `data` in pieces of `sizes`, over and over (whole where there are none), then the connection's end."""
    told = Told()
    memory = reader.space().obj
    assert isinstance(memory, bytearray)
    size_bytes = len(memory)
    cuts = itertools.cycle(sizes or [len(data) or 1])
    position, piece = 0, next(cuts)
    try:
        while position < len(data):
            space = reader.space()
            assert len(space) > 0
            assert space.obj is memory
            assert len(memory) == size_bytes
            count = min(len(space), piece, len(data) - position)
            space[:count] = data[position : position + count]
            position += count
            piece = piece - count or next(cuts)
            event = reader.filled(count)
            if isinstance(event, DataReceived):
                told.events.append(bytes(event.data))
            elif event is not None:
                told.events.append({LaneOpened: "opened", LaneClosed: "closed"}[type(event)])
        if end:
            reader.ended()
    except PeerError as error:
        told.error = error
    return told


def read(data: bytes, sizes: Sequence[int] = (), *, of: LaneKeys | None = None, end: bool = True) -> Told:
    """What a fresh reader says of these bytes."""
    return feed(RecordReader(of or keys()), data, sizes, end=end)


OPEN_RECORD: Final = forge(Kind.OPEN, 0)
