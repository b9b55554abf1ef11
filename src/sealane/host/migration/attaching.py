"""Connects a destination's lanes to its QEMU as they are wanted."""

import asyncio
from pathlib import Path

from sealane.enclave.interface import AttachVm
from sealane.errors import SealaneError
from sealane.host.migration.dialling import dial_vm
from sealane.host.migration.enclave_process import EnclaveProcess


class Attaching:
    """Dials QEMU at `path` for a lane whose first bytes came, lane 0 first; `cancel` at the end.

    `preempt` is the lane of postcopy's wanted pages: QEMU waits for that connection before it switches, and the first page
    comes on it later. So it is dialled with lane 0. None: there is none.
    """

    def __init__(self, enclave: EnclaveProcess, path: Path, *, preempt: int | None = None) -> None:
        self._enclave, self._path, self._preempt = enclave, path, preempt
        self._main_attached = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        enclave.on_vm_wanted = self._soon

    def _soon(self, lane: int) -> None:
        if lane == self._preempt:
            return
        task = asyncio.create_task(self._attach(lane), name=f"attach lane {lane}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach(self, lane: int) -> None:
        """QEMU tells its main channel, and older ones all channels, by the order in which they come."""
        try:
            if lane:
                await self._main_attached.wait()
            self._enclave.call(AttachVm(lane), await dial_vm(self._path))
            if not lane:
                if self._preempt is not None:
                    self._enclave.call(AttachVm(self._preempt), await dial_vm(self._path))
                self._main_attached.set()
        except SealaneError as error:
            self._enclave.fail(error)

    def cancel(self) -> None:
        """Dial no more."""
        for task in self._tasks:
            task.cancel()
