"""`sealane inspect pages`: a short-lived enclave looks at a VM's memory; the agent hears counts and classes, sees no page."""

import asyncio
import base64
import io
import os
import zlib
from collections.abc import Iterator
from typing import Protocol

from sealane.enclave.interface import ClassifyPages, GuestUnknown, PagesClassified, TellClasses, WatchGuest
from sealane.errors import make_error
from sealane.guest import RamLayout
from sealane.host.jobs import Jobs
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.monitoring import flat, open_guest_memory
from sealane.host.models import BlockClasses, PageCounts, PageMap
from sealane.host.registry import Registry
from sealane.hypervisor.guest_memory import cpu_states, describe_guest_memory
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import INSPECTION_TIMEOUT_S, QMP_TIMEOUT_S


class Inspecting(Protocol):
    """What an inspection needs of the agent."""

    registry: Registry
    jobs: Jobs
    launcher: EnclaveLauncher


async def inspect_pages(agent: Inspecting, name: str, *, with_classes: bool) -> PageMap:
    """Class the VM's pages now, while it runs. Raises `vm.unknown`, `vm.busy`, `guest.layout`, `guest.memory`, `vm.…`."""
    vm = agent.registry.get(name)
    if busy := agent.jobs.active_for(name):
        raise make_error("vm.busy", f"{name} is in migration {busy.number} ({busy.state})")
    async with QmpMachine.connect(vm.qmp, QMP_TIMEOUT_S) as machine:
        layout = await describe_guest_memory(machine)
        enclave = await agent.launcher.start_enclave()
        try:
            answer = await _classify(enclave, machine, layout)
            told = await _classes(enclave, layout) if with_classes else None
        finally:
            enclave.finish()
            await uninterrupted(enclave.reap())
    return _page_map(name, layout, answer, told)


async def _classify(enclave: EnclaveProcess, machine: QmpMachine, layout: RamLayout) -> PagesClassified:
    heard: asyncio.Future[PagesClassified | GuestUnknown] = asyncio.get_running_loop().create_future()
    enclave.on_pages_classified = heard.set_result
    enclave.call(WatchGuest(layout.to_json()), *open_guest_memory(machine.pid, layout))
    enclave.call(ClassifyPages(1, flat(await cpu_states(machine)), is_last=False))
    answer = await enclave.wait(heard, INSPECTION_TIMEOUT_S, "enclave.slow", "page classes")
    if isinstance(answer, GuestUnknown):
        raise make_error(answer.code, answer.detail)
    return answer


async def _classes(enclave: EnclaveProcess, layout: RamLayout) -> bytes:
    """The classes of all guest RAM, block after block; they come through a file that only the two processes have."""
    memory = os.memfd_create("sealane-classes")
    with io.FileIO(memory, "r+") as file:
        enclave.call(TellClasses(), io.FileIO(os.dup(memory), "r+"))
        await enclave.wait(enclave.classes_told, INSPECTION_TIMEOUT_S, "enclave.slow", "page classes")
        expected = layout.page_count
        file.seek(0)
        told = file.read(expected + 1)
    if told is None or len(told) != expected:
        raise make_error("enclave.died", "the enclave did not tell all classes")
    return told


def _page_map(name: str, layout: RamLayout, answer: PagesClassified, told: bytes | None) -> PageMap:
    return PageMap(
        vm=name,
        counts=PageCounts(user=answer.user, kernel=answer.kernel, free=answer.free, other=answer.other),
        processes=answer.tops,
        tables=answer.tables,
        scanned_pages=answer.scanned_pages,
        reading_s=answer.reading_s,
        total_s=answer.total_s,
        blocks=list(_blocks(layout, told)),
    )


def _blocks(layout: RamLayout, told: bytes | None) -> Iterator[BlockClasses]:
    for block in layout.blocks:
        if block.is_ram:
            classes = None if told is None else base64.b64encode(zlib.compress(told[layout.span(block.name)])).decode()
            yield BlockClasses(name=block.name, pages=block.pages, classes=classes)
