"""The records of a RAM section (QEMU's migration/ram.c).

be64 address|flags                                     the address counts in the block, in bytes
  ZERO            [u8 length, block name] u8 fill      the name only without CONTINUE
  PAGE            [u8 length, block name] 4096 bytes
  XBZRLE          [u8 length, block name] u8 1, be16 length, data
  COMPRESS_PAGE   [u8 length, block name] be32 length, data
  MEM_SIZE        then for each block: u8 length, name, be64 length [be64 page size] [be64 address]
  MULTIFD_FLUSH, EOS
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from sealane import limits
from sealane.wire import constants as q
from sealane.wire.core import Reader
from sealane.wire.events import (
    CompressedPage,
    MemorySize,
    MultifdFlush,
    Offsets,
    PageBatch,
    Positions,
    RamBlockListed,
    RamSectionEnded,
    XbzrlePage,
)

_FLAGS: Final = q.TARGET_PAGE_SIZE - 1
_PAGE: Final = q.RAM_SAVE_FLAG_PAGE | q.RAM_SAVE_FLAG_CONTINUE
_ZERO: Final = q.RAM_SAVE_FLAG_ZERO | q.RAM_SAVE_FLAG_CONTINUE
_LENGTHS: Final = {_PAGE: 8 + q.TARGET_PAGE_SIZE, _ZERO: 9}
_PAGE_RECORD: Final = _LENGTHS[_PAGE]
_ZERO_RECORD: Final = _LENGTHS[_ZERO]
# When so many records have come in a rhythm (an even number), the rest of it is looked for with strided views: less would
# try too often in vain where pages and zero pages mix at random. Where tries are in vain the next comes later, up to _RUN_MAX.
_RUN: Final = 12
_RUN_MAX: Final = 192
_WORTH_TRYING: Final = 32
# The flags of the records that repeat: (), (PAGE,), (ZERO,) or both.
Rhythm: TypeAlias = tuple[int, ...]
# zlib's compressBound of one page, with room for other implementations of it
_COMPRESSED_MAX: Final = q.TARGET_PAGE_SIZE + 128

_be16 = struct.Struct(">H").unpack_from
_be32 = struct.Struct(">I").unpack_from
_be64 = struct.Struct(">Q").unpack_from


@dataclass
class RamLayout:
    """What the stream said before RAM that changes how blocks are listed.

    `page_sizes` is POSTCOPY_ADVISE's: all blocks' page sizes added up, 0 without postcopy.
    """

    page_sizes: int = 0
    has_addresses: bool = False
    blocks: dict[str, int] = field(default_factory=dict)

    @property
    def has_large_pages(self) -> bool:
        """Whether a block may be listed with a page size."""
        return bool(self.page_sizes & ~q.TARGET_PAGE_SIZE)


class RamRecords(Reader):
    """The states for RAM records; what reads them says by `_ram_ended` what follows an EOS."""

    def __init__(self, *, carry: bool = False) -> None:
        super().__init__(carry=carry)
        self.layout = RamLayout()
        self._block: str | None = None
        self._rhythm: Rhythm = ()
        self._unlisted = 0  # bytes of blocks that MEM_SIZE announced and that are still to come

    def _ram_ended(self) -> None:
        raise NotImplementedError

    def _ram(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 8:
            return self._want(8)
        header: int = _be64(buffer, position)[0]
        flags = header & _FLAGS
        kind = flags & ~q.RAM_SAVE_FLAG_CONTINUE
        if kind in (q.RAM_SAVE_FLAG_PAGE, q.RAM_SAVE_FLAG_ZERO):
            return self._pages(buffer, position, end, header)
        if kind in (q.RAM_SAVE_FLAG_XBZRLE, q.RAM_SAVE_FLAG_COMPRESS_PAGE):
            return self._compressed(buffer, position, end, header)
        raw = buffer[position : position + 8]
        if flags in (q.RAM_SAVE_FLAG_EOS, q.RAM_SAVE_FLAG_MULTIFD_FLUSH) and header != flags:
            raise self._malformed(f"a RAM record with flags {flags:#x} and an address")
        if flags == q.RAM_SAVE_FLAG_EOS:
            self._emit(RamSectionEnded(raw, self._offset))
            self._ram_ended()
        elif flags == q.RAM_SAVE_FLAG_MULTIFD_FLUSH:
            self._emit(MultifdFlush(raw, self._offset))
        elif flags == q.RAM_SAVE_FLAG_MEM_SIZE:
            self._emit(MemorySize(raw, self._offset, header & ~_FLAGS))
            self._begin_listing(header & ~_FLAGS)
        else:
            self._go_opaque(f"a RAM record with flags {flags:#x}, which only other transports or versions have")
            return self._state(buffer, position, end)
        return 8

    # the list of blocks

    def _begin_listing(self, total: int) -> None:
        self.layout.blocks.clear()
        self._unlisted = total
        if self.layout.has_large_pages and self.layout.has_addresses:
            self._go_opaque("huge pages, postcopy and x-ignore-shared together list RAM blocks ambiguously")
        elif total:
            self._state = self._listing

    def _listing(self, buffer: memoryview, position: int, end: int) -> int:
        available = end - position
        if available < 1:
            return self._want(1)
        name_end = 1 + buffer[position]
        need = name_end + 8 + 8 * self.layout.has_addresses
        if available < need:
            return self._want(need)
        name = self._name(buffer, position)
        length: int = _be64(buffer, position + name_end)[0]
        if not length or length % q.TARGET_PAGE_SIZE or length > self._unlisted:
            raise self._malformed(f"RAM block {name!r} of {length} bytes does not fit the total")
        page_size = None
        if self.layout.has_large_pages:
            # A block with the usual page size has no field for it. What stands there else never looks like a page size:
            # a name's length is not 0, and EOS and MULTIFD_FLUSH are smaller.
            if available < need + 8:
                return self._want(need + 8)
            page_size = self._page_size(_be64(buffer, position + need)[0])
        address = _be64(buffer, position + name_end + 8)[0] if self.layout.has_addresses else None
        need += 8 * (page_size is not None)
        self._list(name, length)
        self._emit(RamBlockListed(buffer[position : position + need], self._offset, name, length, page_size, address))
        return need

    def _page_size(self, value: int) -> int | None:
        is_power = value and not value & (value - 1)
        return value if is_power and value > q.TARGET_PAGE_SIZE and value & self.layout.page_sizes else None

    def _list(self, name: str, length: int) -> None:
        if name in self.layout.blocks:
            raise self._malformed(f"RAM block {name!r} is listed twice")
        if len(self.layout.blocks) >= limits.WIRE_BLOCKS_MAX:
            raise self._beyond(f"more than {limits.WIRE_BLOCKS_MAX} RAM blocks")
        self.layout.blocks[name] = length
        self._unlisted -= length
        if not self._unlisted:
            self._state = self._ram

    def _name(self, buffer: memoryview, position: int) -> str:
        """The u8-length name at `position`, all of which is there. Surrogates keep bytes that are not UTF-8."""
        length = buffer[position]
        if not length:
            raise self._malformed("an empty name")
        return bytes(buffer[position + 1 : position + 1 + length]).decode("utf-8", "surrogateescape")

    # pages

    def _enter_block(self, buffer: memoryview, position: int, end: int, header: int) -> tuple[str, int]:
        """The record's block, and how long its head is; ("", need) where the name is not all there."""
        if header & q.RAM_SAVE_FLAG_CONTINUE:
            if self._block is None:
                raise self._malformed("a page continues a block, and none was named before")
            return self._block, 8
        if end - position < 9:
            return "", 9
        head = 9 + buffer[position + 8]
        if end - position < head:
            return "", head
        name = self._name(buffer, position + 8)
        if self.layout.blocks and name not in self.layout.blocks:
            raise self._malformed(f"a page of RAM block {name!r}, which was not listed")
        return name, head

    def _pages(self, buffer: memoryview, position: int, end: int, header: int) -> int:
        block, head = self._enter_block(buffer, position, end, header)
        if not block:
            return self._want(head)
        body = q.TARGET_PAGE_SIZE if header & q.RAM_SAVE_FLAG_PAGE else 1
        if end - position < head + body:
            return self._want(head + body)
        after = position + head + body
        if self.quiet:
            self._block = block
            return _skip_pages(buffer, after, end) - position
        headers, starts, after, self._rhythm = scan_continued(
            buffer, after, end, first=(header, position + head), rhythm=self._rhythm
        )
        good = self._count_inside(headers, block)
        if good < len(headers):
            after = int(starts[good]) - 8
            headers, starts = headers[:good], starts[:good]
        self._block = block
        self._emit(PageBatch(buffer[position:after], self._offset, block, headers, starts - position))
        return after - position

    def _count_inside(self, headers: Offsets, block: str) -> int:
        """How many records come before the first that lies beyond its block; raises where that is the first."""
        length = self.layout.blocks.get(block)
        if length is None or int(headers.max()) < length:
            return len(headers)
        good = int((headers >= np.uint64(length)).argmax())
        if not good:
            raise self._malformed(f"a page beyond the {length} bytes of RAM block {block!r}")
        return good

    def _compressed(self, buffer: memoryview, position: int, end: int, header: int) -> int:
        block, head = self._enter_block(buffer, position, end, header)
        if not block:
            return self._want(head)
        is_xbzrle = bool(header & q.RAM_SAVE_FLAG_XBZRLE)
        body = head + (3 if is_xbzrle else 4)
        if end - position < body:
            return self._want(body)
        if is_xbzrle:
            length: int = _be16(buffer, position + head + 1)[0]
            if buffer[position + head] != q.ENCODING_FLAG_XBZRLE or length > q.TARGET_PAGE_SIZE:
                raise self._malformed("the head of an XBZRLE page does not fit")
        else:
            length = _be32(buffer, position + head)[0]
            if length > _COMPRESSED_MAX:
                raise self._malformed(f"a compressed page of {length} bytes")
        if end - position < body + length:
            return self._want(body + length)
        page_offset = header & ~_FLAGS
        self._count_inside(np.array([page_offset], np.uint64), block)
        self._block = block
        raw = buffer[position : position + body + length]
        is_continued = bool(header & q.RAM_SAVE_FLAG_CONTINUE)
        kind = XbzrlePage if is_xbzrle else CompressedPage
        self._emit(kind(raw, self._offset, block, page_offset, is_continued, raw[body:]))
        return body + length


class PreemptReader(RamRecords):
    """Postcopy's second channel (postcopy-preempt): RAM records from its first byte, until an EOS."""

    def _begin(self, buffer: memoryview, position: int, end: int) -> int:
        self._section = "the preempt channel"
        self._state = self._ram
        return self._ram(buffer, position, end)

    def _ram_ended(self) -> None:
        self._state = self._ram


def scan_continued(
    buffer: memoryview, position: int, end: int, *, first: tuple[int, int], rhythm: Rhythm = ()
) -> tuple[Offsets, Positions, int, Rhythm]:
    """The records that go on in the same block from `position`, all that are whole before `end`.

    Gives their headers and where their contents begin, both opened by `first`, the position behind them, and the rhythm in
    which they ended: given to the next scan, it finds at once what goes on so.

    Boundaries depend on each other, so records are stepped over by their flags; where some have come in a regular rhythm,
    the rest of it is taken with a strided view. A page's content is not touched.
    """
    if end - position < _ZERO_RECORD:
        return np.array([first[0]], np.uint64), np.array([first[1]], np.int64), position, rhythm
    parts: list[Positions] = [np.array([first[1]], np.int64)]
    steps = _RUN
    while True:
        if rhythm:
            taken, position = _take_run(buffer, position, end, rhythm)
            parts.append(taken)
            # a vain try costs as much as dozens of steps
            steps = _RUN if len(taken) >= _WORTH_TRYING else min(2 * steps, _RUN_MAX)
        stepped, position = _step_over(buffer, position, end, steps)
        parts.append(np.array(stepped, np.int64))
        if len(stepped) < steps:
            rhythm = rhythm if len(stepped) < 2 else ()
            break
        rhythm = _rhythm_of(buffer, stepped, position)
        if not rhythm:
            steps = min(2 * steps, _RUN_MAX)
    starts = np.concatenate(parts)
    headers = np.empty(len(starts), np.uint64)
    headers[0] = first[0]
    headers[1:] = np.ndarray((end - 7,), ">u8", buffer, 0, (1,))[starts[1:] - 8]
    foreign = np.uint64(_FLAGS ^ 0xFF)  # stepping looks at the lower flags only
    if np.bitwise_or.reduce(headers[1:]) & foreign:
        good = 1 + int(((headers[1:] & foreign) != 0).argmax())
        return headers[:good], starts[:good], int(starts[good]) - 8, ()
    return headers, starts, position, rhythm


def _skip_pages(buffer: memoryview, position: int, end: int) -> int:
    """The position behind the records that go on in the same block."""
    count = (end - position) // _PAGE_RECORD
    if count:
        fits = (np.ndarray((count,), ">u2", buffer, position + 6, (_PAGE_RECORD,)) & np.uint16(_FLAGS)) == _PAGE
        good = count if fits.all() else int(fits.argmin())
        position += good * _PAGE_RECORD
    if end - position < _ZERO_RECORD or buffer[position + 7] != _ZERO:
        return position
    _, _, position, _ = scan_continued(buffer, position, end, first=(0, 0))
    return position


def _step_over(buffer: memoryview, position: int, end: int, count: int) -> tuple[list[int], int]:
    """Where the contents of up to `count` whole records begin, and the position behind them."""
    starts: list[int] = []
    last_head, last_page = end - _ZERO_RECORD, end - _PAGE_RECORD
    for _ in range(count):
        if position > last_head:
            break
        flags = buffer[position + 7]
        if flags == _PAGE:
            if position > last_page:
                break
            starts.append(position + 8)
            position += _PAGE_RECORD
        elif flags == _ZERO:
            starts.append(position + 8)
            position += _ZERO_RECORD
        else:
            break
    return starts, position


def _rhythm_of(buffer: memoryview, starts: Sequence[int], position: int) -> Rhythm:
    """What the last _RUN records before `position` repeat: pages, zero pages, or one after the other; () if nothing."""
    span = position + 8 - starts[-_RUN]
    if span == _RUN * _PAGE_RECORD:
        return (_PAGE,)
    if span == _RUN * _ZERO_RECORD:
        return (_ZERO,)
    two = _PAGE_RECORD + _ZERO_RECORD
    if 2 * span == _RUN * two and all(starts[-n] - starts[-n - 2] == two for n in range(1, _RUN - 1)):
        return (buffer[starts[-2] - 1], buffer[starts[-1] - 1])
    return ()


def _take_run(buffer: memoryview, position: int, end: int, rhythm: Rhythm) -> tuple[Positions, int]:
    """Where the contents of as many whole repetitions of `rhythm` as follow begin, and the position behind them.

    They are looked for in growing steps, so that a short run costs little; two kinds may follow in either order.
    """
    if end - position >= _ZERO_RECORD and buffer[position + 7] == rhythm[-1]:
        rhythm = rhythm[::-1]
    lengths = [_LENGTHS[kind] for kind in rhythm]
    stride = sum(lengths)
    step, begin = 128, position
    while (count := min(step, (end - position) // stride)) > 0:
        good, at = count, position + 7
        for kind, length in zip(rhythm, lengths, strict=True):
            flags = bytes(buffer[at : at + (count - 1) * stride + 1 : stride])
            good = min(good, count - len(flags.lstrip(bytes((kind,)))))
            at += length
        position += good * stride
        if good < count:
            break
        step *= 8
    starts = np.arange(begin + 8, position + 8, stride, dtype=np.int64)
    if len(lengths) > 1:
        starts = np.stack((starts, starts + lengths[0]), axis=1).reshape(-1)
    return starts, position
