"""Marked records: pages taken out of a piece of stream, each treated as its mark says, and put back by it.

A marked record's payload, N marks of u32, big-endian; `N` and the lengths are in the record's header:

    +-----------+---------------+-----------------------+-----------------+------------------------+
    |  N marks  |  CLEAR pages  |     CODED pages       | ENCRYPTED pages | what is left of the    |
    |           |               | as the codec made them|                 | stream, in its order   |
    +-----------+---------------+-----------------------+-----------------+------------------------+
     \\__________ associated data, after the header _____/ \\____________ ciphertext _______________/

Where the line is slow, the open pages and the encrypted bytes are compressed (`seal.compression`), each part in a frame of its own:

    +-----------+------------+------------------------------+------------------------------------------------+
    |  N marks  | u32 length | CLEAR and CODED pages, zstd  |  ENCRYPTED pages and what is left, zstd        |
    +-----------+------------+------------------------------+------------------------------------------------+
     \\__________ associated data, after the header ________/ \\________________ ciphertext ___________________/

A mark is `treatment << 30 | position`: where in the piece of stream the page's 4096 bytes begin. Marks stand in the order of
treatment, then position, and their pages do not overlap; anything else is malformed. The reader does what the mark says and
guesses nothing: what a page is was decided at the source, by the state that it had when it was sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane import wire
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.codecs import PAGE_BYTES, PageCodec
from sealane.seal.compression import INPUT_MAX, RecordCompressor
from sealane.wire.core import Reader
from sealane.wire.events import Offsets
from sealane.wire.sniff import SNIFF_BYTES

MARK_BYTES: Final = 4
MARKS_MAX: Final = RECORD_PAYLOAD_MAX // PAGE_BYTES
# The largest piece of stream whose record has room for the marks of all its pages, compressed in vain or not.
PIECE_MAX: Final = INPUT_MAX - MARK_BYTES * MARKS_MAX
OPEN_LENGTH_BYTES: Final = 4
_TREATMENT_SHIFT: Final = 30
_POSITION_MASK: Final = (1 << _TREATMENT_SHIFT) - 1

Positions: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]
# Whether these pages of a block are a user process's; None where this is not known of the block.
IsUser: TypeAlias = Callable[[str, Offsets], NDArray[np.bool_] | None]


class Treatment(IntEnum):
    """What became of a page."""

    CLEAR = 0
    CODED = 1
    ENCRYPTED = 2


@dataclass(frozen=True, eq=False)
class Marks:
    """The pages of one piece of stream: where each begins (int64, n) and its treatment (uint8, n), in the marks' order."""

    positions: Positions
    treatments: NDArray[np.uint8]

    def count(self, treatment: Treatment) -> int:
        """How many pages are treated so."""
        return int(np.count_nonzero(self.treatments == treatment))

    @property
    def vector_bytes(self) -> int:
        """How long `encode` is."""
        return MARK_BYTES * len(self.positions)

    @property
    def open_bytes(self) -> int:
        """How much of the payload is not encrypted: the marks themselves, CLEAR and CODED pages."""
        return self.vector_bytes + PAGE_BYTES * int(np.count_nonzero(self.treatments != Treatment.ENCRYPTED))

    def encode(self) -> bytes:
        """The vector of marks."""
        return ((self.treatments.astype(np.uint32) << _TREATMENT_SHIFT) | self.positions).astype(">u4").tobytes()


def parse_marks(data: memoryview) -> Marks:
    """The marks as they stand there, not yet judged: what they say counts only once the record has opened."""
    words = np.frombuffer(data, ">u4").astype(np.int64)
    return Marks(words & _POSITION_MASK, (words >> _TREATMENT_SHIFT).astype(np.uint8))


def why_not_marks(marks: Marks, piece_bytes: int, *, has_codec: bool) -> str:
    """Why these cannot be the marks of a piece of so many bytes; empty where they can."""
    if (marks.treatments > Treatment.ENCRYPTED).any():
        return "a treatment that does not exist"
    if not has_codec and (marks.treatments == Treatment.CODED).any():
        return "a page was encoded, and this protection has no codec"
    order = (marks.treatments.astype(np.int64) << _TREATMENT_SHIFT) | marks.positions
    if (np.diff(order) <= 0).any():
        return "marks out of order"
    positions = np.sort(marks.positions)
    if (np.diff(positions) < PAGE_BYTES).any() or int(positions[-1]) + PAGE_BYTES > piece_bytes:
        return "marked pages overlap, or reach beyond the record"
    return ""


class PageMarker:
    """Finds the whole pages in the pieces of one lane's stream, and says how each is to be treated.

    What cannot be parsed has no pages, and so is encrypted; that is never an error here.
    """

    def __init__(self, is_user: IsUser | None, *, has_codec: bool) -> None:
        self._is_user = is_user
        self._treatment_of_user = Treatment.CODED if has_codec else Treatment.ENCRYPTED
        self._first = b""
        self._reader: Reader | None = None
        self._sniffed = False
        self._fed = 0  # bytes of the connection before the next piece

    def marks_of(self, piece: memoryview) -> Marks | None:
        """The marks of the stream's next piece; None where all of it is to be encrypted."""
        if self._is_user is None:
            return None
        positions: list[Positions] = []
        treatments: list[NDArray[np.uint8]] = []
        for event, base in self._read(piece):
            found = _pages_in(event, base)
            if found is None:
                continue
            block, offsets, starts = found
            whole = starts >= 0  # the others began in an earlier piece, and went with it
            is_user = self._is_user(block, offsets[whole])
            if is_user is None or not len(is_user):
                continue
            positions.append(starts[whole])
            treatments.append(np.where(is_user, self._treatment_of_user, Treatment.CLEAR).astype(np.uint8))
        return _in_order(positions, treatments)

    def _read(self, piece: memoryview) -> list[tuple[wire.Event, int]]:
        """The events that the piece completes, and where in the connection the piece began."""
        if self._reader is not None:
            base = self._fed
            self._fed += len(piece)
            return [(event, base) for event in self._reader.feed(piece)]
        if self._sniffed:
            return []
        before = len(self._first)
        self._first += bytes(piece[:SNIFF_BYTES])
        if len(self._first) < SNIFF_BYTES:
            return []
        self._sniffed = True
        self._reader = wire.reader_for(self._first, carry=True)
        self._fed = before + len(piece)
        if not before:
            return [(event, 0) for event in self._reader.feed(piece)]
        head = self._first[:before]
        return [(event, before) for event in (*self._reader.feed(head), *self._reader.feed(piece))]


def _pages_in(event: wire.Event, base: int) -> tuple[str, Offsets, Positions] | None:
    """The event's pages: block, offsets in it, and where they begin, counted from `base`."""
    at = event.offset - base
    if isinstance(event, wire.PageBatch):
        mask = event.is_page
        return event.block, event.offsets[mask], event.starts[mask] + at
    if isinstance(event, wire.PacketPages):
        return event.packet.block, event.page_offsets, at + PAGE_BYTES * np.arange(len(event.pages), dtype=np.int64)
    return None


def _in_order(positions: list[Positions], treatments: list[NDArray[np.uint8]]) -> Marks | None:
    if not positions:
        return None
    every, how = np.concatenate(positions), np.concatenate(treatments)
    if (how == Treatment.ENCRYPTED).all():
        return None
    order = np.argsort((how.astype(np.int64) << _TREATMENT_SHIFT) | every, kind="stable")
    return Marks(every[order], how[order])


def take_out(piece: memoryview, marks: Marks, payload: memoryview, codec: PageCodec | None) -> int:
    """Write the payload of the marked record that carries `piece`; gives its length. Nothing of it is encrypted yet."""
    count = len(marks.positions)
    stream, out = np.frombuffer(piece, np.uint8), np.frombuffer(payload, np.uint8)
    pages_at = MARK_BYTES * count
    rest_at = pages_at + PAGE_BYTES * count
    payload[:pages_at] = marks.encode()
    pages = out[pages_at:rest_at].reshape(count, PAGE_BYTES)
    pages[:] = _windows(stream)[marks.positions]
    first, after = _coded(marks)
    if codec is not None and after > first:
        codec.encode_into(pages[first:after], pages[first:after])
    rest = _rest(marks.positions, len(piece))
    out[rest_at : rest_at + len(rest)] = stream[rest]
    return rest_at + len(rest)


class PartCompressors:
    """Compresses a lane's marked records at one level: what stays open apart from what is encrypted."""

    def __init__(self, level: int) -> None:
        self.level = level
        self._compressor = RecordCompressor(level)
        self._taken_out = memoryview(bytearray(RECORD_PAYLOAD_MAX))

    def hide_into(self, piece: memoryview, out: memoryview) -> int:
        """Compress a piece of which nothing is open; gives the length of what it became."""
        return self._compress_into(piece, out)

    def take_out(
        self, piece: memoryview, marks: Marks, payload: memoryview, codec: PageCodec | None
    ) -> tuple[int, int]:
        """As `take_out`, and compress both parts; gives the payload's length and how much of it stays open."""
        length = take_out(piece, marks, self._taken_out, codec)
        opened, hidden = (
            self._taken_out[marks.vector_bytes : marks.open_bytes],
            self._taken_out[marks.open_bytes : length],
        )
        at = marks.vector_bytes + OPEN_LENGTH_BYTES
        used = self._compress_into(opened, payload[at:])
        payload[: marks.vector_bytes] = self._taken_out[: marks.vector_bytes]
        payload[marks.vector_bytes : at] = used.to_bytes(OPEN_LENGTH_BYTES, "big")
        at += used
        return at + self._compress_into(hidden, payload[at:]), at

    def _compress_into(self, part: memoryview, out: memoryview) -> int:
        """A part that is empty stays so."""
        compressed = self._compressor.compress([part]) if part else b""
        out[: len(compressed)] = compressed
        return len(compressed)


def put_back(payload: memoryview, marks: Marks, piece: memoryview, codec: PageCodec | None) -> None:
    """Undo `take_out`: `piece` is as long as the stream was, and `marks` fit (`why_not_marks`). Changes `payload`."""
    count = len(marks.positions)
    out, given = np.frombuffer(piece, np.uint8), np.frombuffer(payload, np.uint8)
    pages_at = MARK_BYTES * count
    rest_at = pages_at + PAGE_BYTES * count
    pages = given[pages_at:rest_at].reshape(count, PAGE_BYTES)
    first, after = _coded(marks)
    if codec is not None and after > first:
        codec.decode_into(pages[first:after], pages[first:after])
    _windows(out)[marks.positions] = pages
    out[_rest(marks.positions, len(piece))] = given[rest_at:]


def _coded(marks: Marks) -> tuple[int, int]:
    first = marks.count(Treatment.CLEAR)
    return first, first + marks.count(Treatment.CODED)


def _windows(stream: Bytes) -> Bytes:
    """Row i is the 4096 bytes from i on: rows of it are copied whole."""
    return np.ndarray((len(stream) - PAGE_BYTES + 1, PAGE_BYTES), np.uint8, stream.data, 0, (1, 1))


def _rest(positions: Positions, length: int) -> Positions:
    """The places in the stream that belong to no marked page, in order."""
    starts = np.sort(positions)
    begins = np.concatenate([[0], starts + PAGE_BYTES])
    lengths = np.concatenate([starts, [length]]) - begins
    places: Positions = np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(
        int(lengths.sum()), dtype=np.int64
    )
    return places
