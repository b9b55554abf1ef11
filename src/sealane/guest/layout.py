"""Where guest memory lies: RAM blocks, and the guest-physical frames that show them.

Guest-physical address and block offset differ: below 1 MiB firmware covers RAM, and a hole for devices moves the rest of
it above 4 GiB. `RamLayout` numbers the 4 KiB pages of all blocks of guest RAM from 0, block after block; everything else
in this room speaks of pages by that number. A frame is a guest-physical address divided by 4096.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from sealane.errors import make_error
from sealane.limits import GUEST_RAM_MAX, GUEST_SEGMENTS_MAX, WIRE_BLOCKS_MAX

PAGE_BYTES: Final = 4096
Pages = NDArray[np.int64]
Frames = NDArray[np.int64]

_NAME_BYTES_MAX: Final = 255  # QEMU's own bound on a block's name (RAMBlock.idstr, system/ramblock.h)
_POSITION_MAX: Final = 1 << 63
_FRAMES_MAX: Final = 1 << 40  # of a 52-bit physical address


@dataclass(frozen=True)
class RamBlock:
    """One of QEMU's RAM blocks. `position` is where a `MemoryReader` finds its first byte.

    `is_ram` tells guest RAM from what devices and firmware bring along, which is never read.
    """

    name: str
    size_bytes: int
    position: int
    is_ram: bool

    @property
    def pages(self) -> int:
        """How many whole 4 KiB pages it has."""
        return self.size_bytes // PAGE_BYTES


@dataclass(frozen=True)
class Segment:
    """`frames` guest frames from `first_frame` on show the block's pages from `first_page` on."""

    first_frame: int
    frames: int
    block: str
    first_page: int


class RamLayout:
    """Blocks and map, checked: raises `guest.layout` for what contradicts itself or is beyond every machine."""

    def __init__(self, blocks: Sequence[RamBlock], segments: Sequence[Segment]) -> None:
        self.blocks, self.segments = tuple(blocks), tuple(sorted(segments, key=lambda each: each.first_frame))
        _check_blocks(self.blocks)
        self._starts: dict[str, int] = {}
        total = 0
        for block in self.blocks:
            if block.is_ram:
                self._starts[block.name] = total
                total += block.pages
        self.page_count: int = total
        _check_segments(self.segments, {block.name: block.pages for block in self.blocks if block.is_ram})
        self._first_frames = np.array([each.first_frame for each in self.segments], np.int64)
        self._end_frames = np.array([each.first_frame + each.frames for each in self.segments], np.int64)
        self._first_pages = np.array([self._starts[each.block] + each.first_page for each in self.segments], np.int64)
        ram = [block for block in self.blocks if block.is_ram]
        self._block_starts = np.array([self._starts[block.name] for block in ram], np.int64)
        self._block_positions = np.array([block.position for block in ram], np.int64)

    def pages_of(self, frames: Frames) -> Pages:
        """The page that each frame shows; -1 where it shows no RAM."""
        if not self.segments:
            return np.full(frames.shape, -1, np.int64)
        at = np.searchsorted(self._first_frames, frames, side="right") - 1
        inside = (at >= 0) & (frames < self._end_frames[at])
        pages: Pages = np.where(inside, frames - self._first_frames[at] + self._first_pages[at], -1)
        return pages

    def positions_of(self, pages: Pages) -> NDArray[np.int64]:
        """Where the reader finds each page."""
        at = np.searchsorted(self._block_starts, pages, side="right") - 1
        positions: NDArray[np.int64] = (pages - self._block_starts[at]) * PAGE_BYTES + self._block_positions[at]
        return positions

    def span(self, block: str) -> slice:
        """The pages of a block of guest RAM; raises KeyError for any other."""
        start = self._starts[block]
        return slice(start, start + next(each.pages for each in self.blocks if each.name == block))

    def shown(self) -> NDArray[np.bool_]:
        """Which pages any frame shows as RAM: the others lie under firmware, or under video memory."""
        shown = np.zeros(self.page_count, np.bool_)
        for segment in self.segments:
            start = self._starts[segment.block] + segment.first_page
            shown[start : start + segment.frames] = True
        return shown

    def to_json(self) -> str:
        """The layout as it crosses the enclave's interface."""
        return json.dumps({"blocks": [asdict(b) for b in self.blocks], "segments": [asdict(s) for s in self.segments]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; raises `guest.layout` for anything else."""
        try:
            said = json.loads(text)
            blocks = [RamBlock(**each) for each in said["blocks"]]
            segments = [Segment(**each) for each in said["segments"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise make_error("guest.layout", f"the map does not fit: {type(error).__name__}") from None
        return cls(blocks, segments)


def _check_blocks(blocks: Sequence[RamBlock]) -> None:
    if len(blocks) > WIRE_BLOCKS_MAX:
        raise make_error("guest.layout", f"{len(blocks)} RAM blocks")
    if len({block.name for block in blocks}) != len(blocks):
        raise make_error("guest.layout", "two RAM blocks have one name")
    for block in blocks:
        typed = type(block.name) is str and type(block.is_ram) is bool
        typed = typed and type(block.size_bytes) is int and type(block.position) is int
        if not typed or not 0 < len(block.name) <= _NAME_BYTES_MAX:
            raise make_error("guest.layout", "a RAM block without a proper name, size or position")
        if not 0 <= block.size_bytes <= GUEST_RAM_MAX or not 0 <= block.position < _POSITION_MAX - block.size_bytes:
            raise make_error("guest.layout", f"a RAM block of {block.size_bytes} bytes at {block.position:#x}")
    if sum(block.size_bytes for block in blocks if block.is_ram) > GUEST_RAM_MAX:
        raise make_error("guest.layout", "more guest RAM than Sealane can map")


def _check_segments(segments: Sequence[Segment], pages: dict[str, int]) -> None:
    if len(segments) > GUEST_SEGMENTS_MAX:
        raise make_error("guest.layout", f"{len(segments)} ranges of guest memory")
    for each in segments:
        if any(type(part) is not int or part < 0 for part in (each.first_frame, each.frames, each.first_page)):
            raise make_error("guest.layout", "a range of guest memory that is none")
        if each.first_frame + each.frames > _FRAMES_MAX or each.frames == 0:
            raise make_error("guest.layout", "a range of guest memory beyond every physical address")
        if each.first_page + each.frames > pages.get(each.block, 0):
            raise make_error("guest.layout", f"frame {each.first_frame:#x} shows what is not in its RAM block")
    for before, after in pairwise(segments):
        if before.first_frame + before.frames > after.first_frame:
            raise make_error("guest.layout", f"two ranges of guest memory meet at frame {after.first_frame:#x}")
