"""`./run bench wire`: how fast one core reads QEMU's stream, in the pieces in which lanes carry it.

Bytes are those of the stream, of which a page's 4096 are stepped over and not read: finding pages costs by the record.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.bench import micro
from sealane.bench.micro import Task
from sealane.limits import KIB, MIB
from sealane.wire import MultifdReader, Reader, StreamReader
from sealane.wire import constants as q
from sealane.wire.multifd import PACKET_HEAD_BYTES, PAGES_PER_PACKET

_PIECE_BYTES: Final = 512 * KIB
_STREAM_BYTES: Final = 64 * MIB
_BLOCK: Final = b"pc.ram"
_PAGE_GOAL: Final = 10.0
_MIXED_GOAL: Final = 1.5
# What one read of a socket gives when the sender is slow: how the cost of a piece shows.
_SMALL_PIECE_BYTES: Final = 64 * KIB


def main(arguments: Sequence[str]) -> int:
    """Measure all of it."""
    return micro.run("wire", __doc__, tasks, arguments)


def tasks() -> Iterator[Task]:
    """The same reader over streams of different mixtures."""
    random = np.random.default_rng(1)
    count = _STREAM_BYTES // (8 + q.TARGET_PAGE_SIZE)
    everything = np.ones(count, bool)
    yield _single("page runs", everything, goal=_PAGE_GOAL)
    yield _single("page runs", everything, piece_bytes=_SMALL_PIECE_BYTES)
    yield _single("page and zero records alternate", np.arange(2 * count) % 2 == 0, goal=_MIXED_GOAL)
    yield _single("pages and zero pages at random, half and half", random.random(2 * count) < 0.5)
    yield _single("runs of 1 to 40 pages between runs of zero pages", _runs(random, count))
    yield _single("zero pages alone", np.zeros(400_000, bool))
    yield _multifd()


def _runs(random: np.random.Generator, count: int) -> NDArray[np.bool_]:
    lengths = random.integers(1, 41, count // 20)
    return np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)


def _single(
    what: str, is_page: NDArray[np.bool_], *, piece_bytes: int = _PIECE_BYTES, goal: float | None = None
) -> Task:
    stream = ram_stream(is_page)
    name = f"{what}, {piece_bytes // KIB} KiB pieces"
    note = f"{int(is_page.sum())} pages, {int((~is_page).sum())} zero pages"
    return Task(name, len(stream), partial(_read, StreamReader, _cut(stream, piece_bytes)), goal, note)


def _multifd() -> Task:
    head = struct.pack(
        ">IIIIIIQI28x256s",
        q.MULTIFD_MAGIC,
        q.MULTIFD_VERSION,
        0,
        PAGES_PER_PACKET,
        PAGES_PER_PACKET,
        PAGES_PER_PACKET * q.TARGET_PAGE_SIZE,
        1,
        0,
        _BLOCK,
    )
    head += np.arange(PAGES_PER_PACKET, dtype=">u8").tobytes()
    offsets = (np.arange(PAGES_PER_PACKET, dtype=np.uint64) * q.TARGET_PAGE_SIZE).astype(">u8").tobytes()
    packet = head[: PACKET_HEAD_BYTES - len(offsets)] + offsets + bytes(PAGES_PER_PACKET * q.TARGET_PAGE_SIZE)
    hello = struct.pack(">II16sB39x", q.MULTIFD_MAGIC, q.MULTIFD_VERSION, bytes(16), 0)
    stream = hello + packet * (_STREAM_BYTES // len(packet))
    return Task(
        "multifd packets of 128 pages, 512 KiB pieces",
        len(stream),
        partial(_read, MultifdReader, _cut(stream, _PIECE_BYTES)),
    )


def _read(kind: type[Reader], pieces: Sequence[memoryview]) -> None:
    reader = kind()
    for piece in pieces:
        reader.feed(piece)


def _cut(stream: bytes, piece_bytes: int) -> list[memoryview]:
    view = memoryview(stream)
    return [view[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]


def ram_stream(is_page: NDArray[np.bool_]) -> bytes:
    """The beginning of a main channel: a block of RAM with a record for each of its pages, PAGE or ZERO."""
    return _prologue(len(is_page)) + _records(is_page)


def _prologue(pages: int) -> bytes:
    """A stream up to RAM's first page: header, section START, the list of one block, EOS, then a PART."""
    length = pages * q.TARGET_PAGE_SIZE
    start = struct.pack(">BI4pII", 1, 2, b"ram", 0, 4)
    listed = (
        struct.pack(">Q", length | q.RAM_SAVE_FLAG_MEM_SIZE) + bytes([len(_BLOCK)]) + _BLOCK + struct.pack(">Q", length)
    )
    footer = struct.pack(">QBI", q.RAM_SAVE_FLAG_EOS, 0x7E, 2)
    first = struct.pack(">Q", q.RAM_SAVE_FLAG_ZERO) + bytes([len(_BLOCK)]) + _BLOCK + bytes(1)
    return struct.pack(">II", 0x5145564D, 3) + start + listed + footer + struct.pack(">BI", 2, 2) + first


def _records(is_page: NDArray[np.bool_]) -> bytes:
    offsets = np.arange(len(is_page), dtype=np.uint64) * np.uint64(q.TARGET_PAGE_SIZE)
    page, zero = q.RAM_SAVE_FLAG_PAGE | q.RAM_SAVE_FLAG_CONTINUE, q.RAM_SAVE_FLAG_ZERO | q.RAM_SAVE_FLAG_CONTINUE
    lengths = np.where(is_page, 8 + q.TARGET_PAGE_SIZE, 9)
    starts = np.cumsum(lengths) - lengths
    stream = np.zeros(int(lengths.sum()), np.uint8)
    heads = (offsets | np.where(is_page, page, zero).astype(np.uint64)).astype(">u8").view(np.uint8).reshape(-1, 8)
    stream[starts[:, None] + np.arange(8)] = heads
    return stream.tobytes()
