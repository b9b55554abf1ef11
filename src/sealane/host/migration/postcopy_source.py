"""The source's half of a postcopy: give the VM up, let QEMU switch, serve pages, join the halves again after a cut.

    switching-over    the VM is paused and whole here; the ticket is out, and the destination says that it holds it
    postcopy          journalled: the VM is given up. Only now is QEMU told to go on
    postcopy-paused   the lanes were cut; both QEMUs keep their halves and wait

Until `postcopy` is journalled, any failure resumes the VM here: what the destination would need to run the VM has not left
this host's QEMU. After it this end never resumes the VM, unless the destination says that its QEMU never came through the
switch and is destroyed.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sealane.enclave.interface import SendMessage
from sealane.errors import ControlError, PeerError, SealaneError, make_error, printable
from sealane.host.job import Job
from sealane.host.migration import messages
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.stall import StallLimit
from sealane.host.problems import problem_of
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import CHANNEL_ANSWER_TIMEOUT_S, LOADED_TIMEOUT_S, REJOIN_PAUSES_S
from sealane.session.handover import Handover, Input, State

PROGRESS_EVERY_S: Final = 0.25
_REFUSED: Final = "handover.refused"
# How the detail of a source begins whose last try to join the halves failed.
NOT_JOINED: Final = "the halves could not be joined yet"


class _Unsaid:
    """Raises where all of the memory went and nobody says so: the destination's enclave may have outlived its agent."""

    def __init__(self) -> None:
        self._seen = (False, False)
        self._since = 0.0

    def look(self, enclave: EnclaveProcess) -> None:
        """Now and then; an agent that is there says it before its enclave's goodbye, and soon after the lanes are closed."""
        now = asyncio.get_running_loop().time()
        seen = (enclave.lanes_closed.done(), enclave.finished.done())
        if seen != self._seen:
            self._seen, self._since = seen, now
        limit_s = PROGRESS_EVERY_S if all(seen) else CHANNEL_ANSWER_TIMEOUT_S
        if any(seen) and now - self._since >= limit_s:
            raise make_error(
                "lane.cut", "the lanes are closed, and the destination's agent does not say that all arrived"
            )


class _HalfIsGone(ControlError):
    """The destination lacks pages, and the QEMU here that had them is gone: no further try can join anything."""


@dataclass
class Departure:
    """One VM's way out by postcopy. `meet` gives a fresh enclave whose peer is known and allowed; `tell` tells the progress;
    `settle` waits for what the policy says of a peer that was attested again, and raises a no.

    `receipt` is the destination's word that the VM runs there, and `heard_at` when it came (event loop's clock);
    `digest` that of the lanes, where they were never cut.
    """

    job: Job
    handover: Handover
    qemu: QmpMachine
    directory: Path
    meet: Callable[[], Awaitable[EnclaveProcess]]
    open_lanes: Callable[[EnclaveProcess, Path, int], Awaitable[None]]
    tell: Callable[[], Awaitable[None]]
    settle: Callable[[], Awaitable[None]]
    word_timeout_s: float
    stall_timeout_s: float
    receipt: messages.Receipt | None = None
    heard_at: float | None = None
    digest: str | None = None
    _joined: int = 0
    _reading: "set[asyncio.Task[messages.Message]]" = field(default_factory=set)

    async def switch(self, enclave: EnclaveProcess) -> None:
        """Give the ticket, journal that the VM is given up, let QEMU switch. Before the journal's entry everything may fail."""
        vm = self.job.migration.vm
        epoch = self.job.store.epoch(vm) + 1
        enclave.call(SendMessage(messages.PostcopyTicket(vm=vm, epoch=epoch).model_dump_json()))
        held = await enclave.expect(messages.TicketHeld, self.word_timeout_s)
        if held.epoch != epoch:
            raise PeerError("peer.message", "the destination holds another ticket")
        await self.settle()  # the destination may have taken its time, and was attested again meanwhile
        if enclave.failed.done():  # known before anything is given up
            raise enclave.failed.result()
        self._step(Input.SWITCHED, epoch=epoch, runs_at="destination", detail="switching to postcopy")
        await asyncio.sleep(0)  # what came meanwhile is heard
        if enclave.failed.done():  # a switch into lanes that are gone would leave the VM without any host
            return
        try:
            await uninterrupted(self.qemu.migrate_continue())
        except SealaneError as error:  # the destination's QEMU will see no switch, and its agent will say so
            self.job.log.error("QEMU was not told to switch", code=error.code, detail=error.detail)

    async def see_through(self, enclave: EnclaveProcess | None) -> EnclaveProcess:
        """Serve pages until the destination has all of them; None: the halves were parted when this began.

        Returns the enclave whose lanes were the last. Raises `migration.postcopy-paused` where the halves could not be joined
        again, `handover.refused` where the destination never had the VM.
        """
        while True:
            try:
                if enclave is None:
                    enclave = await self._join_with_patience()
                await self._serve(enclave)
            except SealaneError as error:
                if enclave is None or error.code == _REFUSED:
                    raise
                if self.handover.state is State.COMPLETED:  # the word came, and what broke beside it is needed no more
                    return enclave
                await self._part(enclave, error)
                enclave = None
            else:
                return enclave

    # ---- while the lanes hold

    async def _serve(self, enclave: EnclaveProcess) -> None:
        if self.handover.state is State.COMPLETED:
            return
        stall, unsaid = StallLimit(self.stall_timeout_s), _Unsaid()
        reading = asyncio.ensure_future(self._read(enclave))
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=PROGRESS_EVERY_S)
                stall.look(enclave.counters.wire_bytes)
                if (await self.qemu.migration_status()).status == "postcopy-paused" and not reading.done():
                    raise (
                        enclave.failed.result()
                        if enclave.failed.done()
                        else make_error("lane.cut", "QEMU lost its lane")
                    )
                if not reading.done():
                    unsaid.look(enclave)
                await self.tell()
            await reading
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, SealaneError):
                await reading
        if enclave.lanes_closed.done() and not self._joined:
            self.digest = enclave.lanes_closed.result().digest

    async def _read(self, enclave: EnclaveProcess) -> None:
        """The destination's words, to the one that ends postcopy."""
        while True:
            message = await enclave.next_message(None, "word")
            if self._heard(message):
                return

    def _heard(self, message: messages.Message) -> bool:
        """Take in one word; True where it ends postcopy."""
        epoch = self.job.migration.epoch
        match message:
            case messages.Receipt() if (message.vm, message.epoch) == (self.job.migration.vm, epoch):
                self.receipt, self.heard_at = message, asyncio.get_running_loop().time()
                self.job.update(detail="the VM runs at the destination; the rest of its memory follows")
                return False
            case messages.Arrived() if message.epoch == epoch:
                self.handover.step(Input.ARRIVED)
                return True
            case messages.TicketRefused() if self.receipt is None:  # what has run there is not given back
                self.handover.step(Input.REFUSED)
                raise make_error(_REFUSED, f"{printable(message.code)}: {printable(message.detail)}")
        raise PeerError("peer.message", f"`{message.kind}` came out of turn")

    # ---- after a cut

    async def _part(self, enclave: EnclaveProcess, error: SealaneError) -> None:
        """The lanes are over: both QEMUs keep their halves."""
        self.job.log.warning("postcopy was cut", code=error.code, detail=error.detail)
        enclave.abort(error)
        await uninterrupted(enclave.reap())
        self.handover.step(Input.FAILED)
        self._journal(detail=f"cut, the guest may stand still: {error.detail}", problem=problem_of(error))

    async def _join_with_patience(self) -> EnclaveProcess:
        last = make_error("migration.postcopy-paused", "nobody tried")
        for pause_s in REJOIN_PAUSES_S:
            await self._pause_unless_hurried(pause_s)
            try:
                return await self._join()
            except SealaneError as error:
                if error.code == _REFUSED or isinstance(error, _HalfIsGone):
                    raise
                last = error
                self.job.log.warning("the halves could not be joined yet", code=error.code, detail=error.detail)
                self.job.update(detail=f"{NOT_JOINED}: {error.detail}")
        raise make_error("migration.postcopy-paused", f"{len(REJOIN_PAUSES_S)} times tried, the last: {last.detail}")

    async def _pause_unless_hurried(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self.job.hurry.wait()
        self.job.hurry.clear()

    async def _join(self) -> EnclaveProcess:
        """New channel, new keys, new lanes; QEMU sends what the other half says that it lacks.

        A QEMU that is in no postcopy, because its switch failed or it was never told to switch, has nothing to join: but the
        destination knows whether its QEMU came through the switch, and is asked all the same.
        """
        nothing_to_join = await self._pause()
        enclave = await self.meet()
        try:
            await self._join_over(enclave, nothing_to_join)
        except BaseException as error:
            enclave.abort(error if isinstance(error, SealaneError) else make_error("migration.cancelled"))
            await uninterrupted(enclave.reap())
            raise
        return enclave

    async def _pause(self) -> SealaneError | None:
        """Have QEMU see that its lanes are gone; why there is nothing to join here, where that is so."""
        try:
            if (await self.qemu.migration_status()).status != "completed":
                await self.qemu.pause_postcopy()
        except SealaneError as error:
            return error
        return None

    async def _join_over(self, enclave: EnclaveProcess, nothing_to_join: SealaneError | None) -> None:
        vm, epoch = self.job.migration.vm, self.job.migration.epoch
        assert epoch is not None  # noqa: S101 - journalled with the switch
        enclave.call(SendMessage(messages.Rejoin(vm=vm, epoch=epoch).model_dump_json()))
        answer = await enclave.next_message(CHANNEL_ANSWER_TIMEOUT_S, "answer to `rejoin`")
        if not isinstance(answer, messages.Rejoined):
            if not self._heard(answer):
                raise PeerError("peer.message", f"`{answer.kind}` came out of turn")
            return
        if nothing_to_join is not None:
            raise self._why_not_joined(nothing_to_join)
        self._joined += 1
        path = self.directory / f"again-{self._joined}.sock"
        await self.open_lanes(enclave, path, answer.lanes)
        await self.qemu.recover_outgoing(f"unix:{path}")
        waiting = self.qemu.wait_migration({"postcopy-active", "completed"}, LOADED_TIMEOUT_S)
        await enclave.wait(waiting, None, "enclave.slow", "")
        self._step(Input.REJOINED, detail="joined again; the rest of the VM's memory follows", problem=None)

    def _why_not_joined(self, nothing_to_join: SealaneError) -> SealaneError:
        if not self.qemu.is_closed:
            return nothing_to_join
        words = f"the destination lacks what this host's QEMU had of the VM, and that QEMU is gone: {nothing_to_join.detail}"
        return _HalfIsGone("migration.postcopy-paused", words)

    # ---- small things

    def _step(self, happened: Input, *, epoch: int | None = None, **changes: Any) -> None:
        self.job.journal(state=self.handover.after(happened).value, epoch=epoch, **changes)
        self.handover.step(happened)

    def _journal(self, **changes: Any) -> None:
        """What recovery does is the same in both states of a postcopy: a journal that is full changes nothing."""
        try:
            self.job.journal(state=self.handover.state.value, **changes)
        except SealaneError as error:
            self.job.log.error("the cut was not journalled", code=error.code, detail=error.detail)
            self.job.update(state=self.handover.state.value, **changes)
