"""The seed's monitor module: a thread beside the lanes that knows which pages of the guest are the user's.

The lanes never wait for it. What is not known counts as the user's, so that a protection that tells pages apart errs
towards protecting:

* before the first refresh, after one that failed, and where no process was found at all: every page;
* from the switch-over's refresh on: every page. Between the last look for processes and the stop a new one may have
  begun on pages that were free, and looking again would keep the VM waiting; the last round is the smallest.

A page that became the user's since the last refresh is missed until the next; QEMU sends what was written since, so it
is sent again in a later round.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.errors import InternalError, SealaneError
from sealane.guest import PAGE_BYTES, Classifier, CpuState, MemoryReader, PageClass, RamLayout, Refreshed

_PAGE: Final = np.int64(PAGE_BYTES)


@dataclass(frozen=True)
class Classified:
    """The answer to the refresh of this number, and to all before it: what it did, or why it failed."""

    number: int
    done: Refreshed | None
    error: SealaneError | None = None


@dataclass(frozen=True)
class _Request:
    number: int
    cpus: tuple[CpuState, ...]
    is_last: bool


class Monitor:
    """Page classes of one guest, kept by a thread of its own; `is_user` may be called from any."""

    def __init__(self, memory: MemoryReader, layout: RamLayout, *, post: Callable[[Classified], None]) -> None:
        self._classifier, self._layout, self._post = Classifier(memory, layout), layout, post
        self._user: dict[str, NDArray[np.bool_]] | None = None  # replaced as a whole; None: nothing is known
        self._devices = frozenset(block.name for block in layout.blocks if not block.is_ram)
        self._changed = threading.Condition()
        self._waiting: _Request | None = None
        self._is_last = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def refresh(self, cpu_states: Sequence[CpuState], *, number: int = 0, is_last: bool = False) -> None:
        """Ask for new classes and return at once. A request that still waits is replaced.

        `is_last`: the VM is paused for the switch-over. From now on every page counts as the user's; only the tables that
        are known are walked again, for the record.
        """
        with self._changed:
            self._waiting = _Request(number, tuple(cpu_states), is_last)
            if is_last:
                self._is_last, self._user = True, None
            self._changed.notify()

    def is_user(self, block: str, offsets: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which pages, by their offsets in the block in bytes, are the user's or may be. Never waits."""
        known = self._user
        if block in self._devices:
            return np.zeros(len(offsets), np.bool_)
        if known is None or block not in known:
            return np.ones(len(offsets), np.bool_)
        pages = offsets.astype(np.int64) // _PAGE
        of_block = known[block]
        inside = (pages >= 0) & (pages < len(of_block))
        found: NDArray[np.bool_] = of_block[np.where(inside, pages, 0)] | ~inside if len(of_block) else ~inside
        return found

    def knows(self, block: str) -> bool:
        """Whether `is_user` now tells pages of this block apart, and does not merely call all of them the user's."""
        known = self._user
        return block in self._devices or (known is not None and block in known)

    def classes(self, block: str) -> NDArray[np.uint8]:
        """The class of each page of the block as last refreshed; see `Classifier.classes`."""
        return self._classifier.classes(block)

    def close(self, timeout_s: float | None = None) -> None:
        """End the thread and wait for it: at most one refresh."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._is_closed:
                    self._changed.wait()
                request, self._waiting = self._waiting, None
                if self._is_closed or request is None:
                    return
            self._post(self._serve(request))

    def _serve(self, request: _Request) -> Classified:
        try:
            done = self._classifier.refresh(request.cpus, scan=not request.is_last)
        except SealaneError as error:
            self._publish(None)
            return Classified(request.number, None, error)
        except Exception as error:  # our own fault; whoever waits for the answer must hear of it
            self._publish(None)
            return Classified(request.number, None, InternalError("internal.error", f"{type(error).__name__}: {error}"))
        if done.tops:
            ram = [block.name for block in self._layout.blocks if block.is_ram]
            self._publish({name: self._classifier.classes(name) == PageClass.USER for name in ram})
        else:
            self._publish(None)
        return Classified(request.number, done)

    def _publish(self, user: dict[str, NDArray[np.bool_]] | None) -> None:
        with self._changed:
            self._user = None if self._is_last else user
