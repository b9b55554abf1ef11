"""How this room reads guest memory: through a `MemoryReader` that somebody else brings."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sealane.guest.layout import PAGE_BYTES, Pages, RamLayout

Entries = NDArray[np.uint64]


class MemoryReader(Protocol):
    """Guest memory by position (`RamBlock.position` and on). The guest runs meanwhile: what is read may be torn."""

    def read_into(self, position: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` from `position` on; what cannot be read there is zero. Raises `guest.memory` when all is gone."""

    def untouched(self, position: int, pages: int) -> NDArray[np.bool_]:
        """Which of these 4 KiB pages nobody ever wrote, so that they hold zeros and need not be read."""


def read_pages(reader: MemoryReader, layout: RamLayout, pages: Pages) -> Entries:
    """Read these pages (ascending) as 512 entries each; neighbours in one go."""
    out = np.empty((len(pages), PAGE_BYTES), np.uint8)
    positions = layout.positions_of(pages)
    breaks = np.flatnonzero(np.diff(positions) != PAGE_BYTES) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(pages)], strict=True):
        if end > start:
            reader.read_into(int(positions[start]), out[start:end].reshape(-1))
    return out.view("<u8")
