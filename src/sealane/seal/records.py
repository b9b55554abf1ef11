"""Sealed records, without I/O: what crosses a lane in one direction.

A record is a header, a ciphertext as long as its plaintext, and a tag. Integers are big-endian.

     0        1        2               4               8                       16                      24
    +--------+--------+---------------+---------------+-----------------------+-----------------------+----------+-------+
    |  kind  | coding |     marks     |    length     |       sequence        |      identifier       |ciphertext|  tag  |
    +--------+--------+---------------+---------------+-----------------------+-----------------------+----------+-------+
       u8       u8          u16          u32, bytes             u64              of lane and direction    length     16

The header is the associated data, and with it the open part of a marked record (`seal.marks`), which stands in front of the
ciphertext and counts in `length`. `coding` says what a DATA record's payload is; what is given out is QEMU's bytes. Only marked
ones have marks, and only a reader whose protection is not `sealed` takes them. Rules, each with its error:

 1. kind, coding, marks and length fit                                  else `lane.malformed`
 2. the identifier is this lane's and direction's                       else `lane.foreign`
 3. header and ciphertext are what was sealed                           else `lane.integrity`
 4. the sequence number is the next one                                 else `lane.replay` (lower) or `lane.reordered` (higher)
 5. the first record is OPEN, and no other one is                       else `lane.malformed`
 6. nothing follows CLOSE                                               else `lane.after-close`
 7. the connection does not end before CLOSE                            else `lane.truncated`
 8. the marks of a record that opened are those of its pages            else `lane.malformed`
 9. what was compressed opens to as much as it claims                   else `lane.malformed`

Nothing is decompressed or decoded before rule 4 holds, and nothing given out before 8 and 9 do. A record that breaks any rule
ends the lane: nothing is given out after it.
Both ends keep a running SHA-256 over header and tag of every record, which the hand-over compares.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from sealane.crypto.aead import TAG_BYTES, OpenFailed
from sealane.errors import InternalError, PeerError
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.codecs import PAGE_BYTES, PageCodec
from sealane.seal.compression import RecordDecompressor
from sealane.seal.keys import LaneKeys
from sealane.seal.marks import (
    MARK_BYTES,
    MARKS_MAX,
    OPEN_LENGTH_BYTES,
    PIECE_MAX,
    Marks,
    PartCompressors,
    parse_marks,
    put_back,
    take_out,
    why_not_marks,
)

_HEADER: Final = struct.Struct(">BBHIQ8s")
HEADER_BYTES: Final = _HEADER.size
OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES
RECORD_BYTES_MAX: Final = RECORD_PAYLOAD_MAX + OVERHEAD_BYTES


class Kind(IntEnum):
    """What a record carries; a CLOSE and an OPEN carry nothing."""

    OPEN = 1
    DATA = 2
    CLOSE = 3


class Coding(IntEnum):
    """What the plaintext of a DATA record is; OPEN and CLOSE have 0."""

    PLAIN = 0  # QEMU's bytes
    ZSTD = 1  # compressed (`seal.compression`)
    MARKED = 2  # some pages of them taken out (`seal.marks`)
    MARKED_ZSTD = 3  # both


_MARKED: Final = frozenset({Coding.MARKED, Coding.MARKED_ZSTD})


@dataclass(frozen=True)
class MarksAllowed:
    """What a reader needs for marked records; a reader without it refuses them. `codec` where the protection has one."""

    codec: PageCodec | None = None


@dataclass(frozen=True)
class LaneOpened:
    """The peer holds this lane's keys."""


@dataclass(frozen=True)
class DataReceived:
    """QEMU's bytes, authentic; the view is valid until the reader's next `space`."""

    data: memoryview

    def __repr__(self) -> str:
        return f"DataReceived({len(self.data)} bytes)"


@dataclass(frozen=True)
class LaneClosed:
    """The authenticated end: everything that was sent has come."""


Event: TypeAlias = LaneOpened | DataReceived | LaneClosed

_LENGTHS: Final = {
    Kind.OPEN: range(1),
    Kind.DATA: range(1, RECORD_PAYLOAD_MAX + 1),
    Kind.CLOSE: range(1),
}

_CODINGS: Final = {
    Kind.OPEN: frozenset({Coding.PLAIN}),
    Kind.DATA: frozenset(Coding),
    Kind.CLOSE: frozenset({Coding.PLAIN}),
}


class RecordSealer:
    """Seals the records of one lane and direction, in a frame that the caller fills.

    Fill `payload` from its start with up to RECORD_PAYLOAD_MAX bytes, then send what `seal_data(length)` returns before
    filling it again. The frame is sealed in place: nothing is copied.
    """

    def __init__(self, keys: LaneKeys) -> None:
        self._keys = keys
        self._frame = memoryview(bytearray(RECORD_BYTES_MAX))
        self.payload = self._frame[HEADER_BYTES : HEADER_BYTES + RECORD_PAYLOAD_MAX]
        self._sequence = 0
        self._closed = False
        self._digest = hashlib.sha256()

    def open_lane(self) -> memoryview:
        """The first record."""
        if self._sequence:
            raise InternalError("internal.error", "a lane is opened once, before anything else")
        return self._seal(Kind.OPEN, 0)

    def seal_data(self, length: int, coding: Coding = Coding.PLAIN) -> memoryview:
        """The record that carries the first `length` bytes of `payload`."""
        if not self._sequence or length not in _LENGTHS[Kind.DATA] or coding in _MARKED:
            raise InternalError("internal.error", f"{length} bytes cannot be sealed here")
        return self._seal(Kind.DATA, length, coding)

    def seal_marked(
        self, piece: memoryview, marks: Marks, codec: PageCodec | None, compressors: PartCompressors | None = None
    ) -> memoryview:
        """The record that carries `piece` (at most PIECE_MAX bytes, not in `payload`) by its marks, one or more."""
        if not self._sequence or not PAGE_BYTES <= len(piece) <= PIECE_MAX:
            raise InternalError("internal.error", f"{len(piece)} bytes cannot be marked here")
        if compressors is None:
            length = take_out(piece, marks, self.payload, codec)
            return self._seal(Kind.DATA, length, Coding.MARKED, len(marks.positions), marks.open_bytes)
        length, open_bytes = compressors.take_out(piece, marks, self.payload, codec)
        return self._seal(Kind.DATA, length, Coding.MARKED_ZSTD, len(marks.positions), open_bytes)

    def close_lane(self) -> memoryview:
        """The last record."""
        record = self._seal(Kind.CLOSE, 0)
        self._closed = True
        return record

    def _seal(
        self, kind: Kind, length: int, coding: Coding = Coding.PLAIN, marks: int = 0, open_bytes: int = 0
    ) -> memoryview:
        if self._closed:
            raise InternalError("internal.error", "the lane is closed")
        sequence = self._sequence
        self._sequence += 1
        end = OVERHEAD_BYTES + length
        header = _HEADER.pack(kind, coding, marks, length, sequence, self._keys.identifier)
        self._frame[:HEADER_BYTES] = header
        sealed_from = HEADER_BYTES + open_bytes
        sealed = self._frame[sealed_from:end]
        associated = header if not marks else self._frame[:sealed_from]
        self._keys.at(sequence).seal_into(self._keys.nonce(sequence), sealed[:-TAG_BYTES], associated, sealed)
        self._digest.update(header)
        self._digest.update(sealed[-TAG_BYTES:])
        return self._frame[:end]

    @property
    def digest(self) -> bytes:
        """SHA-256 over header and tag of every record so far."""
        return self._digest.digest()


class RecordReader:
    """Opens the records of one lane and direction, from bytes that arrive in any pieces.

    Receive into `space()`, then tell how many bytes came with `filled(count)`: at most one event follows, as the space
    never reaches beyond the present record and the next header. Memory is bounded by one record. After an error the
    reader stays in it.
    """

    def __init__(self, keys: LaneKeys, marks_allowed: MarksAllowed | None = None) -> None:
        self._keys, self._marks_allowed = keys, marks_allowed
        self._marks = 0  # of the present record
        self._piece = self._parts = memoryview(b"")  # where marked records are put together; made for the first one
        self._decompressor: RecordDecompressor | None = None
        self._buffer = memoryview(bytearray(RECORD_BYTES_MAX + HEADER_BYTES))
        self._have = 0
        self._done = 0  # bytes of a finished record that still stand in front
        self._length: int | None = None  # of the present record, once its header is checked
        self._kind, self._coding = Kind.OPEN, Coding.PLAIN
        self._claimed = 0
        self._sequence = 0
        self._closed = False
        self._error: PeerError | None = None
        self._digest = hashlib.sha256()

    def space(self) -> memoryview:
        """Where the next bytes of the wire belong; never empty. Ends the life of the last event's view.

        Raises as `filled` does: the next header may have come along with the last record.
        """
        if self._error is not None:
            raise self._error
        if self._done:
            rest = self._have - self._done
            self._buffer[:rest] = self._buffer[self._done : self._have]
            self._have, self._done = rest, 0
            if rest == HEADER_BYTES:
                self._length = self._check_header()
        wanted = HEADER_BYTES if self._length is None else OVERHEAD_BYTES + self._length + HEADER_BYTES
        return self._buffer[self._have : wanted]

    def filled(self, count: int) -> Event | None:
        """Take note of `count` bytes in `space()`; raises PeerError by the rules of this module."""
        if self._error is not None:
            raise self._error
        if self._closed and count:
            raise self._fail("lane.after-close")
        self._have += count
        return self._advance()

    def ended(self) -> None:
        """The connection ended: raises `lane.truncated` unless the lane was closed before."""
        if self._error is not None:
            raise self._error
        if not self._closed:
            raise self._fail("lane.truncated")

    def _advance(self) -> Event | None:
        if self._length is None:
            if self._have < HEADER_BYTES:
                return None
            self._length = self._check_header()
        if self._have < OVERHEAD_BYTES + self._length:
            return None
        return self._open(self._length)

    def _check_header(self) -> int:
        kind, coding, marks, length, sequence, identifier = _HEADER.unpack(self._buffer[:HEADER_BYTES])
        if kind not in iter(Kind) or length not in _LENGTHS[Kind(kind)]:  # rule 1
            raise self._fail("lane.malformed")
        if coding not in _CODINGS[Kind(kind)] or not self._marks_fit(coding, marks, length):  # rule 1
            raise self._fail("lane.malformed")
        if identifier != self._keys.identifier:  # rule 2
            raise self._fail("lane.foreign")
        self._kind, self._coding, self._claimed, self._marks = Kind(kind), Coding(coding), sequence, marks
        return int(length)

    def _marks_fit(self, coding: int, marks: int, length: int) -> bool:
        if coding not in _MARKED:
            return marks == 0
        if self._marks_allowed is None:
            return False
        if coding == Coding.MARKED_ZSTD:
            return 0 < marks <= MARKS_MAX and length > MARK_BYTES * marks + OPEN_LENGTH_BYTES
        return marks > 0 and (MARK_BYTES + PAGE_BYTES) * marks <= length <= PIECE_MAX + MARK_BYTES * marks

    def _open(self, length: int) -> Event:
        header = bytes(self._buffer[:HEADER_BYTES])
        end = OVERHEAD_BYTES + length
        marks = self._read_marks()
        open_bytes = 0 if marks is None else self._open_bytes(marks, length)
        sealed = self._buffer[HEADER_BYTES + open_bytes : end]
        associated = header if marks is None else self._buffer[: HEADER_BYTES + open_bytes]
        cipher = self._keys.at(self._sequence)
        if not self._keys.covers(self._claimed):
            raise self._fail("lane.integrity")  # another generation's record cannot be told from a changed one
        tag = bytes(sealed[-TAG_BYTES:])
        try:  # rule 3
            cipher.open_into(self._keys.nonce(self._claimed), sealed, associated, sealed[:-TAG_BYTES])
        except OpenFailed:
            raise self._fail("lane.integrity") from None
        if self._claimed != self._sequence:  # rule 4
            raise self._fail("lane.replay" if self._claimed < self._sequence else "lane.reordered")
        if (self._kind is Kind.OPEN) != (self._sequence == 0):  # rule 5
            raise self._fail("lane.malformed")
        plaintext = self._plaintext(self._buffer[HEADER_BYTES : HEADER_BYTES + length], marks, open_bytes)
        self._digest.update(header)
        self._digest.update(tag)
        self._sequence += 1
        self._length, self._done = None, end
        if self._kind is Kind.DATA:
            return DataReceived(plaintext)
        if self._kind is Kind.OPEN:
            return LaneOpened()
        self._closed = True
        if self._have > end:
            raise self._fail("lane.after-close")
        return LaneClosed()

    def _read_marks(self) -> Marks | None:
        """The present record's marks: they say what is open, and count for nothing else before it has opened."""
        if not self._marks:
            return None
        return parse_marks(self._buffer[HEADER_BYTES : HEADER_BYTES + MARK_BYTES * self._marks])

    def _open_bytes(self, marks: Marks, length: int) -> int:
        """How much of the payload stands in front of its ciphertext."""
        if self._coding is not Coding.MARKED_ZSTD:
            return marks.open_bytes
        at = HEADER_BYTES + marks.vector_bytes
        opened = int.from_bytes(self._buffer[at : at + OPEN_LENGTH_BYTES], "big")
        open_bytes = marks.vector_bytes + OPEN_LENGTH_BYTES + opened
        if open_bytes > length:
            raise self._fail("lane.malformed")
        return open_bytes

    def _plaintext(self, payload: memoryview, marks: Marks | None, open_bytes: int) -> memoryview:
        """QEMU's bytes of a record that has opened."""
        if self._coding is Coding.ZSTD:
            return self._decompress(payload)
        if marks is None:
            return payload
        if self._coding is Coding.MARKED_ZSTD:
            payload = self._decompress_parts(payload, marks, open_bytes)
        return self._put_together(payload, marks)

    def _decompress(self, data: memoryview) -> memoryview:
        if self._decompressor is None:
            self._decompressor = RecordDecompressor()
        try:  # rule 9
            return self._decompressor.decompress(data)
        except PeerError as error:
            self._error = PeerError(error.code, f"record {self._sequence}: {error.detail}")
            raise self._error from None

    def _decompress_parts(self, payload: memoryview, marks: Marks, open_bytes: int) -> memoryview:
        """The payload as it would stand in a record that was not compressed, but for the marks themselves."""
        if not self._parts:
            self._parts = memoryview(bytearray(RECORD_PAYLOAD_MAX))
        opened, hidden = payload[marks.vector_bytes + OPEN_LENGTH_BYTES : open_bytes], payload[open_bytes:]
        at = marks.vector_bytes
        for part, most in ((opened, marks.open_bytes), (hidden, marks.vector_bytes + PIECE_MAX)):
            plain = self._decompress(part) if part else part
            if at + len(plain) > most:
                raise self._fail("lane.malformed")
            self._parts[at : at + len(plain)] = plain
            at += len(plain)
            if part is opened and at != marks.open_bytes:
                raise self._fail("lane.malformed")
        return self._parts[:at]

    def _put_together(self, payload: memoryview, marks: Marks) -> memoryview:
        codec = None if self._marks_allowed is None else self._marks_allowed.codec
        piece_bytes = len(payload) - marks.vector_bytes
        if why_not_marks(marks, piece_bytes, has_codec=codec is not None):  # rule 8
            raise self._fail("lane.malformed")
        if not self._piece:
            self._piece = memoryview(bytearray(PIECE_MAX))
        piece = self._piece[:piece_bytes]
        put_back(payload, marks, piece, codec)
        return piece

    def _fail(self, code: str) -> PeerError:
        self._error = PeerError(code, f"record {self._sequence}: {PeerError(code).detail}")
        return self._error

    @property
    def closed(self) -> bool:
        """Whether the authenticated end has come."""
        return self._closed

    @property
    def digest(self) -> bytes:
        """SHA-256 over header and tag of every record so far."""
        return self._digest.digest()
