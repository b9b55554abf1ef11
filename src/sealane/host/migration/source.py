"""The source's job: check, open the lanes, let QEMU copy, hand over.

    preparing        QEMU described, enclave up, peer known, destination's VM launched and compared, lanes open
    copying          QEMU sends; the VM runs
    switching-over   QEMU has paused the VM; the hook is asked; the rest goes over; the destination has loaded it
    handing-over     `released` is journalled: the VM is no longer ours; ticket out, receipt in

Up to the journalling of `released` every failure ends with the VM running here; after it, only the destination's word
that its copy is destroyed brings the VM back. By postcopy it is `postcopy_source` that gives the VM up and sees it through.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from sealane.enclave.interface import AttachVtpm, OpenLanes, SendMessage
from sealane.errors import (
    ControlError,
    InDoubtError,
    InternalError,
    PeerError,
    SealaneError,
    for_peer,
    make_error,
    printable,
)
from sealane.host.job import Job
from sealane.host.migration import messages, progress, settings
from sealane.host.migration.beginning import Beginning
from sealane.host.migration.checks import check_idle, check_postcopy, check_source
from sealane.host.migration.clockwork import Clockwork, moment_of
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.convergence import Convergence, Outlook, words_of
from sealane.host.migration.dialling import (
    SocketDirectory,
    all_or_none,
    close_unused,
    dial_peer,
    give_up_when_unanswered,
    listen_for_vm,
)
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.gate import StandingGate, facts_of, pass_gate
from sealane.host.migration.hook import ask_hook
from sealane.host.migration.monitoring import GuestMonitoring
from sealane.host.migration.postcopy_source import Departure
from sealane.host.migration.receipt_exchange import give_copy, take_copy
from sealane.host.migration.stall import StallLimit
from sealane.host.migration.taking_back import take_back
from sealane.host.migration.vtpm_steps import vtpm_left, vtpm_stays
from sealane.host.models import Migration, MigrationRequest, NotSent, Peer, RunsAt, VmDefinition
from sealane.host.problems import problem_of
from sealane.host.registry import is_absent
from sealane.hypervisor.driver import MigrationParameters, MigrationStatus, VmDescription
from sealane.hypervisor.qmp import QmpMachine
from sealane.hypervisor.qmp_connection import EventStream
from sealane.limits import (
    CHANNEL_ANSWER_TIMEOUT_S,
    DEFAULT_PORT,
    HANDSHAKE_TIMEOUT_S,
    LANE_OPEN_TIMEOUT_S,
    LAUNCH_TIMEOUT_S,
    LOADED_TIMEOUT_S,
)
from sealane.session.handover import IN_POSTCOPY, Handover, Input, Role, State

T = TypeVar("T")
PROGRESS_EVERY_S: Final = 0.25
# How long the enclave or the peer may take to say why QEMU's migration failed.
_REASON_WAIT_S: Final = 2.5
# What the journal says of a VM that was given up and is let run here again.
TAKING_BACK: Final = "taking the VM back"


class SourceMigration(Job):
    """One VM leaves this host."""

    def __init__(
        self,
        context: MigrationContext,
        request: MigrationRequest,
        vm: VmDefinition,
        peer: Peer,
        migration: Migration,
    ) -> None:
        super().__init__(context.store, migration)
        self._context, self._request, self._vm, self._peer = context, request, vm, peer
        self._handover = Handover(Role.SOURCE)
        self._times = Clockwork()
        self._enclave: EnclaveProcess | None = None
        self._gate: StandingGate | None = None
        self._qemu: QmpMachine | None = None
        self._events: EventStream | None = None
        self._ran_before = False
        self._convergence = Convergence(None if request.on_stall == "wait" else request.give_up_after_s)
        self._monitoring = GuestMonitoring(migration.protection, self.log)
        self._by_postcopy = False
        self._rate = 0
        self._disk_figures: dict[str, Any] = {}  # Progress's, where libvirt copies disks
        self._wire_bytes_before = 0

    async def run(self) -> None:
        """Carry the migration out; ends in completed, aborted or in-doubt whatever happens."""
        self._times = Clockwork()  # its time in the queue is told apart from what it takes
        try:
            with SocketDirectory(self._context.paths.run) as directory:
                async with self._open() as self._qemu:
                    self._events = self._qemu.events()
                    try:
                        await self._migrate(self._qemu, directory)
                    except BaseException as error:
                        await uninterrupted(self._give_up(error))
        except SealaneError as error:
            raise self._where_it_went(error) from error.__cause__
        finally:
            self._context.rates.leave(self.id)
            if self._enclave is not None:
                await uninterrupted(self._enclave.reap())

    def _open(self) -> contextlib.AbstractAsyncContextManager[QmpMachine]:
        """The VM's QEMU."""
        return QmpMachine.connect(self._vm.qmp, self._context.settings.limits.qmp_timeout_s)

    def _where_it_went(self, error: SealaneError) -> SealaneError:
        """Nothing of the VM is here: the journal may know why."""
        if error.code != "vm.unreachable" or not is_absent(error):
            return error
        last = next((each for each in self.store.migrations(vm=self._vm.name) if each.state == "completed"), None)
        if last is None or last.role != "source":
            return error
        words = f"{self._vm.name} went to {last.peer} in migration {last.number}, and nothing of it is here"
        return make_error(error.code, words, mend=f"ask the agent of {last.peer} to move it")

    # ---- the way there

    async def _migrate(self, qemu: QmpMachine, directory: Path) -> None:
        vm = await self._look(qemu)
        enclave = await self._meet(qemu)
        await self._monitoring.start(qemu, enclave)
        prepared = await self._prepare(enclave, vm)
        self._rate = self._share
        await settings.configure(
            self,
            qemu,
            MigrationParameters(
                multifd_channels=prepared.multifd_channels,
                max_bandwidth_bytes_per_s=self._rate,
                downtime_limit_ms=self._request.downtime_limit_ms,
                throttle_max_percent=(
                    self._request.throttle_max_percent if self._request.on_stall == "auto-converge" else None
                ),
                postcopy=self._may_postcopy,
                postcopy_preempt=prepared.preempt,
            ),
            incoming=False,
        )
        if (link := await self._context.vtpms.link(self._vm)) is not None:
            enclave.call(AttachVtpm(), link)
        path = directory / "out.sock"
        await self._open_lanes(enclave, path, 1 + prepared.multifd_channels + prepared.preempt)
        await self._monitoring.first_look()
        self._step(Input.PREPARED, detail="the VM's memory goes over", multifd_channels=prepared.multifd_channels)
        self._times.copy_started = time.monotonic()
        await self._watch(qemu.migrate(f"unix:{path}"))
        await self._copy(qemu)
        await self._switch_over(qemu)
        if self._by_postcopy:
            departure = self._departure(qemu, directory)
            await self._pass_standing_gate()
            await departure.switch(enclave)
            await self._see_off(qemu, departure, enclave)
            return
        await self._send_rest(qemu)
        if prepared.preempt:
            await close_unused(path)
        loaded = await self._wait_loaded(enclave, qemu)
        await self._hand_over(enclave, qemu, loaded)

    async def _look(self, qemu: QmpMachine) -> VmDescription:
        self.update(detail="looking at the VM")
        vm = self.description = await qemu.describe()
        if vm.run_state != "running":
            raise ControlError("vm.not-running", f"QEMU says that the VM is {vm.run_state}")
        if self._request.copy_storage != "none":
            raise make_error("usage.argument", "disks are copied of domains of libvirt only")
        check_idle(vm)
        self._ran_before = True
        check_source(vm)
        if self._may_postcopy:
            channels, protection = self._request.multifd_channels, self.migration.protection
            check_postcopy(vm, channels, has_vtpm=self._vm.vtpm is not None, protection=protection)
        return vm

    @property
    def _may_postcopy(self) -> bool:
        return self._request.on_stall == "postcopy"

    async def _meet(self, qemu: QmpMachine) -> EnclaveProcess:
        self.update(detail=f"meeting {self._peer.name}")
        self._wire_bytes_before = self._wire_bytes()
        # first: the peer waits but seconds for a preface
        self._enclave = enclave = await self._context.launcher.start_enclave()
        connection = await self._dial(is_channel=True)
        beginning = Beginning(
            role="source",
            migration=self.id,
            trusted={self._peer.fingerprint: self._peer.name} if self._context.peers.is_trusted(self._peer) else {},
            protection=self.migration.protection,
            now=self.clock().isoformat(),
            vm=self._vm.name,
            epoch=self.store.epoch(self._vm.name),
            peer=self._peer.name,
        )
        beginning.begin(self._context, enclave, connection, [f"/proc/{qemu.pid}/exe"] if qemu.pid else [])
        self._gate = StandingGate(self, self._context, enclave, self._vm, "send")
        met = await self._watch(enclave.wait(enclave.established, HANDSHAKE_TIMEOUT_S, "peer.slow", "handshake"))
        self.update(detail=f"{met.peer_name} is who it should be", **facts_of(met))
        await pass_gate(self, self._context, met, self._vm, "send")
        return enclave

    async def _prepare(self, enclave: EnclaveProcess, vm: VmDescription) -> messages.Prepared:
        prepare = messages.Prepare(
            vm=self._vm.name,
            uuid=vm.uuid,
            qemu_version=vm.qemu_version,
            machine_type=vm.machine_type,
            memory_bytes=vm.memory_bytes,
            cpus=vm.cpus,
            capabilities=sorted(vm.capabilities),
            multifd_channels=0 if self._may_postcopy else self._request.multifd_channels,
            epoch=self.store.epoch(self._vm.name),
            vtpm=self._context.vtpms.facts(self._vm),
            domain=None,
            postcopy=self._may_postcopy,
        )
        self.update(vtpm=prepare.vtpm)
        self.update(detail=f"{self._peer.name} prepares")
        enclave.call(SendMessage(prepare.model_dump_json()))
        launch_s = max(LAUNCH_TIMEOUT_S, self._context.settings.limits.launch_timeout_s)
        limit = launch_s + CHANNEL_ANSWER_TIMEOUT_S
        return await self._watch(enclave.expect(messages.Prepared, limit))

    async def _open_lanes(self, enclave: EnclaveProcess, path: Path, count: int, *, attached: int = 0) -> None:
        """So many lanes in all; the last `attached` are not dialled at `path`, but attached afterwards."""
        listener = listen_for_vm(path, count)
        try:
            connections = await all_or_none([self._dial() for _ in range(count)])
        except BaseException:
            listener.close()
            raise
        enclave.call(OpenLanes(reduce=self._request.reduce, attached=attached), listener, *connections)
        await self._watch(enclave.wait(enclave.lanes_open, LANE_OPEN_TIMEOUT_S, "peer.slow", "answer on the lanes"))

    async def _dial(self, *, is_channel: bool = False) -> socket.socket:
        if self._peer.address is None:
            raise ControlError("trust.no-address", f"{self._peer.name} has no address")
        port = self._peer.port or DEFAULT_PORT
        connection = await dial_peer(self._peer.address, port, self._context.settings.congestion_control)
        if is_channel:
            give_up_when_unanswered(connection)
        return connection

    # ---- while QEMU copies

    async def _copy(self, qemu: QmpMachine) -> None:
        """Follow QEMU until it has paused the VM for the switch-over, telling the progress."""
        waiting = asyncio.ensure_future(qemu.wait_migration({"pre-switchover"}))
        stall = StallLimit(self._context.settings.limits.stall_timeout_s)
        try:
            while not waiting.done():
                await self._watch(asyncio.wait({waiting}, timeout=PROGRESS_EVERY_S))
                if not waiting.done():
                    stall.look(self._wire_bytes())
                    await self._tell_progress(qemu)
            await self._watch(waiting)
        finally:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, SealaneError):
                await waiting

    async def _tell_progress(self, qemu: QmpMachine) -> None:
        await self._keep_to_share(qemu)
        status = await qemu.migration_status()
        await self._monitoring.iteration(status.iteration)
        if self._by_postcopy:
            return
        try:
            self._convergence.judge(status, lambda outlook: self._tell_outlook(status, outlook))
        except ControlError as error:
            if not self._may_postcopy or error.code != "migration.no-convergence":
                raise
            await self._start_postcopy(qemu, error)

    async def _keep_to_share(self, qemu: QmpMachine) -> None:
        """The host's total rate is shared anew whenever a copy begins or ends."""
        if (share := self._share) != self._rate:
            await qemu.set_bandwidth(share)
            self._rate = share

    @property
    def _share(self) -> int:
        return self._context.rates.share_of(self.id, self._request.max_bandwidth_bytes_per_s or 0)

    async def _start_postcopy(self, qemu: QmpMachine, why: SealaneError) -> None:
        """From here on as any switch-over: the VM is paused, and comes back here whatever fails before the VM is given up."""
        self._by_postcopy = True
        self.log.info("postcopy", reason=why.detail)
        self._step(
            Input.VM_STOPPED, detail=f"on to postcopy: {why.detail}"
        )  # who finds the VM paused must know by whom
        await qemu.start_postcopy()

    def _tell_outlook(self, status: MigrationStatus, outlook: Outlook) -> None:
        self._say_whether_it_converges(status, outlook)
        self.update(
            progress=progress.of_copy(
                status,
                outlook,
                bytes_wire=self._wire_bytes(),
                not_sent=self._enclave.not_sent if self._enclave is not None else NotSent(),
                rate_limit=self._rate,
                **self._disk_figures,
            )
        )

    def _say_whether_it_converges(self, status: MigrationStatus, outlook: Outlook) -> None:
        """Tell it once each time it changes: the log and those who follow want to know, not every quarter of a second."""
        if outlook.converges is None or outlook.converges == self._migration.progress.converges:
            return
        if not outlook.converges:
            self.log.warning("no end of the copy is in sight", reason=words_of(status))
            self.update(detail=f"no end in sight: {words_of(status)}")
        elif self._migration.progress.converges is not None:
            self.update(detail="the VM's memory goes over")

    async def _switch_over(self, qemu: QmpMachine) -> None:
        self._times.vm_stopped = moment_of("STOP", self._events.taken() if self._events is not None else [])
        if not self._by_postcopy:
            state = self._handover.step(Input.VM_STOPPED)
            self.update(state=state.value, detail="the VM is paused, the rest goes over")
        if self._request.switchover_hook:
            await self._watch(ask_hook(self._request.switchover_hook))
        await self._monitoring.switch_over()

    async def _send_rest(self, qemu: QmpMachine) -> None:
        await self._watch(qemu.migrate_continue())
        self.journal()  # while QEMU sends: up to `released`, copying and switching-over recover alike
        await self._watch(qemu.wait_migration({"completed"}, LOADED_TIMEOUT_S))

    async def _wait_loaded(self, enclave: EnclaveProcess, qemu: QmpMachine) -> messages.Loaded:
        closed = await self._watch(
            enclave.wait(enclave.lanes_closed, LOADED_TIMEOUT_S, "peer.slow", "close of the lanes")
        )
        loaded = await self._watch(enclave.expect(messages.Loaded, self._context.settings.limits.word_timeout_s))
        if loaded.digest != closed.digest:
            raise ControlError("handover.digest")
        return loaded

    # ---- the hand-over

    async def _hand_over(self, enclave: EnclaveProcess, qemu: QmpMachine, loaded: messages.Loaded) -> None:
        await self._pass_standing_gate()
        if enclave.failed.done():  # known before anything is given up
            raise enclave.failed.result()
        epoch = self.store.epoch(self._vm.name) + 1
        vtpm = self._context.vtpms.facts(self._vm)
        self._step(Input.RELEASED, epoch=epoch, detail="handing over", stream_digest=loaded.digest, vtpm=vtpm)
        ticket = messages.Ticket(vm=self._vm.name, epoch=epoch, digest=loaded.digest, vtpm=self.migration.vtpm)
        self._send_ticket(enclave, ticket)
        answer = await enclave.next_message(LOADED_TIMEOUT_S, "receipt from the peer")
        self._times.receipt = time.monotonic()
        if isinstance(answer, messages.TicketRefused):
            self._handover.step(Input.REFUSED)
            raise make_error("handover.refused", f"{printable(answer.code)}: {printable(answer.detail)}")
        if not isinstance(answer, messages.Receipt) or (answer.vm, answer.epoch) != (self._vm.name, epoch):
            raise PeerError("peer.message", "something else came instead of the receipt")
        self._handover.step(Input.RECEIPT)
        await self._complete(enclave, qemu, answer)

    async def _complete(
        self, enclave: EnclaveProcess, qemu: QmpMachine, receipt: messages.Receipt | None, **facts: Any
    ) -> None:
        """The VM is away for good: write it down, end the copy here, exchange receipts."""
        done: dict[str, Any] = {
            "state": "completed",
            "runs_at": "destination",
            "detail": "",
            "result": self._times.result(receipt, self._enclave, self._wire_bytes()),
            **facts,
        }
        try:
            self.journal(**done)
        except SealaneError as error:  # the VM is away all the same; `end` writes it down as soon as it can
            self.log.error("the receipt was not journalled", code=error.code, detail=error.detail)
        try:
            await uninterrupted(qemu.quit())
        except SealaneError as error:
            self.log.warning("the paused copy did not end", code=error.code, detail=error.detail)
        await uninterrupted(vtpm_left(self, self._context, self._vm))
        receipts = self._context.receipts
        self.end(**done, peer_receipt=await uninterrupted(take_copy(self, enclave, receipts)))
        give_copy(self, enclave, receipts)
        enclave.finish()

    async def _pass_standing_gate(self) -> None:
        """Before the VM is given up: what the policy says of a peer that was attested again."""
        if self._gate is not None:
            await self._gate.settled()

    # ---- by postcopy

    def _departure(self, qemu: QmpMachine, directory: Path) -> Departure:
        limits = self._context.settings.limits
        return Departure(
            self,
            self._handover,
            qemu,
            directory,
            meet=lambda: self._meet_again(qemu),
            open_lanes=self._open_lanes,
            tell=lambda: self._tell_postcopy(qemu),
            settle=self._pass_standing_gate,
            word_timeout_s=limits.word_timeout_s,
            stall_timeout_s=limits.stall_timeout_s,
        )

    async def _meet_again(self, qemu: QmpMachine) -> EnclaveProcess:
        """As `_meet`, and nothing is left of a try that failed: there may be many."""
        try:
            # one that is gone cannot be measured, and the peer is asked all the same
            return await self._meet(QmpMachine.gone(self._vm.qmp) if qemu.is_closed else qemu)
        except BaseException as error:
            if self._enclave is not None:
                self._enclave.abort(for_peer(self._reason_of(error)))
                await uninterrupted(self._enclave.reap())
            raise

    async def _see_off(self, qemu: QmpMachine, departure: Departure, enclave: EnclaveProcess | None) -> None:
        enclave = await departure.see_through(enclave)
        self._times.receipt, self._times.arrived = departure.heard_at, time.monotonic()
        await self._complete(enclave, qemu, departure.receipt, stream_digest=departure.digest, problem=None)

    async def _tell_postcopy(self, qemu: QmpMachine) -> None:
        await self._keep_to_share(qemu)
        status = await qemu.migration_status()
        before, wire = self._migration.progress, self._wire_bytes()
        self.update(progress=progress.of_postcopy(before, status, bytes_wire=wire, rate_limit=self._rate))

    def _send_ticket(self, enclave: EnclaveProcess, ticket: messages.Ticket) -> None:
        """Give the ticket to the enclave. Where that fails it is nobody's: a packet's socket takes all of it or nothing."""
        try:
            enclave.call(SendMessage(ticket.model_dump_json()))
        except SealaneError:
            self._handover.step(Input.NOT_SENT)
            raise

    # ---- when it does not go on

    async def _give_up(self, error: BaseException) -> None:
        """Abort, or be in doubt: the VM runs here again, unless it may run there."""
        reason = self._reason_of(error)
        if self._handover.state in IN_POSTCOPY:
            self._leave_parted(reason)
        elif self._handover.may_resume_here:
            reason = await self._better_reason(reason)
            if self._enclave is not None:
                self._enclave.abort(for_peer(reason))
            self._note_taking_back(reason)
            runs_at = await self._take_back()
            await vtpm_stays(self, self._context, self._vm)
            if runs_at is None:
                detail = f"{self._vm.name} may be paused here: its QEMU does not answer; the agent goes on asking it"
                self.leave(state="aborted", runs_at="nowhere", problem=problem_of(reason), detail=detail)
            else:
                self.end(state="aborted", runs_at=runs_at, problem=problem_of(reason))
        else:
            doubt = InDoubtError("handover.in-doubt", f"{self._peer.name} did not confirm: {reason.detail}")
            if self._enclave is not None:
                self._enclave.abort(doubt)
            self._handover.step(Input.FAILED)
            self.end(state="in-doubt", runs_at="in-doubt", problem=problem_of(doubt))
        if not isinstance(error, (SealaneError, asyncio.CancelledError)):
            self.log.error("unexpected error", exc_info=error)

    def _leave_parted(self, reason: SealaneError) -> None:
        """Both halves are kept, and the next agent joins them again."""
        if self._enclave is not None:
            self._enclave.abort(for_peer(reason))
        if self._handover.state is State.POSTCOPY:
            self._handover.step(Input.FAILED)
        detail = f"this host keeps a part of {self._vm.name}'s memory, which runs on {self._peer.name}: {reason.detail}"
        self.leave(state=self._handover.state.value, runs_at="destination", problem=problem_of(reason), detail=detail)

    def _reason_of(self, error: BaseException) -> SealaneError:
        if isinstance(error, SealaneError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return make_error(self.cancel_code)
        return InternalError("internal.error", f"{type(error).__name__}: {error}")

    async def _better_reason(self, reason: SealaneError) -> SealaneError:
        """QEMU only sees its socket closed; the enclave, or the peer through it, knows why."""
        if self._enclave is None or reason.code not in {"migration.qemu-failed", "vm.qmp"}:
            return reason
        await asyncio.wait({self._enclave.failed}, timeout=_REASON_WAIT_S)
        return self._enclave.failed.result() if self._enclave.failed.done() else reason

    def _note_taking_back(self, reason: SealaneError) -> None:
        """Where the journal says that the VM was given up, it must know better before the VM runs here again."""
        if self._migration.state not in {State.HANDING_OVER, *IN_POSTCOPY}:
            return
        try:
            self.journal(state="aborted", runs_at="nowhere", problem=problem_of(reason), detail=TAKING_BACK)
        except SealaneError as error:  # a restart would find the VM in doubt, and see that it runs
            self.log.error("the VM's return was not journalled", code=error.code, detail=error.detail)

    async def _take_back(self) -> RunsAt | None:
        """Let the VM run here again, if it did before: where it runs then, or None where QEMU does not say."""
        if self._qemu is None or not self._ran_before:
            return "source" if self._qemu is not None and not self._qemu.is_closed else "nowhere"
        return await take_back(self, self._qemu, self._vm.qmp, self._context.settings.limits.qmp_timeout_s)

    # ---- small things

    def _step(self, happened: Input, *, epoch: int | None = None, **changes: Any) -> None:
        """Journal the state that follows, durably, then be in it."""
        self.journal(state=self._handover.after(happened).value, epoch=epoch, **changes)
        self._handover.step(happened)

    async def _watch(self, awaitable: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
        """The awaitable's result, unless the enclave fails first."""
        if self._enclave is None:
            return await awaitable
        return await self._enclave.wait(awaitable, None, "enclave.slow", "")

    def _wire_bytes(self) -> int:
        """Over all lanes, those that a cut ended included."""
        return self._wire_bytes_before + (self._enclave.counters.wire_bytes if self._enclave is not None else 0)
