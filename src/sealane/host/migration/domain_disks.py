"""The lanes of a domain's disks: libvirt has the source's QEMU write them to the destination's, by NBD, a connection a disk.

    source QEMU --disks.sock--> lane n ==== lane n --disks.sock--> destination QEMU

NBD's server speaks first, so the destination's end is dialled as soon as its libvirtd has answered `prepare`, and what QEMU says
there waits in the lane for the source's QEMU. Which connection takes which lane does not matter: each names its disk itself.
"""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

from sealane.enclave.interface import AttachVm
from sealane.errors import SealaneError
from sealane.host.migration.dialling import dial_vm, listen_for_vm
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.host.migration.messages import DiskWish
from sealane.libvirt.machine import SizedDisk


def wish_of(sized: SizedDisk) -> DiskWish:
    """What a source says of a disk that is copied."""
    disk = sized.disk
    return DiskWish(
        target=disk.target,
        path=disk.file.path,
        format=disk.file.format,
        capacity_bytes=sized.capacity_bytes,
        allocation_bytes=sized.allocation_bytes,
        backing=None if disk.backing is None else disk.backing.path,
        backing_format=None if disk.backing is None else disk.backing.format,
    )


def disk_figures(stats: dict[str, Any]) -> dict[str, int]:
    """libvirt's job statistics as `Progress` has them; empty where no disk is copied."""
    if not stats.get("disk_total"):
        return {}
    return {
        "disk_bytes_total": stats["disk_total"],
        "disk_bytes_transferred": stats.get("disk_processed", 0),
        "disk_bytes_remaining": stats.get("disk_remaining", 0),
    }


class DiskListener:
    """The source's end: so many connections of QEMU's, each for the next lane; then nobody listens any more."""

    def __init__(self, enclave: EnclaveProcess, path: Path, lanes: range) -> None:
        self._enclave, self._lanes = enclave, lanes
        self._listener = listen_for_vm(path, len(lanes))
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="disks' lanes")

    async def _accept(self) -> None:
        try:
            for lane in self._lanes:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                self._enclave.call(AttachVm(lane), connection)
        except SealaneError as error:
            self._enclave.fail(error)
        finally:
            self._listener.close()

    async def close(self) -> None:
        """Take no more."""
        self._accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._accepting
        self._listener.close()


async def attach_disks(enclave: EnclaveProcess, path: Path, lanes: range) -> None:
    """The destination's end: dial QEMU's NBD server once for each lane; what goes wrong is the enclave's failure."""
    try:
        for lane in lanes:
            connection: socket.socket = await dial_vm(path)
            enclave.call(AttachVm(lane), connection)
    except SealaneError as error:
        enclave.fail(error)
