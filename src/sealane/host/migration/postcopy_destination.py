"""The destination's half of a postcopy: hold the ticket, run the VM once QEMU has switched, take pages, join again after a cut.

    copying           the ticket comes while QEMU copies
    switching-over    the ticket is journalled; QEMU has not switched, so nothing can run here
    postcopy          QEMU has switched: journalled, and then the VM is resumed. From now on the enclave outlives this agent
    postcopy-paused   the lanes were cut; the VM stands still at the first page that it lacks

A QEMU that does not come through the switch is destroyed, and the source is told so: the VM never ran here. After the
switch this half is kept, whatever happens to the lanes.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sealane.enclave.interface import ExpectLanes, LaneTokens, Outlive, SendMessage
from sealane.errors import ControlError, SealaneError, for_peer, make_error
from sealane.host.job import Job
from sealane.host.migration import messages
from sealane.host.migration.attaching import Attaching
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.models import Progress
from sealane.host.problems import problem_of
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import LANE_OPEN_TIMEOUT_S, LOADED_TIMEOUT_S, QMP_TIMEOUT_S
from sealane.session.handover import Handover, Input

PROGRESS_EVERY_S: Final = 0.5
# How often to ask QEMU whether it has loaded the devices' state: it tells that by no event, and the VM is paused meanwhile.
_SWITCH_LOOK_S: Final = 0.004
# A QEMU that does not wait for a page itself answers at once.
ANSWERS_WITHIN_S: Final = 2.0
# Statuses of a QEMU that has all it needs to run the VM, but for pages.
SWITCHED: Final = frozenset({"postcopy-active", "postcopy-paused", "completed"})


@dataclass
class Half:
    """The source's other half, met anew: its enclave, and how its lanes find the way there."""

    enclave: EnclaveProcess
    expect_lanes: Callable[[LaneTokens], None]


async def has_switched(qemu: QmpMachine) -> bool:
    """Whether this QEMU has the devices' state, so that the VM could run in it."""
    status = (await qemu.migration_status()).status
    return status in SWITCHED and await qemu.run_state() != "inmigrate"


@dataclass
class Arrival:
    """One VM's way in by postcopy. `lanes`: how many a joining needs."""

    job: Job
    handover: Handover
    qemu: QmpMachine
    directory: Path
    lanes: int
    enclave: EnclaveProcess
    rejoining: "asyncio.Queue[Half]" = field(default_factory=lambda: asyncio.Queue(1))
    digest: str | None = None
    _joined: int = 0
    _attaching: Attaching | None = None

    async def take(self, ticket: messages.PostcopyTicket, expected_epoch: int) -> None:
        """Hold the ticket, wait for QEMU's switch, run the VM. Raises where QEMU does not switch; the VM never ran then."""
        vm = self.job.migration.vm
        if (ticket.vm, ticket.epoch) != (vm, expected_epoch) or ticket.epoch <= self.job.store.epoch(vm):
            raise ControlError("handover.refused", "the ticket is for another VM or epoch")
        self.job.update(epoch=ticket.epoch)  # in the snapshot alone: the VM's own epoch moves with the switch
        self._step(Input.TICKET_HELD, detail="the ticket is held; QEMU is to switch")
        self.enclave.call(SendMessage(messages.TicketHeld(epoch=ticket.epoch).model_dump_json()))
        await self._wait_switched()
        await self.run_here()

    async def _wait_switched(self) -> None:
        """Not hurried by what happens to the lanes: a cut that spoils the switch ends QEMU's migration, and tells us so."""
        await self.qemu.wait_migration(SWITCHED, LOADED_TIMEOUT_S)
        try:
            async with asyncio.timeout(LOADED_TIMEOUT_S):
                await self._look_until_switched()
        except TimeoutError:
            raise make_error("migration.qemu-failed", "QEMU did not come through the switch to postcopy") from None

    async def _look_until_switched(self) -> None:
        while not await has_switched(self.qemu):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(_SWITCH_LOOK_S)

    async def came_through(self, reason: SealaneError) -> bool:
        """Whether QEMU has switched, for good: where it has not, its lanes are ended for `reason`, lest it does after the look.

        Raises `vm.unreachable` where QEMU is gone.
        """
        if await has_switched(self.qemu):
            return True
        self.enclave.abort(for_peer(reason))
        await uninterrupted(self.enclave.reap())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                await self._look_until_switched()  # what the lanes had brought is still loaded
                return True
        return False

    async def run_here(self) -> None:
        """QEMU has switched: the VM is ours."""
        epoch = self.job.migration.epoch
        assert epoch is not None  # noqa: S101 - journalled with the ticket
        self._hold_lanes()
        await self._lend_monitor()
        self._step(Input.SWITCHED, epoch=epoch, runs_at="destination", detail="resuming the VM")
        if not await self._runs_here():
            return
        resumed = time.monotonic()
        self.job.update(detail="the VM runs here; the rest of its memory comes in")
        since = (time.monotonic() - resumed) * 1e3
        receipt = messages.Receipt(vm=self.job.migration.vm, epoch=epoch, since_resume_ms=since)
        with contextlib.suppress(SealaneError):  # a lane that was cut is `see_through`'s to notice
            self.enclave.call(SendMessage(receipt.model_dump_json()))

    def _hold_lanes(self) -> None:
        """From now on the lanes hold also where this agent ends: what is left of the memory needs nobody's word.

        Before the VM runs: at a page that does not come QEMU's main thread itself may stand still, and a QEMU that stands still
        greets no later agent.
        """
        with contextlib.suppress(SealaneError):  # lanes that are gone hold nothing
            self.enclave.call(Outlive())

    async def _lend_monitor(self) -> None:
        """Should both the lanes and this agent go, a QEMU that stands still answers the next agent on this connection alone."""
        try:
            await self.qemu.lend()
        except SealaneError as error:
            self.job.log.warning("QEMU does not keep its monitor's connection", code=error.code, detail=error.detail)

    async def _end_loan(self) -> None:
        """All of the memory is here: QEMU greets any agent again."""
        try:
            await self.qemu.end_loan()
        except SealaneError as error:
            self.job.log.warning("QEMU keeps its monitor's connection", code=error.code, detail=error.detail)

    async def _runs_here(self) -> bool:
        """Let the VM run. Where that cannot be seen it may run, and its QEMU wait for a page: the half is kept all the same."""
        try:
            return await self._let_run()
        except SealaneError as error:
            if self.qemu.is_closed:
                raise
            self.job.log.warning("QEMU does not say that the VM runs", code=error.code, detail=error.detail)
            return False

    async def _let_run(self) -> bool:
        """Let the VM run, if it does not yet; False where the lanes are gone, and the halves must be joined first.

        Without lanes a VM that begins to run meets a page that is not here. QEMU's main thread may be what waits for it, and
        then answers nothing until the halves are joined; a QEMU whose monitor is opened anew meanwhile, not even then.
        """
        if await self.qemu.run_state() == "running":
            return True
        if self.enclave.failed.done():
            return False
        resuming = asyncio.ensure_future(self._resume())
        resuming.add_done_callback(lambda done: done.cancelled() or done.exception())
        either: set[asyncio.Future[Any]] = {resuming, self.enclave.failed}
        await uninterrupted(asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED))
        if not resuming.done():
            return False
        resuming.result()
        return True

    async def _resume(self) -> None:
        """QEMU may stand still at a page between the two, and then answers neither."""
        await self.qemu.resume()
        if await self.qemu.run_state() != "running":
            raise make_error("vm.not-running", "QEMU did not resume the VM")

    async def see_through(self, *, parted: bool = False) -> None:
        """Take pages until all are here, joining again after each cut for as long as the source comes back."""
        left_alone = parted  # lanes that held while no agent was here may have brought all
        while True:
            try:
                if parted:
                    half = await self.rejoining.get()
                    self.enclave = half.enclave
                    if left_alone and await self._has_all():
                        break
                    left_alone = False
                    await self._join(half)
                await self._take_pages()
                break
            except SealaneError as error:
                if await self._has_all():
                    await self._turn_to_who_came_back(error)
                    break
                await self._part(error)
                parted = True
            finally:
                if self._attaching is not None:
                    self._attaching.cancel()
        if await self.qemu.run_state() != "running":  # all came before it was let run, and then a cut
            await uninterrupted(self.qemu.resume())
        await uninterrupted(self._end_loan())

    async def _turn_to_who_came_back(self, error: SealaneError) -> None:
        """A source that has come back meanwhile listens on its new channel alone."""
        if not self.rejoining.empty():
            self.enclave.abort(error)
            await uninterrupted(self.enclave.reap())
            self.enclave = self.rejoining.get_nowait().enclave

    async def _has_all(self) -> bool:
        """Whether the last page came before the lanes went. Where QEMU itself waits for a page, it does not answer: no."""
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                return (await self.qemu.migration_status()).status == "completed"
        except TimeoutError:
            return False

    async def _take_pages(self) -> None:
        waiting = asyncio.ensure_future(self.qemu.wait_migration({"completed", "postcopy-paused"}))
        try:
            while not waiting.done():
                await self.enclave.wait(asyncio.wait({waiting}, timeout=PROGRESS_EVERY_S), None, "enclave.slow", "")
                if not self.rejoining.empty():
                    raise make_error("lane.cut", "the source has come back on a new channel")
                self.job.update(progress=Progress(bytes_wire=self.enclave.counters.wire_bytes))
            if (await waiting).status != "completed":
                raise make_error("lane.cut", "QEMU lost its lane")
        finally:
            waiting.cancel()
        closed = await self.enclave.wait(self.enclave.lanes_closed, LOADED_TIMEOUT_S, "peer.slow", "close of the lanes")
        self.digest = None if self._joined else closed.digest

    def say_arrived(self) -> None:
        """Tell the source that its half is needed no more."""
        epoch = self.job.migration.epoch
        assert epoch is not None  # noqa: S101 - journalled with the ticket
        self.handover.step(Input.ARRIVED)
        with contextlib.suppress(SealaneError):  # a source that does not hear it asks
            self.enclave.call(SendMessage(messages.Arrived(epoch=epoch, digest=self.digest).model_dump_json()))

    # ---- after a cut

    async def _part(self, error: SealaneError) -> None:
        self.job.log.warning("postcopy was cut", code=error.code, detail=error.detail)
        self.enclave.abort(error)
        await uninterrupted(self.enclave.reap())
        self.handover.step(Input.FAILED)
        detail = f"cut, the guest may stand still; the source joins the halves again: {error.detail}"
        changes: dict[str, Any] = {"state": self.handover.state.value, "detail": detail, "problem": problem_of(error)}
        try:
            self.job.journal(**changes)
        except SealaneError as full:  # recovery does the same in both states of a postcopy
            self.job.log.error("the cut was not journalled", code=full.code, detail=full.detail)
            self.job.update(**changes)

    async def _join(self, half: Half) -> None:
        """Let QEMU listen anew, and take the other half's lanes."""
        enclave = half.enclave
        self._joined += 1
        path = self.directory / f"again-{self._joined}.sock"
        await self.qemu.recover_incoming(f"unix:{path}")
        self._attaching = Attaching(enclave, path, preempt=self.lanes - 1 or None)
        enclave.call(ExpectLanes(self.lanes))
        half.expect_lanes(await enclave.wait(enclave.lane_tokens, QMP_TIMEOUT_S, "enclave.slow", "tokens of lanes"))
        enclave.call(SendMessage(messages.Rejoined(lanes=self.lanes).model_dump_json()))
        await enclave.wait(enclave.lanes_open, LANE_OPEN_TIMEOUT_S, "peer.slow", "lanes")
        waiting = self.qemu.wait_migration({"postcopy-active", "completed"}, LOADED_TIMEOUT_S)
        await enclave.wait(waiting, None, "enclave.slow", "")
        self._hold_lanes()
        self._step(Input.REJOINED, detail="joined again; the rest of the VM's memory comes in", problem=None)
        await self._let_run()

    def _step(self, happened: Input, *, epoch: int | None = None, **changes: Any) -> None:
        """Journal the state that follows, durably, then be in it."""
        self.job.journal(state=self.handover.after(happened).value, epoch=epoch, **changes)
        self.handover.step(happened)
