"""Finding every process's top-level page table without the guest kernel's symbols.

All processes share the kernel: the kernel half (entries 256..511) of every top-level table is that of the table a virtual
CPU uses now, but for a few entries. So a page is a top-level table where its entry 511, which maps the kernel's own text,
is the one of a reference, and at least SHARED_MIN of the reference's kernel entries are its own too. Why not all:

* a process with an LDT has an entry of its own under page-table isolation (PTI), and may be the one that runs now;
* the processor sets accessed and dirty bits when it likes.

Under PTI each process has two tables side by side; the kernel's, which maps both halves, comes first, and CR3 may point
at the other one (bit 12 set), which has only two or three kernel entries.

Where no CPU leads to a table (one in system management mode, say), the pages are grouped by their entry 511: the largest
group of pages that look like top-level tables and agree on the kernel half is taken.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.guest.cpu import CpuState
from sealane.guest.layout import PAGE_BYTES, Pages, RamLayout
from sealane.guest.memory import Entries, MemoryReader, read_pages
from sealane.guest.tables import ACCESSED_DIRTY, FRAME_MASK, HUGE, PRESENT, USER, USER_HALF

SHARED_MIN: Final = 0.8
# A kernel half needs more than the text's entry: text, direct map, and one of vmalloc, memory map, fixed map.
KERNEL_ENTRIES_MIN: Final = 3
# Read at once while scanning: 1 MiB stays in a core's second-level cache, and what is done per piece costs little.
_SCAN_PAGES: Final = 256
# Touched pages with a gap of up to so many untouched ones between them are read in one go.
_GAP_PAGES: Final = 4
# Pages whose touched state is asked for at once: 1 GiB.
_ASK_PAGES: Final = 1 << 18
_VERIFY_PAGES: Final = 256
_GROUPS_TRIED_MAX: Final = 64
# A page is looked at in these places before all of it is: most pages that hold something hold it there.
_SAMPLED: Final = (0, 171, 341, 511)

TABLE: Final = PRESENT | HUGE
_CHANGING: Final = ~ACCESSED_DIRTY


class Scan:
    """One look at guest RAM: each page's entry 511 (`lasts`, 0 where not read) and whether it is all zeros."""

    def __init__(self, layout: RamLayout) -> None:
        self.lasts = np.zeros(layout.page_count, np.uint64)
        self.is_zero = np.zeros(layout.page_count, np.bool_)
        self.read_pages = 0


def scan(reader: MemoryReader, layout: RamLayout, skip: NDArray[np.bool_]) -> Scan:
    """Read all pages but `skip` and those that nobody touched, in small pieces, so that other threads get their turn."""
    seen = Scan(layout)
    buffer = np.empty((_SCAN_PAGES, PAGE_BYTES // 8), np.uint64)
    for block in layout.blocks:
        if block.is_ram:
            span = layout.span(block.name)
            for first in range(span.start, span.stop, _ASK_PAGES):
                pages = min(_ASK_PAGES, span.stop - first)
                position = block.position + (first - span.start) * PAGE_BYTES
                untouched = reader.untouched(position, pages)
                seen.is_zero[first : first + pages] = untouched
                wanted = ~untouched & ~skip[first : first + pages]
                for start, stop in _runs(wanted):
                    _scan_run(reader, seen, buffer, position + start * PAGE_BYTES, slice(first + start, first + stop))
    return seen


def _scan_run(reader: MemoryReader, seen: Scan, buffer: Entries, position: int, pages: slice) -> None:
    for first in range(pages.start, pages.stop, _SCAN_PAGES):
        count = min(_SCAN_PAGES, pages.stop - first)
        piece = buffer[:count]
        reader.read_into(position + (first - pages.start) * PAGE_BYTES, piece.view(np.uint8).reshape(-1))
        seen.lasts[first : first + count] = piece[:, -1]
        some = piece[:, _SAMPLED[0]] | piece[:, _SAMPLED[1]] | piece[:, _SAMPLED[2]] | piece[:, _SAMPLED[3]]
        blank = np.flatnonzero(some == 0)
        if len(blank):
            seen.is_zero[first + blank[np.bitwise_or.reduce(piece[blank], axis=1) == 0]] = True
        seen.read_pages += count


def _runs(wanted: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of wanted pages, small gaps closed."""
    at = np.flatnonzero(wanted)
    if not len(at):
        return []
    breaks = np.flatnonzero(np.diff(at) > _GAP_PAGES + 1)
    starts = at[np.concatenate(([0], breaks + 1))]
    stops = at[np.concatenate((breaks, [len(at) - 1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def references(reader: MemoryReader, layout: RamLayout, cpus: Sequence[CpuState]) -> Entries:
    """The distinct kernel halves (n, 256) that the CPUs use; A and D bits cleared. None where no CPU's CR3 leads to one."""
    halves: dict[int, NDArray[np.uint64]] = {}
    for frame in sorted({cpu.top_frame for cpu in cpus if cpu.is_long_mode}):
        pages = layout.pages_of(np.array([frame & ~1, frame], np.int64))
        best = None
        for page in pages[pages >= 0]:
            half = kernel_halves(reader, layout, np.array([page]))[0]
            if _is_plausible(layout, half) and (best is None or np.count_nonzero(half) > np.count_nonzero(best)):
                best = half
        if best is not None:
            known = halves.get(int(best[-1]))
            if known is None or np.count_nonzero(best) > np.count_nonzero(known):
                halves[int(best[-1])] = best
    return np.array(list(halves.values()), np.uint64).reshape(-1, USER_HALF)


def kernel_halves(reader: MemoryReader, layout: RamLayout, pages: Pages) -> Entries:
    """The kernel half of each page taken as a top-level table, without A and D bits: (n, 256)."""
    return read_pages(reader, layout, pages)[:, USER_HALF:] & _CHANGING


def _is_plausible(layout: RamLayout, half: Entries) -> bool:
    """Whether this may be a kernel half: entry 511 points to a table in RAM, and so do most of the others."""
    entries = half[half != 0]
    frames = ((entries & FRAME_MASK) >> np.uint64(12)).astype(np.int64)
    fit = ((entries & TABLE) == PRESENT) & (layout.pages_of(frames) >= 0)
    return bool(half[-1] and fit[-1] and np.count_nonzero(fit) >= max(KERNEL_ENTRIES_MIN, SHARED_MIN * len(entries)))


def matching(reader: MemoryReader, layout: RamLayout, candidates: Pages, half: Entries) -> Pages:
    """Those candidates (ascending) whose kernel half is this reference's, in entry 511 and SHARED_MIN of the others."""
    used = np.flatnonzero(half)
    found = []
    for start in range(0, len(candidates), _VERIFY_PAGES):
        batch = candidates[start : start + _VERIFY_PAGES]
        halves = kernel_halves(reader, layout, batch)
        shared = np.count_nonzero(halves[:, used] == half[used], axis=1)
        found.append(batch[(halves[:, -1] == half[-1]) & (shared >= SHARED_MIN * len(used))])
    return np.concatenate(found) if found else np.empty(0, np.int64)


def tops_like(reader: MemoryReader, layout: RamLayout, seen: Scan, half: Entries) -> Pages:
    """All top-level tables in the scan that share this kernel half."""
    candidates = np.flatnonzero((seen.lasts & _CHANGING) == half[-1])
    return matching(reader, layout, candidates, half)


def likeliest_half(reader: MemoryReader, layout: RamLayout, seen: Scan) -> Entries:
    """A kernel half, (1, 256), that at least two pages with something in their user half share; (0, 256) where there is none."""
    lasts = seen.lasts & _CHANGING
    at = np.flatnonzero((lasts & TABLE) == PRESENT)
    frames = ((lasts[at] & FRAME_MASK) >> np.uint64(12)).astype(np.int64)
    at = at[layout.pages_of(frames) >= 0]
    values, counts = np.unique(lasts[at], return_counts=True)
    order = np.argsort(counts)[::-1][:_GROUPS_TRIED_MAX]
    best, best_score = np.empty((0, USER_HALF), np.uint64), 1
    for value, count in zip(values[order], counts[order], strict=True):
        if count <= best_score:
            break
        members = at[lasts[at] == value]
        whole = read_pages(reader, layout, members[:_VERIFY_PAGES])
        plausible = np.array([_has_user_half(layout, page) for page in whole])
        for half in whole[plausible][:4, USER_HALF:] & _CHANGING:
            if _is_plausible(layout, half):
                score = len(matching(reader, layout, members[:_VERIFY_PAGES][plausible], half))
                if score > best_score:
                    best, best_score = half.reshape(1, -1), score
    return best


def _has_user_half(layout: RamLayout, page: Entries) -> bool:
    entries = page[:USER_HALF]
    entries = entries[entries != 0]
    frames = ((entries & FRAME_MASK) >> np.uint64(12)).astype(np.int64)
    fit = (entries & (TABLE | USER)) == (PRESENT | USER)
    return bool(len(entries) and fit.all() and (layout.pages_of(frames) >= 0).all())
