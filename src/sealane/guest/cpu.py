"""The registers of a virtual CPU that say where its page tables are (Intel SDM volume 3, 2.5 and 4.1)."""

from dataclasses import dataclass
from typing import Final

_CR0_PG: Final = 1 << 31
_CR4_LA57: Final = 1 << 12
_EFER_LMA: Final = 1 << 10
_FRAME_MASK: Final = ((1 << 52) - 1) & ~0xFFF


@dataclass(frozen=True)
class CpuState:
    """CR0, CR3, CR4 and EFER of one virtual CPU; any values are safe to use."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    @property
    def is_long_mode(self) -> bool:
        """Whether it pages with the tables of 64-bit mode. All others (firmware, 32-bit guests) are not understood."""
        return bool(self.cr0 & _CR0_PG and self.efer & _EFER_LMA)

    @property
    def levels(self) -> int:
        """Levels of its tables: 5 with LA57, else 4."""
        return 5 if self.cr4 & _CR4_LA57 else 4

    @property
    def top_frame(self) -> int:
        """The frame of its top-level table."""
        return (self.cr3 & _FRAME_MASK) >> 12
