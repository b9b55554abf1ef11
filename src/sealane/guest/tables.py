"""x86-64 page tables: from top-level tables to the pages that user mode can reach.

Intel SDM volume 3, 4.5 "4-level paging and 5-level paging"; Linux's arch/x86/include/asm/pgtable_types.h for what the
kernel keeps in entries that the processor ignores:

    63   62..52   51..12      8         7     6..3   2     1    0
    NX   ignored  frame       global    PS           user  RW   present

* A page is the user's where every level on the way to it is present with the user bit, in the half of the address space
  that belongs to user mode (entries 0..255 of the top).
* Present clear and bit 8 set is Linux's PROT_NONE: still a user's page, at any leaf level, its frame number *inverted*, its
  user bit clear. NUMA balancing makes such entries all the time. Of a huge page's base the bits below its size are
  inverted too where it comes from hugetlbfs (all ones), and are not where it is a transparent one (all zeros).
* A huge page's base has its low bits zero, but for bit 12, which is PAT there.

Tables are hostile input and change while they are read. Each level visits each page once at most, so that cycles and
shared tables end; frames outside RAM are skipped. Time and memory are linear in guest RAM, whatever it holds.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.guest.layout import Frames, Pages, RamLayout
from sealane.guest.memory import Entries, MemoryReader, read_pages

PRESENT: Final = np.uint64(1 << 0)
USER: Final = np.uint64(1 << 2)
HUGE: Final = np.uint64(1 << 7)
PROT_NONE: Final = np.uint64(1 << 8)
PAT: Final = np.uint64(1 << 12)
"""In a huge page's entry."""
ACCESSED_DIRTY: Final = np.uint64(0b11 << 5)
FRAME_MASK: Final = np.uint64(((1 << 52) - 1) & ~0xFFF)
_PAGE_SHIFT: Final = np.uint64(12)

ENTRIES: Final = 512
USER_HALF: Final = 256
# Tables read at once: 1 MiB, what a core's second-level cache holds.
_BATCH: Final = 256
# Bases of huge pages expanded at once, so that no more than 512 Ki frame numbers are in memory.
_FRAMES_AT_ONCE: Final = 1 << 19
_HUGE_FRAMES: Final = {2: 1 << 9, 3: 1 << 18}


class Walk:
    """One walk over any number of top-level tables; `user` grows with each `add`."""

    def __init__(self, reader: MemoryReader, layout: RamLayout, levels: int) -> None:
        self._reader, self._layout, self._levels = reader, layout, levels
        self._seen = {level: np.zeros(layout.page_count, np.bool_) for level in range(1, levels + 1)}
        self._huge: dict[int, set[int]] = {2: set(), 3: set()}
        self.user = np.zeros(layout.page_count, np.bool_)

    @property
    def tables(self) -> int:
        """How many tables were read, top-level ones included."""
        return sum(int(np.count_nonzero(seen)) for seen in self._seen.values())

    def add(self, tops: Pages) -> None:
        """Walk the user half of these top-level tables."""
        current = np.unique(tops)
        for level in range(self._levels, 0, -1):
            fresh = current[~self._seen[level][current]]
            self._seen[level][fresh] = True
            below = np.zeros(self._layout.page_count, np.bool_) if level > 1 else self.user
            for start in range(0, len(fresh), _BATCH):
                self._read_level(level, fresh[start : start + _BATCH], below)
            if level > 1:
                current = np.flatnonzero(below)

    def _read_level(self, level: int, tables: Pages, below: NDArray[np.bool_]) -> None:
        """Mark in `below` what the entries of these tables point to: tables, or at level 1 the user's pages."""
        entries = read_pages(self._reader, self._layout, tables)
        if level == self._levels:
            entries = entries[:, :USER_HALF]
        entries = entries[entries != 0]
        entries = _without_prot_none(entries, level)
        is_user = (entries & (PRESENT | USER)) == (PRESENT | USER)
        if level in _HUGE_FRAMES:
            is_huge = (entries & HUGE) != 0
            self._mark_huge(level, _frames(entries[is_user & is_huge]))
            is_user &= ~is_huge
        elif level > 1:
            is_user &= (entries & HUGE) == 0  # reserved above the third level
        self._mark(_frames(entries[is_user]), below)

    def _mark(self, frames: Frames, mark: NDArray[np.bool_]) -> None:
        pages = self._layout.pages_of(frames)
        mark[pages[pages >= 0]] = True

    def _mark_huge(self, level: int, bases: Frames) -> None:
        size = _HUGE_FRAMES[level]
        bases = np.unique(bases & ~np.int64(1))  # without PAT
        bases = bases[(bases % size == 0) & (self._layout.pages_of(bases) >= 0)]
        fresh = [base for base in bases.tolist() if base not in self._huge[level]]
        self._huge[level].update(fresh)
        for start in range(0, len(fresh), _FRAMES_AT_ONCE // size):
            batch = np.array(fresh[start : start + _FRAMES_AT_ONCE // size], np.int64)
            self._mark((batch[:, None] + np.arange(size)).reshape(-1), self.user)


def _without_prot_none(entries: Entries, level: int) -> Entries:
    """PROT_NONE leaves as the present user leaves that they stand for; all else as it is."""
    if level == 1:
        is_prot_none = (entries & (PRESENT | PROT_NONE)) == PROT_NONE
        return np.where(is_prot_none, (entries ^ FRAME_MASK) | PRESENT | USER, entries)
    if level not in _HUGE_FRAMES:
        return entries
    below = np.uint64((_HUGE_FRAMES[level] - 2) << 12)  # of the base's bits those below the page's size, without PAT
    low = entries & below
    is_prot_none = (entries & (PRESENT | PROT_NONE | HUGE)) == (PROT_NONE | HUGE)
    is_prot_none &= (low == 0) | (low == below)
    return np.where(is_prot_none, (entries ^ FRAME_MASK) & ~(below | PAT) | PRESENT | USER, entries)


def _frames(entries: Entries) -> Frames:
    return ((entries & FRAME_MASK) >> _PAGE_SHIFT).astype(np.int64)
