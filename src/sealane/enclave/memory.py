"""Guest memory through descriptors that the agent opened: /proc/PID/mem and /proc/PID/pagemap (proc(5), pagemap.rst).

The kernel checked the agent's right to trace QEMU when it opened them, and binds them to that process's memory: they
stay valid in the enclave, and end with QEMU. Nothing is ever written through them.
"""

import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.errors import HostError

_PAGE_BYTES: Final = 4096
_PAGEMAP_ENTRY_BYTES: Final = 8
# Bits of a pagemap entry: 63 present, 62 swapped out. With neither, nobody ever wrote the page of a private mapping.
_TOUCHED: Final = np.uint64(0b11 << 62)


class ProcessMemory:
    """A `sealane.guest.MemoryReader`: positions are addresses in QEMU's address space.

    Without `pagemap` every page counts as touched; it must only be given where guest memory is private to QEMU. Both
    descriptors are closed with it.
    """

    def __init__(self, memory: int, pagemap: int | None = None) -> None:
        self._memory, self._pagemap = memory, pagemap
        self._is_stopped = False

    def stop(self) -> None:
        """Have reads of other threads fail from now on, with `guest.memory`: whoever is in mid-refresh ends it."""
        self._is_stopped = True

    def read_into(self, position: int, out: NDArray[np.uint8]) -> None:
        """Read; what is not mapped there is zero. Raises `guest.memory` where QEMU is gone."""
        view = memoryview(out)  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._memory, [view[done:]], position + done)
            except OSError:  # nothing is mapped here
                got = min(_PAGE_BYTES - (position + done) % _PAGE_BYTES, len(view) - done)
                out[done : done + got] = 0
            self._check(got)
            done += got

    def untouched(self, position: int, pages: int) -> NDArray[np.bool_]:
        """Which pages are neither present nor swapped out in QEMU's address space."""
        if self._pagemap is None:
            return np.zeros(pages, np.bool_)
        entries = np.full(pages, _TOUCHED)
        view = memoryview(entries.view(np.uint8))  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            where = position // _PAGE_BYTES * _PAGEMAP_ENTRY_BYTES + done
            try:
                got = os.preadv(self._pagemap, [view[done:]], where)
            except OSError as error:
                raise HostError("guest.memory", f"QEMU's page map: {error.strerror}") from error
            self._check(got)
            done += got
        untouched: NDArray[np.bool_] = (entries & _TOUCHED) == 0
        return untouched

    def _check(self, got: int) -> None:
        if got == 0 or self._is_stopped:
            raise HostError("guest.memory", "nobody wants to know any more" if got else "QEMU is gone")

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._memory)
        if self._pagemap is not None:
            os.close(self._pagemap)
