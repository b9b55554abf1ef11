"""The destination's side: meet a source, prepare what it wants to send, receive it, take it over.

    (reception)      enclave up, the peer is known, it says which VM it wants to send
    preparing        this host knows the VM, it is not here, it fits; its QEMU is launched, compared, and listens
    copying          lanes open; QEMU is dialled when a lane's first bytes come
    switching-over   QEMU has loaded everything and is paused; the lanes' digest goes to the source
    handing-over     the ticket is journalled: the VM is ours, and is resumed

Up to the journalling of the ticket every failure destroys what was launched here. Where the source switches to postcopy, it is
`postcopy_destination` that takes the VM over.
"""

import asyncio
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sealane.enclave.interface import (
    AttachVtpm,
    ExpectLanes,
    LaneTokens,
    PeerEstablished,
    PeerSeen,
    SendMessage,
)
from sealane.errors import ControlError, InternalError, SealaneError, for_peer, make_error
from sealane.host.job import Job
from sealane.host.migration import messages, settings
from sealane.host.migration.attaching import Attaching
from sealane.host.migration.checks import (
    available_memory_bytes,
    check_free_memory,
    check_postcopy,
    check_same_machine,
    choose_multifd_channels,
    choose_preempt,
)
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.dialling import SocketDirectory
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.gate import StandingGate, facts_of, pass_gate
from sealane.host.migration.postcopy_destination import Arrival, Half
from sealane.host.migration.receipt_exchange import give_copy, take_copy
from sealane.host.migration.stall import StallLimit
from sealane.host.migration.vtpm_steps import (
    launch_with_tpm,
    ticket_for_whole_tpm,
    vtpm_abandoned,
    vtpm_taken,
)
from sealane.host.models import Migration, Progress, Result, VmDefinition
from sealane.host.problems import problem_of
from sealane.host.quoting import check_launched, incoming_binaries
from sealane.host.registry import PROBE_TIMEOUT_S, is_absent
from sealane.hypervisor.driver import MigrationParameters
from sealane.hypervisor.launch import destroy, last_words, launch_incoming
from sealane.hypervisor.process import LaunchedMachine
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import (
    CHANNEL_ANSWER_TIMEOUT_S,
    LANE_OPEN_TIMEOUT_S,
    LOADED_TIMEOUT_S,
    QMP_TIMEOUT_S,
)
from sealane.seal.protect import readable_words
from sealane.session.handover import IN_POSTCOPY, Handover, Input, Role, State

PROGRESS_EVERY_S: Final = 0.5
_GOODBYE_WAIT_S: Final = 5.0
# An enclave that closed the lanes says at once why; the source waits longer for our word than we for its.
_REASON_WAIT_S: Final = 0.7


def channel_facts(met: PeerEstablished | PeerSeen) -> dict[str, Any]:
    """What the migration's snapshot says of the channel, of who is at its other end, and of the lanes."""
    return {**facts_of(met), "protection": met.protection, "readable": readable_words(met.protection)}


class DestinationMigration(Job):
    """One VM comes to this host; `expect_lanes` is told which lanes are to be let in, and by which tokens."""

    def __init__(
        self,
        context: MigrationContext,
        expect_lanes: Callable[[LaneTokens], None],
        enclave: EnclaveProcess,
        met: PeerEstablished,
        prepare: messages.Prepare,
        vm: VmDefinition,
        migration: Migration,
    ) -> None:
        super().__init__(context.store, migration.model_copy(update=channel_facts(met)))
        self._context, self._expect_lanes, self._enclave = context, expect_lanes, enclave
        self._met, self._prepare, self._vm = met, prepare, vm
        self._handover = Handover(Role.DESTINATION)
        self._launched: LaunchedMachine | None = None
        self._log_path = context.paths.state / "log" / f"{vm.name}.log"
        self._loaded_told = False
        self._vtpm_begun = False
        self._resumed = False
        self._attaching: set[asyncio.Task[None]] = set()
        self._main_attached = asyncio.Event()
        self._dialling: Attaching | None = None
        self._arrival: Arrival | None = None
        self._preempt = False
        self._begun = time.monotonic()

    async def run(self) -> None:
        """Carry the migration out; ends in completed or aborted whatever happens."""
        try:
            with SocketDirectory(self._context.paths.run) as directory:
                try:
                    await self._receive(directory)
                except BaseException as error:
                    await uninterrupted(self._give_up(error))
        finally:
            if self._dialling is not None:
                self._dialling.cancel()
            await uninterrupted(self._enclave.reap())

    async def _receive(self, directory: Path) -> None:
        gate = StandingGate(self, self._context, self._enclave, self._vm, "receive")
        await pass_gate(self, self._context, self._met, self._vm, "receive")
        await self._launch(directory)
        async with QmpMachine.connect(self._vm.qmp, self._context.settings.limits.qmp_timeout_s) as qemu:
            path = directory / "in.sock"
            channels = await self._make_ready(qemu, path)
            await self._open_lanes(path, channels)
            self._step(Input.PREPARED, detail="the VM's memory comes in", multifd_channels=channels)
            ticket_or_digest = await self._load_or_switch(qemu)
            self._loaded_told = True  # from here on only our word brings the VM back to the source
            if isinstance(ticket_or_digest, messages.PostcopyTicket):
                await gate.settled()
                await self._arrive_by_postcopy(qemu, ticket_or_digest, directory)
                return
            digest = ticket_or_digest
            self._enclave.call(SendMessage(messages.Loaded(digest=digest).model_dump_json()))
            # journalled while the word travels: up to the ticket, copying and switching-over recover alike
            self._step(Input.VM_STOPPED, detail="everything came and is loaded, paused")
            ticket = await ticket_for_whole_tpm(
                self._context,
                self._vm,
                self._enclave.expect(messages.Ticket, self._context.settings.limits.word_timeout_s),
            )
            self._check_ticket(ticket, digest)
            await gate.settled()
            await self._take_over(qemu, ticket)

    # ---- preparing

    async def _launch(self, directory: Path) -> None:
        self.update(detail="launching QEMU")
        check_free_memory(self._prepare.memory_bytes, available_memory_bytes())
        if await self._is_here():
            raise ControlError("check.vm-present", f"{self._vm.name} has a QEMU here already")
        assert self._vm.launch_incoming is not None  # noqa: S101 - checked by the reception
        self._vtpm_begun = True
        launch = functools.partial(
            launch_incoming,
            self._vm.launch_incoming,
            self._vm.qmp,
            self._log_path,
            self._context.settings.limits.launch_timeout_s,
            on_started=self._note_launched,
        )
        await self._watch(launch_with_tpm(self, self._context, self._vm, self._prepare, launch))

    def _note_launched(self, launched: LaunchedMachine) -> None:
        self._launched = launched
        self.journal(launched=launched)

    async def _is_here(self) -> bool:
        """Whether a QEMU holds the VM's socket, even one that serves another client, or hangs."""
        try:
            async with QmpMachine.connect(self._vm.qmp, PROBE_TIMEOUT_S):
                return True
        except SealaneError as error:
            return not is_absent(error)

    async def _make_ready(self, qemu: QmpMachine, path: Path) -> int:
        self.description = here = await qemu.describe()
        if here.run_state != "inmigrate":
            raise make_error("launch.failed", f"QEMU is {here.run_state}, and does not wait for a migration")
        if self._vm.launch_incoming and self._context.settings.attestation.drivers != ["software"]:
            check_launched(qemu.pid, incoming_binaries([self._vm.launch_incoming]))
        check_same_machine(self._prepare, here)
        channels = choose_multifd_channels(
            self._prepare.multifd_channels, frozenset(self._prepare.capabilities), here.capabilities
        )
        if (link := await self._context.vtpms.link(self._vm)) is not None:
            self._enclave.call(AttachVtpm(), link)
        if self._prepare.postcopy:
            has_vtpm = self._prepare.vtpm is not None or self._vm.vtpm is not None
            check_postcopy(here, channels, has_vtpm=has_vtpm, protection=self.migration.protection)
            self._preempt = choose_preempt(frozenset(self._prepare.capabilities), here.capabilities)
        parameters = MigrationParameters(
            multifd_channels=channels, postcopy=self._prepare.postcopy, postcopy_preempt=self._preempt
        )
        await settings.configure(self, qemu, parameters, incoming=True)
        await qemu.migrate_incoming(f"unix:{path}")
        return channels

    async def _open_lanes(self, path: Path, channels: int) -> None:
        self._dialling = Attaching(self._enclave, path, preempt=channels + 1 if self._preempt else None)
        self._enclave.call(ExpectLanes(1 + channels + self._preempt))
        tokens = self._enclave.lane_tokens
        self._expect_lanes(await self._enclave.wait(tokens, QMP_TIMEOUT_S, "enclave.slow", "tokens of lanes"))
        prepared = messages.Prepared(multifd_channels=channels, preempt=self._preempt)
        self._enclave.call(SendMessage(prepared.model_dump_json()))
        await self._enclave.wait(
            self._enclave.lanes_open, CHANNEL_ANSWER_TIMEOUT_S + LANE_OPEN_TIMEOUT_S, "peer.slow", "lanes"
        )

    # ---- receiving

    async def _load_or_switch(self, qemu: QmpMachine) -> str | messages.PostcopyTicket:
        """Wait until QEMU has loaded everything, or the source wants to switch to postcopy: the lanes' digest, or the ticket."""
        loading = asyncio.ensure_future(self._load(qemu))
        waiting: set[asyncio.Future[Any]] = {loading}
        if self._prepare.postcopy:
            waiting.add(asyncio.ensure_future(self._enclave.expect(messages.PostcopyTicket, None)))
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            first: str | messages.PostcopyTicket = (loading if loading in done else done.pop()).result()
            return first
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _arrive_by_postcopy(self, qemu: QmpMachine, ticket: messages.PostcopyTicket, directory: Path) -> None:
        self._arrival = arrival = Arrival(self, self._handover, qemu, directory, 1 + self._preempt, self._enclave)
        await arrival.take(ticket, self._prepare.epoch + 1)
        await self._see_in(arrival)

    async def _see_in(self, arrival: Arrival, *, parted: bool = False) -> None:
        try:
            await arrival.see_through(parted=parted)
        finally:
            self._enclave = arrival.enclave
        arrival.say_arrived()
        await self._complete(arrival.qemu, stream_digest=arrival.digest, problem=None)

    @property
    def may_rejoin(self) -> bool:
        """Whether the VM's memory is in two halves, so that the source may come back on a new channel."""
        return self._handover.state in IN_POSTCOPY

    def rejoin(self, met: PeerEstablished, wish: messages.Rejoin, half: Half) -> None:
        """The source came back; raises `migration.unknown` where it is another peer, VM or epoch, or postcopy is over."""
        mine = (self._met.peer_fingerprint, self._vm.name, self.migration.epoch)
        if self._arrival is None or not self.may_rejoin or (met.peer_fingerprint, wish.vm, wish.epoch) != mine:
            raise make_error("migration.unknown", "no postcopy of that VM waits here")
        try:
            self._arrival.rejoining.put_nowait(half)
        except asyncio.QueueFull:
            raise make_error("vm.busy", "the halves are being joined already") from None

    async def _load(self, qemu: QmpMachine) -> str:
        """Wait until QEMU has loaded everything and both ends have closed every lane; returns the lanes' digest."""
        waiting = asyncio.ensure_future(qemu.wait_migration({"completed"}))
        stall = StallLimit(self._context.settings.limits.stall_timeout_s)
        try:
            while not waiting.done():
                await self._watch(asyncio.wait({waiting}, timeout=PROGRESS_EVERY_S))
                stall.look(self._enclave.counters.wire_bytes)
                self.update(progress=Progress(bytes_wire=self._enclave.counters.wire_bytes))
            await waiting
        finally:
            waiting.cancel()
        enclave = self._enclave
        closed = await enclave.wait(enclave.lanes_closed, LOADED_TIMEOUT_S, "peer.slow", "close of the lanes")
        state = await qemu.run_state()
        if state == "running":
            raise InternalError("internal.error", "QEMU resumed the VM by itself")
        return closed.digest

    # ---- the hand-over

    def _check_ticket(self, ticket: messages.Ticket, digest: str) -> None:
        expected = (self._vm.name, self._prepare.epoch + 1, digest)
        if (ticket.vm, ticket.epoch, ticket.digest) != expected:
            raise ControlError("handover.digest", "the ticket is for another VM, epoch or stream")
        if ticket.epoch <= self.store.epoch(self._vm.name):
            raise ControlError("handover.refused", f"epoch {ticket.epoch} of {self._vm.name} was here already")

    async def _take_over(self, qemu: QmpMachine, ticket: messages.Ticket) -> None:
        self._step(
            Input.TICKET_JOURNALLED,
            epoch=ticket.epoch,
            runs_at="destination",
            detail="resuming the VM",
            stream_digest=ticket.digest,
        )
        await uninterrupted(qemu.resume())
        self._resumed = True
        resumed = time.monotonic()
        if await qemu.run_state() != "running":
            raise make_error("vm.not-running", "QEMU did not resume the VM")
        since = (time.monotonic() - resumed) * 1e3
        receipt = messages.Receipt(vm=ticket.vm, epoch=ticket.epoch, since_resume_ms=since)
        self._enclave.call(SendMessage(receipt.model_dump_json()))
        self._handover.step(Input.RECEIPT)
        await vtpm_taken(self, self._context, self._vm, ticket)
        await self._complete(qemu)

    async def _complete(self, qemu: QmpMachine, **facts: Any) -> None:
        result = Result(
            total_ms=(time.monotonic() - self._begun) * 1e3,
            bytes_wire=self._enclave.counters.wire_bytes,
            **self._enclave.costs(),
        )
        self.end(state="completed", runs_at="destination", detail="", result=result, **facts)
        await settings.restore_after(self, qemu)
        give_copy(self, self._enclave, self._context.receipts)
        await take_copy(self, self._enclave, self._context.receipts)
        last_words: set[asyncio.Future[Any]] = {self._enclave.finished, self._enclave.failed}
        await asyncio.wait(last_words, timeout=_GOODBYE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        self._enclave.finish()

    # ---- when it does not go on

    async def _give_up(self, error: BaseException) -> None:
        if self.ended.is_set():
            self._enclave.finish()
            return
        reason = await self._better_reason(self._as_sealane_error(error))
        if not isinstance(error, (SealaneError, asyncio.CancelledError)):
            self.log.error("unexpected error", exc_info=error)
        if self._handover.state in IN_POSTCOPY or await self._has_switched(reason):
            if self._handover.state is State.POSTCOPY and isinstance(error, asyncio.CancelledError):
                self._leave_lanes()
            else:
                self._leave_half(reason)
            return
        if self._handover.may_resume_here:
            await self._refuse_or_keep(reason)
            return
        try:
            if self._loaded_told:  # the source may have given the VM up already: only our word brings it back there
                await self._refuse(reason)
            else:
                self._enclave.abort(for_peer(reason))
                await self._destroy()
        except SealaneError as stuck:
            self._enclave.abort(for_peer(reason))
            detail = f"what was launched here is still there: {stuck.detail}"
            self.leave(state="aborted", runs_at="source", problem=problem_of(reason), detail=detail)
        else:
            self.end(state="aborted", runs_at="source", problem=problem_of(reason))

    async def _has_switched(self, reason: SealaneError) -> bool:
        """Whether a postcopy ticket is held and QEMU has switched, though that could not be journalled."""
        if self._arrival is None or self._handover.state is not State.SWITCHING_OVER:
            return False
        try:
            return await self._arrival.came_through(reason)
        except SealaneError:
            return False

    def _leave_lanes(self) -> None:
        """This agent stops, which nothing of a postcopy waits for: the enclave outlives it, and the next agent goes on."""
        stopping = make_error("agent.stopping")
        if self._enclave.failed.done():
            self._leave_half(stopping)
            return
        self._enclave.leave()
        detail = f"the rest of {self._vm.name}'s memory comes in without this agent"
        self.leave(state=self._handover.state.value, runs_at="destination", problem=problem_of(stopping), detail=detail)

    def _leave_half(self, reason: SealaneError) -> None:
        """This half of the VM's memory is kept, and so is the VM that runs on it: recovery goes on from here."""
        self._enclave.abort(for_peer(reason))
        if self._handover.state is State.POSTCOPY:
            self._handover.step(Input.FAILED)
        detail = f"a part of {self._vm.name}'s memory is still at {self.migration.peer}: {reason.detail}"
        self.leave(state=self._handover.state.value, runs_at="destination", problem=problem_of(reason), detail=detail)

    async def _refuse_or_keep(self, reason: SealaneError) -> None:
        """The ticket is ours. A copy that runs stays, whoever else failed; one that never ran may be given back."""
        if self._resumed or await self._runs():
            self._handover.step(Input.FAILED)
            self._enclave.finish()
            self.end(state="completed", runs_at="destination", problem=problem_of(reason))
            return
        try:
            await self._refuse(reason)
        except (SealaneError, OSError) as stuck:  # a copy that cannot be destroyed must not be called given back
            self._handover.step(Input.FAILED)
            self._enclave.finish()
            problem = stuck if isinstance(stuck, SealaneError) else reason
            self.end(state="completed", runs_at="in-doubt", problem=problem_of(problem))
            return
        self._handover.step(Input.REFUSED)
        self.end(state="aborted", runs_at="source", problem=problem_of(reason))

    async def _runs(self) -> bool:
        try:
            async with QmpMachine.connect(self._vm.qmp) as qemu:
                return await qemu.run_state() == "running"
        except SealaneError:
            return False

    async def _refuse(self, reason: SealaneError) -> None:
        """Destroy the copy, which never ran, and then say so to the source."""
        await self._destroy()
        refusal = messages.TicketRefused(code=reason.code, detail=for_peer(reason).detail[:1000])
        try:
            self._enclave.call(SendMessage(refusal.model_dump_json()))
        except SealaneError as lost:
            self.log.error("the refusal did not leave", code=lost.code)
        self._enclave.finish()

    async def _better_reason(self, reason: SealaneError) -> SealaneError:
        """QEMU only says that its stream ended; the enclave, or the peer through it, knows why."""
        if reason.code not in {"migration.qemu-failed", "vm.unreachable", "vm.qmp"}:
            return reason
        await asyncio.wait({self._enclave.failed}, timeout=_REASON_WAIT_S)
        if self._enclave.failed.done():
            return self._enclave.failed.result()
        if reason.code == "vm.unreachable" and self._launched is not None:
            return make_error(
                "migration.destination-died", f"QEMU ended in mid-stream; {last_words(self._log_path, 2)}"
            )
        return reason

    async def _destroy(self) -> None:
        if self._launched is not None:
            await destroy(self._launched.pid, self._launched.start_time_ticks, qmp_path=self._vm.qmp)
        if self._vtpm_begun:
            await vtpm_abandoned(self, self._context, self._vm)

    # ---- small things

    def _step(self, happened: Input, *, epoch: int | None = None, **changes: Any) -> None:
        """Journal the state that follows, durably, then be in it."""
        self.journal(state=self._handover.after(happened).value, epoch=epoch, **changes)
        self._handover.step(happened)

    async def _watch(self, awaitable: Any) -> Any:
        return await self._enclave.wait(awaitable, None, "enclave.slow", "")

    def _as_sealane_error(self, error: BaseException) -> SealaneError:
        if isinstance(error, SealaneError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return make_error(self.cancel_code)
        return InternalError("internal.error", f"{type(error).__name__}: {error}")
