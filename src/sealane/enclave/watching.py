"""The calls about guest memory, served beside the migration's own: what stands between the interface and the monitor."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sealane.enclave.interface import (
    ClassesTold,
    ClassifyPages,
    GuestUnknown,
    PagesClassified,
    TellClasses,
    WatchGuest,
)
from sealane.enclave.memory import ProcessMemory
from sealane.enclave.monitor import Classified, Monitor
from sealane.errors import InternalError
from sealane.guest import CpuState, RamLayout

Watching = WatchGuest | ClassifyPages | TellClasses
_REGISTERS = 4


class GuestWatch:
    """The enclave's view of its guest; `monitor` is None until the agent has opened the guest's memory.

    `post` is called from the monitor's thread.
    """

    def __init__(self, post: Callable[[Classified], None]) -> None:
        self.monitor: Monitor | None = None
        self._post = post
        self._layout: RamLayout | None = None
        self._memory: ProcessMemory | None = None

    def serve(self, call: Watching, files: Sequence[int]) -> ClassesTold | None:
        """Do what the agent asks; the files are ours. Raises `guest.layout`, and `internal.error` for a call out of turn."""
        match call:
            case WatchGuest():
                self._watch(call, files)
            case ClassifyPages():
                self._need().refresh(_cpus(call.cpus), number=call.number, is_last=call.is_last)
            case TellClasses():
                self._tell_classes(files)
                return ClassesTold()
        return None

    def _watch(self, call: WatchGuest, files: Sequence[int]) -> None:
        if self.monitor is not None or len(files) not in {1, 2}:
            for each in files:
                os.close(each)
            raise InternalError("internal.error", f"WatchGuest with {len(files)} files, or a second one")
        self._memory = ProcessMemory(files[0], files[1] if len(files) > 1 else None)
        self._layout = RamLayout.from_json(call.layout)
        self.monitor = Monitor(self._memory, self._layout, post=self._post)

    def is_user(self, block: str, offsets: NDArray[np.integer]) -> NDArray[np.bool_] | None:
        """Asked by the lanes' threads, never waits: which pages are the user's; None where no look at the block counts now."""
        monitor = self.monitor
        return monitor.is_user(block, offsets) if monitor is not None and monitor.knows(block) else None

    def _need(self) -> Monitor:
        if self.monitor is None:
            raise InternalError("internal.error", "no guest is watched")
        return self.monitor

    def _tell_classes(self, files: Sequence[int]) -> None:
        try:
            monitor = self._need()
            if len(files) != 1 or self._layout is None:
                raise InternalError("internal.error", f"TellClasses with {len(files)} files")
            for block in self._layout.blocks:
                if block.is_ram:
                    _write_all(files[0], memoryview(monitor.classes(block.name)))  # type: ignore[arg-type]
        finally:
            for each in files:
                os.close(each)

    def close(self) -> None:
        """End the monitor's thread, then let go of the guest's memory."""
        if self._memory is not None:
            self._memory.stop()
        if self.monitor is not None:
            self.monitor.close()
        if self._memory is not None:
            self._memory.close()


def answer_of(outcome: Classified) -> PagesClassified | GuestUnknown:
    """The ocall that tells of a refresh."""
    done = outcome.done
    if done is None:
        error = outcome.error
        code, detail = (error.code, error.detail) if error is not None else ("internal.error", "")
        return GuestUnknown(outcome.number, code, detail)
    return PagesClassified(
        number=outcome.number,
        **done.counts,
        tops=done.tops,
        tables=done.tables,
        scanned_pages=done.scanned_pages,
        reading_s=done.reading_s,
        total_s=done.total_s,
    )


def _cpus(numbers: Sequence[int]) -> list[CpuState]:
    if len(numbers) % _REGISTERS:
        raise InternalError("internal.error", "a CPU's registers are not whole")
    return [CpuState(*numbers[at : at + _REGISTERS]) for at in range(0, len(numbers), _REGISTERS)]


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]
