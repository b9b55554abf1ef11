"""A postcopy that an earlier agent of this host left half-way: the jobs that go on with it.

Both QEMUs live on without their agents and keep their halves. The source dials again as after any cut; the destination takes
it up when the source comes. A source whose QEMU is gone dials too: it has nothing to give, but the destination may need nothing
any more, or may never have had the VM, and only its word ends the migration here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

from sealane.enclave.interface import LaneTokens, PeerEstablished
from sealane.errors import SealaneError
from sealane.host.job import Job
from sealane.host.migration import messages
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.destination import DestinationMigration
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.host.migration.postcopy_destination import ANSWERS_WITHIN_S, Arrival, Half
from sealane.host.migration.source import SourceMigration
from sealane.host.models import Migration, MigrationRequest, VmDefinition
from sealane.host.registry import is_absent
from sealane.hypervisor.process import LaunchedMachine
from sealane.hypervisor.qmp import QmpMachine
from sealane.session.handover import Handover, Role, State


class RejoiningSource(SourceMigration):
    """The source's half, after a restart."""

    def __init__(self, context: MigrationContext, migration: Migration) -> None:
        request = MigrationRequest(
            vm=migration.vm,
            host=migration.peer,
            on_stall="postcopy",
            protection=migration.protection,
            i_know_this_is_weak=True,  # it was said when the migration began
        )
        vm, peer = context.registry.get(migration.vm), context.peers.get(migration.peer)
        super().__init__(context, request, vm, peer, migration)
        self._handover = Handover(Role.SOURCE, State.POSTCOPY_PAUSED)
        self._ran_before = True

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[QmpMachine]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                qemu = await stack.enter_async_context(super()._open())
            except SealaneError as error:
                if not is_absent(error):
                    raise
                qemu = QmpMachine.gone(self._vm.qmp)
            yield qemu

    async def _migrate(self, qemu: QmpMachine, directory: Path) -> None:
        self._times.requested -= (self.clock() - self.migration.started_at).total_seconds()
        await self._see_off(qemu, self._departure(qemu, directory), None)


class RejoiningDestination(DestinationMigration):
    """The destination's half, after a restart, once the source has come back."""

    def __init__(
        self,
        context: MigrationContext,
        expect_lanes: Callable[[LaneTokens], None],
        enclave: EnclaveProcess,
        met: PeerEstablished,
        vm: VmDefinition,
        migration: Migration,
        holder: LaunchedMachine | None,
    ) -> None:
        """`holder` is the QEMU that an earlier agent launched for it."""
        nothing_to_prepare = cast(messages.Prepare, None)
        super().__init__(context, expect_lanes, enclave, met, nothing_to_prepare, vm, migration)
        self._handover = Handover(Role.DESTINATION, State.POSTCOPY_PAUSED)
        self._holder = holder
        self._begun = time.monotonic() - (self.clock() - migration.started_at).total_seconds()

    async def _receive(self, directory: Path) -> None:
        timeout_s = self._context.settings.limits.qmp_timeout_s
        async with QmpMachine.take_up(self._vm.qmp, self._holder, timeout_s) as qemu:
            lanes = await _lanes_of(qemu)
            self._arrival = arrival = Arrival(self, self._handover, qemu, directory, lanes, self._enclave)
            arrival.rejoining.put_nowait(Half(self._enclave, self._expect_lanes))
            await self._see_in(arrival, parted=True)


async def _lanes_of(qemu: QmpMachine) -> int:
    """As QEMU says. One that waits for a page itself says nothing; every QEMU that is taken here has a lane for wanted pages."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            return await qemu.postcopy_channels()
    except TimeoutError:
        return 2


def taking_up(
    context: MigrationContext,
    expect_lanes: Callable[[LaneTokens], None],
    enclave: EnclaveProcess,
    met: PeerEstablished,
    holder: LaunchedMachine | None,
) -> Callable[[Migration], Job]:
    """What `Jobs.take_up` makes the destination's job with."""
    return lambda migration: RejoiningDestination(
        context, expect_lanes, enclave, met, context.registry.get(migration.vm), migration, holder
    )
