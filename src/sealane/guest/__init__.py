"""Guest memory seen from outside: RAM blocks, guest-physical map, page tables, and what each page is."""

import numpy.ma  # noqa: F401 - np.unique imports it at its first call, and an enclave in its sandbox can import nothing

from sealane.guest.classifier import Classifier, PageClass, Refreshed
from sealane.guest.cpu import CpuState
from sealane.guest.layout import PAGE_BYTES, RamBlock, RamLayout, Segment
from sealane.guest.memory import MemoryReader

__all__ = [
    "PAGE_BYTES",
    "Classifier",
    "CpuState",
    "MemoryReader",
    "PageClass",
    "RamBlock",
    "RamLayout",
    "Refreshed",
    "Segment",
]
