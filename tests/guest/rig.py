"""A guest made by hand: RAM as one array, an allocator of frames, and processes with real page tables."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sealane.errors import HostError
from sealane.guest import PAGE_BYTES, Classifier, CpuState, PageClass, RamBlock, RamLayout, Segment

P, RW, U, A, D, PS, G, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
PAT_HUGE = 1 << 12
INVERT = ((1 << 52) - 1) & ~0xFFF
LONG_MODE = {"cr0": 0x8005_0033, "efer": 0xD01}
MIB_PAGES = 256
HOLE_END_FRAME = 1 << 20  # 4 GiB

SMALL_LAYOUT = RamLayout(
    [RamBlock("pc.ram", 4096 * PAGE_BYTES, 0x7F00_0000_0000, True)], [Segment(0, 4096, "pc.ram", 0)]
)


def hole_layout(below: int = 2048, above: int = 2048) -> RamLayout:
    """RAM below and above the PCI hole, firmware over the end of the first MiB, and a device's block."""
    pages = below + above
    return RamLayout(
        [
            RamBlock("pc.ram", pages * PAGE_BYTES, 1 << 40, True),
            RamBlock("0000:00:02.0/vga.vram", 64 * PAGE_BYTES, 0, False),
        ],
        [
            Segment(0, 0xA0, "pc.ram", 0),
            Segment(0x100, below - 0x100, "pc.ram", 0x100),
            Segment(HOLE_END_FRAME, above, "pc.ram", below),
        ],
    )


class FakeMemory:
    """RAM by page number of the layout; counts what is read."""

    def __init__(self, layout: RamLayout) -> None:
        self.layout = layout
        self.pages = np.zeros((layout.page_count, PAGE_BYTES // 8), np.uint64)
        self.never = np.zeros(layout.page_count, np.bool_)
        self.reads = 0
        self.read_bytes = 0
        self.is_gone = False

    def _page(self, position: int) -> int:
        for block in self.layout.blocks:
            if block.is_ram and 0 <= position - block.position < block.size_bytes:
                return int(self.layout.span(block.name).start) + (position - block.position) // PAGE_BYTES
        raise AssertionError(f"nothing may be read at {position:#x}")

    def read_into(self, position: int, out: NDArray[np.uint8]) -> None:
        if self.is_gone:
            raise HostError("guest.memory", "gone")
        assert position % PAGE_BYTES == 0
        first, pages = self._page(position), len(out) // PAGE_BYTES
        assert not self.never[first : first + pages].all(), "read where nobody ever wrote"
        out[:] = self.pages[first : first + pages].view(np.uint8).reshape(-1)
        self.reads += 1
        self.read_bytes += len(out)

    def untouched(self, position: int, pages: int) -> NDArray[np.bool_]:
        first = self._page(position)
        return self.never[first : first + pages]


@dataclass
class Guest:
    """A kernel and its processes. `user_pages` is the truth, by page number of the layout."""

    layout: RamLayout = SMALL_LAYOUT
    levels: int = 4
    pti: bool = False
    kernel_entries: int = 40
    user_pages: set[int] = field(default_factory=set)
    tops: list[int] = field(default_factory=list)
    """Frames of the processes' top-level tables."""

    def __post_init__(self) -> None:
        self.memory = FakeMemory(self.layout)
        self._free = [f for s in self.layout.segments for f in range(s.first_frame, s.first_frame + s.frames)][16:]
        self._free.reverse()
        below = [self.frame() for _ in range(self.kernel_entries)]
        for each in below:
            self.write(each, 7, (each << 12) | P)
        slots = [273 + 3 * at for at in range(self.kernel_entries - 1)] + [511]
        slots = [slot if slot < 512 else 256 + slot % 16 for slot in slots]
        self.kernel_half = {slot: (frame << 12) | P | RW | A | D for slot, frame in zip(slots, below, strict=True)}

    def frame(self) -> int:
        """A fresh frame."""
        return self._free.pop()

    def aligned(self, frames: int) -> int:
        """The base of a huge page."""
        free = set(self._free)
        base = next(f for f in sorted(free) if f % frames == 0 and all(f + i in free for i in range(frames)))
        self._free = [f for f in self._free if not base <= f < base + frames]
        return base

    def page(self, frame: int) -> int:
        return int(self.layout.pages_of(np.array([frame]))[0])

    def write(self, frame: int, index: int, entry: int) -> None:
        self.memory.pages[self.page(frame), index] = entry

    def read(self, frame: int, index: int) -> int:
        return int(self.memory.pages[self.page(frame), index])

    def fill(self, frame: int) -> None:
        """Content that looks like nothing."""
        self.memory.pages[self.page(frame)] = 0x0101_0101_0101_0100 + 2 * frame

    def process(self, *, ldt: bool = False) -> int:
        """A top-level table, kernel half filled; its frame. Under PTI it is even and its user copy follows it."""
        if self.pti:
            top = self.aligned(2)
            user_copy = top + 1
            self.write(user_copy, 508, self.kernel_half[511])
            self.write(user_copy, 511, (self.frame() << 12) | P | RW)
        else:
            top = self.frame()
        for slot, entry in self.kernel_half.items():
            self.write(top, slot, entry & ~D if slot % 2 else entry)
        if ldt:
            self.write(top, 272, (self.frame() << 12) | P | RW)
        self.tops.append(top)
        return top

    def table_for(self, top: int, address: int, level: int, flags: int = P | RW | U) -> int:
        """The frame of the table of this level (1: of PTEs) for a user address, made where it is missing."""
        table = top
        for at in range(self.levels, level, -1):
            index = (address >> (12 + 9 * (at - 1))) & 511
            entry = self.read(table, index)
            if not entry:
                below = self.frame()
                entry = (below << 12) | flags | (NX if self.pti and at == self.levels else 0)
                self.write(table, index, entry)
                if self.pti and at == self.levels:
                    self.write(top + 1, index, entry & ~NX)
            table = (entry & INVERT) >> 12
        return table

    def map(
        self,
        top: int,
        address: int,
        *,
        level: int = 1,
        prot_none: bool = False,
        pat: bool = False,
        transparent: bool = False,
    ) -> int:
        """Map fresh frames at a user address with a leaf of this level; returns the first frame.

        `transparent`: a PROT_NONE huge page as Linux's transparent ones are (pmd_modify), not as hugetlbfs's (pte_modify).
        """
        size = 1 << (9 * (level - 1))
        base = self.frame() if level == 1 else self.aligned(size)
        entry = (base << 12) | A | (PS if level > 1 else 0) | (PAT_HUGE if pat else 0)
        inverted = INVERT & ~((size << 12) - 1) if transparent else INVERT
        entry = ((entry ^ inverted) | G) if prot_none else (entry | P | RW | U)
        self.write(self.table_for(top, address, level), (address >> (12 + 9 * (level - 1))) & 511, entry)
        for frame in range(base, base + size):
            self.fill(frame)
            self.user_pages.add(self.page(frame))
        return base

    def cpu(self, top: int, *, in_user_mode: bool = False) -> CpuState:
        cr3 = (top << 12) | (0x1000 if in_user_mode else 0) | 0x18
        return CpuState(cr3=cr3, cr4=0x1000 if self.levels == 5 else 0x6F0, **LONG_MODE)

    def found(self, *cpus: CpuState) -> set[int]:
        """The pages that a fresh classifier calls the user's."""
        classifier = Classifier(self.memory, self.layout)
        classifier.refresh(cpus)
        return user_pages(classifier, self.layout)


def user_pages(classifier: Classifier, layout: RamLayout) -> set[int]:
    found: set[int] = set()
    for block in layout.blocks:
        if block.is_ram:
            start = layout.span(block.name).start
            found |= {start + int(p) for p in np.flatnonzero(classifier.classes(block.name) == PageClass.USER)}
    return found
