"""A libvirt domain comes to this host: this host's libvirtd takes it, spoken to by the source through the filter.

    preparing        the policy is asked, the domain is not here; sockets and lanes ready
    copying          lane 0 leads through the filter to libvirtd, which launches QEMU; the others lead to QEMU
    switching-over   libvirtd has finished, the domain is here and paused; every lane is closed, the digest goes to the source
    handing-over     the ticket is journalled: the domain is ours, and is resumed

Every step but the reception is `DestinationMigration`'s.
"""

import asyncio
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

from sealane.enclave.interface import AttachVm, ExpectLanes, SendMessage
from sealane.errors import ControlError, InternalError, SealaneError, make_error
from sealane.host.migration import messages
from sealane.host.migration.checks import available_memory_bytes, check_free_memory, check_lanes
from sealane.host.migration.destination import PROGRESS_EVERY_S, DestinationMigration
from sealane.host.migration.dialling import dial_vm
from sealane.host.migration.domain_disks import attach_disks
from sealane.host.migration.domain_lines import FilteredLine, dial
from sealane.host.migration.enclave_process import uninterrupted
from sealane.host.migration.gate import StandingGate, pass_gate
from sealane.host.migration.stall import StallLimit
from sealane.host.migration.volumes import make_volumes, remove_volumes
from sealane.host.models import Progress
from sealane.host.registry import is_absent
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.domains import parse_address
from sealane.libvirt.domainxml import DomainIdentity
from sealane.libvirt.machine import STOPPED, DomainMachine, MigrationDirectory, daemon_socket
from sealane.libvirt.rpcfilter import Agreed, RpcFilter
from sealane.limits import (
    CHANNEL_ANSWER_TIMEOUT_S,
    LANE_OPEN_TIMEOUT_S,
    LIBVIRT_TIMEOUT_S,
    LOADED_TIMEOUT_S,
    MULTIFD_CHANNELS_DEFAULT,
    QMP_TIMEOUT_S,
)
from sealane.session.handover import Input


class DomainDestination(DestinationMigration):
    """One domain comes to this host."""

    _machine: DomainMachine | None = None
    _line: FilteredLine | None = None
    _was_persistent = False
    _is_begun = False

    async def run(self) -> None:
        """Carry the migration out; ends in completed or aborted whatever happens."""
        address = parse_address(self._vm.qmp)
        try:
            with MigrationDirectory(self.id, for_qemu=True):
                async with DomainMachine.connect(address, LIBVIRT_TIMEOUT_S) as self._machine:
                    try:
                        await self._receive_domain(self._machine)
                    except BaseException as error:
                        await uninterrupted(self._give_up(error))
        finally:
            if self._line is not None:
                await uninterrupted(self._line.close())
            for task in self._attaching:
                task.cancel()
            await uninterrupted(self._enclave.reap())

    async def _receive_domain(self, machine: DomainMachine) -> None:
        gate = StandingGate(self, self._context, self._enclave, self._vm, "receive")
        await pass_gate(self, self._context, self._met, self._vm, "receive")
        self.update(detail="looking at this host's libvirt")
        check_free_memory(self._prepare.memory_bytes, available_memory_bytes())
        await self._check_absent(machine)
        self._was_persistent = await machine.is_persistent()
        wanted = self._prepare.multifd_channels
        channels = MULTIFD_CHANNELS_DEFAULT if wanted is None else wanted
        check_lanes(channels, len(self._disks))
        await self._make_volumes()
        await self._open_domain_lanes(channels)
        self._is_begun = True
        self._step(Input.PREPARED, detail="the domain's memory comes in", multifd_channels=channels)
        digest = await self._load_domain(machine)
        self._loaded_told = True
        self._enclave.call(SendMessage(messages.Loaded(digest=digest).model_dump_json()))
        self._step(Input.VM_STOPPED, detail="everything came and is loaded, paused")
        ticket = await self._enclave.expect(messages.Ticket, self._context.settings.limits.word_timeout_s)
        self._check_ticket(ticket, digest)
        await gate.settled()
        await self._take_over(cast(QmpMachine, machine), ticket)

    async def _check_absent(self, machine: DomainMachine) -> None:
        try:
            state = await machine.run_state()
        except SealaneError as error:
            if is_absent(error):
                return
            raise
        raise ControlError("check.vm-present", f"{self._vm.name} is {state} here already")

    @property
    def _disks(self) -> list[messages.DiskWish]:
        return [] if self._prepare.domain is None else self._prepare.domain.disks

    async def _make_volumes(self) -> None:
        if self._disks:
            self.update(detail="making files for its disks")
            directories = self._context.settings.storage_directories
            await make_volumes(self._disks, directories, lambda made: self.journal(volumes=made))

    async def _open_domain_lanes(self, channels: int) -> None:
        path = MigrationDirectory.vm_socket(self.id)
        self._enclave.on_vm_wanted = lambda lane: self._attach_lane_soon(lane, path, channels)
        self._enclave.call(ExpectLanes(2 + channels + len(self._disks)))
        tokens = self._enclave.lane_tokens
        self._expect_lanes(await self._enclave.wait(tokens, QMP_TIMEOUT_S, "enclave.slow", "tokens of lanes"))
        self._enclave.call(SendMessage(messages.Prepared(multifd_channels=channels, preempt=False).model_dump_json()))
        await self._enclave.wait(
            self._enclave.lanes_open, CHANNEL_ANSWER_TIMEOUT_S + LANE_OPEN_TIMEOUT_S, "peer.slow", "lanes"
        )

    # ---- receiving

    def _attach_lane_soon(self, lane: int, path: Path, channels: int) -> None:
        self._soon(self._attach_daemon(path, channels) if lane == 0 else self._attach_qemu(lane, path))

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)

    async def _attach_daemon(self, path: Path, channels: int) -> None:
        """The source speaks to libvirtd: through the filter."""
        address, disks = parse_address(self._vm.qmp), MigrationDirectory.disks_socket(self.id)
        agreed = Agreed(
            uri=address.uri,
            domain=DomainIdentity(self._vm.name, address.uuid),
            migrate_uri=f"unix://{path}",
            channels_max=channels,
            disks_uri=f"unix://{disks}" if self._disks else "",
            disks={each.target: each.path for each in self._disks},
        )
        try:
            daemon = await dial(daemon_socket(address.uri))
        except SealaneError as error:
            self._enclave.fail(error)
            return
        ours, enclaves = socket.socketpair()
        ours.setblocking(False)
        self._line = FilteredLine(ours, daemon, RpcFilter(agreed))
        if self._disks:
            lanes = range(2 + channels, 2 + channels + len(self._disks))
            self._soon(self._attach_disks(self._line, disks, lanes))
        try:
            self._enclave.call(AttachVm(0), enclaves)
            await self._line.ended()
        except SealaneError as error:
            self._enclave.fail(error)

    async def _attach_disks(self, line: FilteredLine, path: Path, lanes: range) -> None:
        await line.prepared.wait()
        await attach_disks(self._enclave, path, lanes)

    async def _attach_qemu(self, lane: int, path: Path) -> None:
        """Dial QEMU for a lane, its main one first; it listens since libvirtd's answer to `prepare`."""
        try:
            if lane > 1:
                await self._main_attached.wait()
            self._enclave.call(AttachVm(lane), await dial_vm(path))
            if lane == 1:
                self._main_attached.set()
        except SealaneError as error:
            self._enclave.fail(error)

    async def _load_domain(self, machine: DomainMachine) -> str:
        """Wait until libvirtd has finished and both ends have closed every lane; returns the lanes' digest."""
        enclave = self._enclave
        stall = StallLimit(self._context.settings.limits.stall_timeout_s)
        while not enclave.lanes_closed.done():
            await self._watch(asyncio.wait({enclave.lanes_closed}, timeout=PROGRESS_EVERY_S))
            if not enclave.lanes_closed.done():
                stall.look(enclave.counters.wire_bytes)
                self.update(progress=Progress(bytes_wire=enclave.counters.wire_bytes))
        closed = await enclave.wait(enclave.lanes_closed, LOADED_TIMEOUT_S, "peer.slow", "close of the lanes")
        if self._line is None or not self._line.filter.has_finished:
            raise make_error("libvirt.failed", "the lanes closed before this host's libvirtd had finished")
        state = await machine.run_state()
        if state == "running":
            raise InternalError("internal.error", "libvirt resumed the domain by itself")
        if state not in STOPPED:
            raise make_error("libvirt.failed", f"the domain that came is not paused, but {state}")
        return closed.digest

    # ---- when it does not go on

    async def _runs(self) -> bool:
        try:
            return self._machine is not None and await self._machine.run_state() == "running"
        except SealaneError:
            return False

    async def _destroy(self) -> None:
        """Destroy the domain that came, which never ran, and forget it where it was not known here before."""
        if self._is_begun and self._machine is not None:
            if self._line is not None:
                await self._line.close()  # what has not come to its Finish is libvirtd's to destroy
            await self._machine.destroy(undefine=not self._was_persistent)
        await asyncio.to_thread(remove_volumes, self.migration.volumes)

    def _as_sealane_error(self, error: BaseException) -> SealaneError:
        if self._line is not None and self._line.failure is not None:
            return self._line.failure
        return super()._as_sealane_error(error)
