"""What readers tell: one small immutable object for each element, with the bytes that it was read from.

Every event has `raw`, a view of its bytes, and `offset`, where they began in the connection. The bytes of one connection
are the `raw` of all its events in order. Page payloads and headers are numpy views and arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane.wire.constants import RAM_SAVE_FLAG_PAGE, TARGET_PAGE_SIZE

Offsets: TypeAlias = NDArray[np.uint64]
Positions: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]

_FLAGS = np.uint64(TARGET_PAGE_SIZE - 1)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Event:
    """One element of a connection: the bytes it was read from, and where they began."""

    raw: memoryview
    offset: int

    def __repr__(self) -> str:
        # never content: guests' memory must not reach a log
        digest = sha256(self.raw).hexdigest()[:8]
        return f"{type(self).__name__}(offset={self.offset}, {len(self.raw)} bytes, sha256={digest}…)"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StreamBegun(Event):
    """The main channel's first eight bytes (savevm.c, qemu_savevm_state_header)."""

    version: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Configuration(Event):
    """The machine type (savevm.c, vmstate_configuration). Its subsections are events of their own."""

    machine: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ConfigurationSubsection(Event):
    """A subsection of the configuration: `configuration/capabilities`, `…/target-page-bits` or `…/uuid`."""

    name: str
    version: int
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    uuid: bytes = b""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SectionBegun(Event):
    """The head of a section. `kind` is QEMU_VM_SECTION_START, PART, END or FULL.

    PART and END carry only the id; name, instance and version are those of the START.
    """

    kind: int
    section_id: int
    name: str
    instance: int
    version: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SectionFooter(Event):
    """The end of the section with this id (savevm.c, save_section_footer)."""

    section_id: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Command(Event):
    """A command (savevm.c, qemu_savevm_command_send); numbers that QEMU does not have yet come out too."""

    number: int
    payload: memoryview


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PackageBegun(Event):
    """MIG_CMD_PACKAGED: the next `length` bytes are sections of their own, and a part of this stream."""

    length: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StreamEnded(Event):
    """QEMU_VM_EOF. With precopy a VmDescription may still follow."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class VmDescription(Event):
    """The JSON that describes the device sections (savevm.c, qemu_savevm_state_complete_precopy_non_iterable)."""

    json: memoryview


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Opaque(Event):
    """Bytes that are carried as they are; `reason` says why. Without `RAM` and commands it is device state, mostly."""

    reason: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class MemorySize(Event):
    """RAM_SAVE_FLAG_MEM_SIZE: blocks with `total` bytes in all follow, each a RamBlockListed (ram.c, ram_save_setup)."""

    total: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RamBlockListed(Event):
    """One RAM block: name, used length in bytes; the page size where the stream says it, and x-ignore-shared's address."""

    name: str
    length: int
    page_size: int | None
    address: int | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RamSectionEnded(Event):
    """RAM_SAVE_FLAG_EOS: this part of RAM is over. With machine types before 8.1 it is a multifd sync too."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class MultifdFlush(Event):
    """RAM_SAVE_FLAG_MULTIFD_FLUSH: what the channels sent before their next SYNC comes before what follows here."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PageBatch(Event):
    """Consecutive records of pages and zero pages of one RAM block, in the order of the stream (ram.c, ram_save_page).

    `headers` (uint64, n) are the records' first words: address and flags. `starts` (int64, n) is where in `raw` each
    record's content begins: TARGET_PAGE_SIZE bytes of a page, or the one byte that fills a zero page.
    """

    block: str
    headers: Offsets
    starts: Positions

    @property
    def offsets(self) -> Offsets:
        """Each record's offset in the block, in bytes: uint64, n."""
        return self.headers & ~_FLAGS

    @property
    def is_page(self) -> NDArray[np.bool_]:
        """Which records carry a page; the others are zero pages."""
        mask: NDArray[np.bool_] = np.not_equal(self.headers & np.uint64(RAM_SAVE_FLAG_PAGE), 0)
        return mask

    @property
    def page_offsets(self) -> Offsets:
        """The offsets of the records that carry a page."""
        return self.offsets[self.is_page]

    @property
    def zero_offsets(self) -> Offsets:
        """The offsets of the zero pages."""
        return self.offsets[~self.is_page]

    @property
    def fills(self) -> Bytes:
        """The byte that each zero page is filled with (0 from every QEMU of today): uint8, as many as `zero_offsets`."""
        return np.frombuffer(self.raw, np.uint8)[self.starts[~self.is_page]]

    def page_runs(self) -> Iterator[tuple[Offsets, Bytes]]:
        """The pages without copying: for each evenly spaced stretch its offsets (n) and a view of its pages (n, 4096)."""
        mask = self.is_page
        return evenly_spaced(self.raw, self.offsets[mask], self.starts[mask])

    def pages(self) -> Bytes:
        """All pages (n, 4096) in the order of `page_offsets`: a view where they are evenly spaced, or else a copy."""
        starts = self.starts[self.is_page]
        if not len(starts):
            return np.empty((0, TARGET_PAGE_SIZE), np.uint8)
        steps = np.diff(starts)
        if len(steps) and (steps != steps[0]).any():
            windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(self.raw, np.uint8), TARGET_PAGE_SIZE)
            gathered: Bytes = windows[starts]
            return gathered
        return next(view for _, view in evenly_spaced(self.raw, self.offsets[self.is_page], starts))


def evenly_spaced(raw: memoryview, offsets: Offsets, starts: Positions) -> Iterator[tuple[Offsets, Bytes]]:
    """Views of pages that begin at `starts` of `raw`, cut where the distance between them changes."""
    count = len(starts)
    if not count:
        return
    steps = np.diff(starts)
    # a stretch ends where the next distance is another one; the page there then opens a stretch of its own
    begin = 0
    for change in [*np.flatnonzero(steps[1:] != steps[:-1]).tolist(), count - 2]:
        end = change + 2
        if end <= begin:
            continue
        distance = int(starts[begin + 1] - starts[begin]) if end - begin > 1 else TARGET_PAGE_SIZE
        yield (
            offsets[begin:end],
            np.ndarray((end - begin, TARGET_PAGE_SIZE), np.uint8, raw, int(starts[begin]), (distance, 1)),
        )
        begin = end


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class XbzrlePage(Event):
    """A page as the difference from what was sent for it before (ram.c, save_xbzrle_page; encoding in xbzrle.c)."""

    block: str
    page_offset: int
    is_continued: bool
    data: memoryview


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class CompressedPage(Event):
    """A page compressed with zlib by itself (ram-compress.c, until 9.0)."""

    block: str
    page_offset: int
    is_continued: bool
    data: memoryview
