"""What each page of guest RAM is: the seed's monitor module, from outside an unmodified QEMU and guest.

One refresh: the tables that are known are looked at again and walked; then RAM is scanned for new ones, all but the pages
just found to be the user's; what is new is walked too. The result is a class for every page, published at once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sealane.guest import search
from sealane.guest.cpu import CpuState
from sealane.guest.layout import Pages, RamLayout
from sealane.guest.memory import Entries, MemoryReader
from sealane.guest.tables import Walk

Classes = NDArray[np.uint8]


class PageClass(IntEnum):
    """A 4 KiB page's class; `KERNEL` is whatever else holds something: kernel, page cache, freed but not wiped."""

    OTHER = 0
    """Devices and firmware: video memory, ROM, RAM that firmware covers."""
    FREE = 1
    """All zeros, or never touched."""
    KERNEL = 2
    USER = 3


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did. `tops` processes (0: nothing is known of user pages), `tables` walked, pages read to find them."""

    tops: int
    tables: int
    scanned_pages: int
    counts: dict[str, int]
    """Pages of guest RAM by class."""
    levels: int
    reading_s: float
    """Seconds in the scan's and the walk's reads."""
    total_s: float


class Classifier:
    """Page classes of one guest. Not for several threads at once; arrays that were given out are never changed.

    Raises `guest.memory` when the memory can no longer be read.
    """

    def __init__(self, memory: MemoryReader, layout: RamLayout, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory, self._layout, self._clock = _Timed(memory, clock), layout, clock
        self._shown = layout.shown()
        self._tops: Pages = np.empty(0, np.int64)
        self._classes: Classes = np.where(self._shown, PageClass.KERNEL, PageClass.OTHER).astype(np.uint8)
        self._is_zero = np.zeros(layout.page_count, np.bool_)

    def refresh(self, cpu_states: Sequence[CpuState], *, scan: bool = True) -> Refreshed:
        """Class all pages anew. Without `scan` only the tables that are known and the CPUs' own are walked: much quicker,
        blind to processes begun since."""
        started, self._memory.spent_s = self._clock(), 0.0
        levels = next((cpu.levels for cpu in cpu_states if cpu.is_long_mode), 4)
        halves = search.references(self._memory, self._layout, cpu_states)
        frames = {frame for cpu in cpu_states for frame in (cpu.top_frame & ~1, cpu.top_frame)}
        own = self._layout.pages_of(np.array(sorted(frames), np.int64))
        tops = self._alike(np.union1d(self._tops, own[own >= 0]), halves)
        walk = Walk(self._memory, self._layout, levels)
        walk.add(tops)
        read = 0
        if scan:
            seen = search.scan(self._memory, self._layout, walk.user | ~self._shown)
            if not len(halves) and any(cpu.is_long_mode for cpu in cpu_states):
                halves = search.likeliest_half(self._memory, self._layout, seen)
            for half in halves:
                tops = np.union1d(tops, search.tops_like(self._memory, self._layout, seen, half))
            walk.add(tops)
            read, self._is_zero = seen.read_pages, seen.is_zero
        self._tops = tops
        self._publish(walk.user)
        spent = self._memory.spent_s
        return Refreshed(
            len(tops), walk.tables, read, self.histogram(), levels, spent, max(self._clock() - started, spent)
        )

    def _alike(self, tops: Pages, halves: Entries) -> Pages:
        """Those of them that are top-level tables still."""
        found = [search.matching(self._memory, self._layout, tops, half) for half in halves]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def _publish(self, user: NDArray[np.bool_]) -> None:
        classes = np.where(self._is_zero, PageClass.FREE, PageClass.KERNEL).astype(np.uint8)
        classes[user] = PageClass.USER
        classes[~self._shown] = PageClass.OTHER
        self._classes = classes

    def classes(self, block_name: str) -> Classes:
        """The class of each 4 KiB page of the block: uint8, as `PageClass`; all OTHER where it is no guest RAM.

        Raises KeyError for an unknown block. Before the first refresh all guest RAM is KERNEL.
        """
        for block in self._layout.blocks:
            if block.name == block_name:
                if block.is_ram:
                    return self._classes[self._layout.span(block_name)]
                return np.zeros(block.pages, np.uint8)
        raise KeyError(block_name)

    def histogram(self) -> dict[str, int]:
        """Pages of guest RAM by class, by the class's name in small letters."""
        counts = np.bincount(self._classes, minlength=len(PageClass))
        return {each.name.lower(): int(counts[each]) for each in PageClass}


class _Timed:
    """A reader that knows how long reading took."""

    def __init__(self, memory: MemoryReader, clock: Callable[[], float]) -> None:
        self._memory, self._clock = memory, clock
        self.spent_s = 0.0

    def read_into(self, position: int, out: NDArray[np.uint8]) -> None:
        began = self._clock()
        self._memory.read_into(position, out)
        self.spent_s += self._clock() - began

    def untouched(self, position: int, pages: int) -> NDArray[np.bool_]:
        began = self._clock()
        untouched = self._memory.untouched(position, pages)
        self.spent_s += self._clock() - began
        return untouched
