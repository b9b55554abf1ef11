"""The agent's share in telling pages apart: it opens the guest's memory, hands it to the enclave, and says when to look.

The agent opens, and never reads: what stands in the pages is seen by the enclave alone. The copy begins after the first look,
or without it after FIRST_LOOK_TIMEOUT_S; the VM runs meanwhile, and no later look is waited for. A VM whose memory cannot be
understood migrates all the same, every page then counting as the user's (`sealane.enclave.monitor`).
"""

import asyncio
import io
import os
from pathlib import Path
from typing import Final

import structlog

from sealane.enclave.interface import ClassifyPages, GuestUnknown, PagesClassified, WatchGuest
from sealane.errors import HostError, SealaneError
from sealane.guest import CpuState, RamLayout
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.hypervisor.guest_memory import cpu_states, describe_guest_memory
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import FIRST_LOOK_TIMEOUT_S

NO_CLASSES_NEEDED: Final = "sealed"
# What an ecall holds with room to spare. One CPU leads to the kernel's half as well as any other.
_CPUS_TOLD_MAX: Final = 512


def open_guest_memory(pid: int, layout: RamLayout) -> list[io.FileIO]:
    """Open QEMU's memory and, where all guest RAM is private to it, its page map. The kernel asks for ptrace rights.

    Raises `guest.memory` where that is refused, and where what QEMU said of its memory is not so.
    """
    try:
        is_private = _is_private(Path(f"/proc/{pid}/maps").read_text(), layout)
        files = [io.FileIO(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))]
        if is_private:
            files.append(io.FileIO(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)))
    except OSError as error:
        raise HostError("guest.memory", f"{error.filename}: {error.strerror}") from error
    return files


def _is_private(maps: str, layout: RamLayout) -> bool:
    """Whether nobody but QEMU can write its RAM; raises `guest.memory` where a block is not mapped as it was told.

    `maps` is /proc/PID/maps: "START-END rwxp OFFSET DEV INODE PATH".
    """
    ranges: list[tuple[int, int, bool]] = []
    for line in maps.splitlines():
        span, mode, _offset, _device, inode = line.split()[:5]
        start, end = (int(part, 16) for part in span.split("-"))
        private = mode.endswith("p") and inode == "0"
        if ranges and ranges[-1][1] == start and ranges[-1][2] == private:
            ranges[-1] = (ranges[-1][0], end, private)
        else:
            ranges.append((start, end, private))
    answer = True
    for block in layout.blocks:
        if block.is_ram:
            end = block.position + block.size_bytes
            holds = [private for start, stop, private in ranges if start <= block.position and end <= stop]
            if not holds:
                raise HostError("guest.memory", f"QEMU does not have {block.name} where it says")
            answer = answer and holds[0]
    return answer


class GuestMonitoring:
    """Keeps the enclave's view of one guest fresh, from `start` to `switch_over`, where the protection tells pages apart.

    Failures are logged, never raised; for `sealed` nothing is done at all.
    """

    def __init__(self, protection: str, log: structlog.stdlib.BoundLogger) -> None:
        self._is_wanted = protection != NO_CLASSES_NEEDED
        self._log = log
        self._qemu: QmpMachine | None = None
        self._enclave: EnclaveProcess | None = None
        self._asked = self._answered = 0
        self._iteration = -1
        self._looked_once = asyncio.Event()
        self._is_over = False
        self.last: PagesClassified | None = None
        """What the last refresh that succeeded has found."""

    async def start(self, qemu: QmpMachine, enclave: EnclaveProcess) -> None:
        """Hand the guest's memory over and ask for the first look; best done before the destination prepares."""
        if not self._is_wanted:
            return
        try:
            layout = await describe_guest_memory(qemu)
            files = open_guest_memory(qemu.pid, layout)
            enclave.on_pages_classified = self._on_answer
            enclave.call(WatchGuest(layout.to_json()), *files)
        except SealaneError as error:
            self._log.warning("the guest's pages are not told apart", code=error.code, detail=error.detail)
            return
        self._qemu, self._enclave = qemu, enclave
        await self._ask()

    async def first_look(self) -> None:
        """Return when the first look has ended, well or not, or after FIRST_LOOK_TIMEOUT_S; at once where nothing is looked at."""
        if self._asked == 0:
            return
        try:
            await asyncio.wait_for(self._looked_once.wait(), FIRST_LOOK_TIMEOUT_S)
        except TimeoutError:
            self._log.info("the copy begins before the guest's pages are told apart", waited_s=FIRST_LOOK_TIMEOUT_S)

    async def iteration(self, number: int) -> None:
        """QEMU is at this pass over dirty pages: look again, where that is new and the last look has ended."""
        if number != self._iteration and self._answered == self._asked:
            self._iteration = number
            await self._ask()

    async def switch_over(self) -> None:
        """The VM is paused: from now on every page counts as the user's. Costs one short command; no look is waited for."""
        await self._ask(is_last=True)
        self._is_over = True

    async def _ask(self, *, is_last: bool = False) -> None:
        if self._qemu is None or self._enclave is None:
            return
        try:
            cpus = await cpu_states(self._qemu)
            self._enclave.call(ClassifyPages(self._asked + 1, flat(cpus), is_last))
            self._asked += 1
        except SealaneError as error:
            self._log.warning("no new look at the guest's pages", code=error.code, detail=error.detail)

    def _on_answer(self, answer: PagesClassified | GuestUnknown) -> None:
        self._answered = max(self._answered, answer.number)
        self._looked_once.set()
        if isinstance(answer, PagesClassified):
            self.last = answer
            counts = {"user": answer.user, "kernel": answer.kernel, "free": answer.free, "other": answer.other}
            self._log.debug("page classes", **counts, processes=answer.tops, took_s=round(answer.total_s, 3))
        elif not self._is_over:  # afterwards nothing depends on it, and QEMU may have ended
            self._log.warning("the guest's pages are not told apart", code=answer.code, detail=answer.detail)


def flat(cpus: list[CpuState]) -> list[int]:
    """The registers as ClassifyPages wants them."""
    return [value for cpu in cpus[:_CPUS_TOLD_MAX] for value in (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer)]
