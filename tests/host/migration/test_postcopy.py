"""Who may come back to a VM whose memory is in two halves, and what a ticket must be."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.enclave.interface import Counters, LanesClosed, LaneTokens, Outlive, PeerEstablished, SendMessage
from sealane.errors import SealaneError, make_error
from sealane.host.migration import postcopy_source
from sealane.host.migration.checks import check_postcopy
from sealane.host.migration.destination import DestinationMigration
from sealane.host.migration.messages import (
    Arrived,
    Message,
    PostcopyTicket,
    Receipt,
    Rejoin,
    Rejoined,
    TicketHeld,
    TicketRefused,
)
from sealane.host.migration.postcopy_destination import Arrival, Half
from sealane.host.migration.postcopy_source import Departure
from sealane.host.migration.reception import is_half_of
from sealane.host.models import Migration
from sealane.seal.protect import PROTECTIONS, SEALED
from sealane.session.handover import Handover, Role, State

MINE, OTHER = "SHA256:" + "a" * 64, "SHA256:" + "b" * 64
MET = PeerEstablished("b", MINE, "TLSv1.3", "group", "cipher", "web01", 5, "{}")
KNOWN = Migration(
    id="0" * 32, number=1, vm="web01", role="destination", peer="b", state="postcopy-paused", runs_at="destination",
    started_at=datetime(2026, 1, 1, tzinfo=UTC), epoch=5, peer_fingerprint=MINE,
)  # fmt: skip
ENDED = {"ended_at": datetime(2026, 1, 2, tzinfo=UTC)}


@pytest.mark.parametrize(
    ("changes", "wish", "may"),
    [
        ({}, Rejoin(vm="web01", epoch=5), True),
        ({"peer_fingerprint": OTHER}, Rejoin(vm="web01", epoch=5), False),
        ({"role": "source"}, Rejoin(vm="web01", epoch=5), False),
        ({}, Rejoin(vm="web02", epoch=5), False),
        ({}, Rejoin(vm="web01", epoch=6), False),
        ({"state": "completed", **ENDED}, Rejoin(vm="web01", epoch=5), True),
        ({"state": "aborted", "runs_at": "source", **ENDED}, Rejoin(vm="web01", epoch=5), True),
        # not certain yet: a copy that could not be destroyed, and one that was lost and must not be called arrived
        ({"state": "aborted", "runs_at": "source"}, Rejoin(vm="web01", epoch=5), False),
        ({"state": "switching-over"}, Rejoin(vm="web01", epoch=5), False),
        ({"state": "completed", "runs_at": "nowhere", **ENDED}, Rejoin(vm="web01", epoch=5), False),
    ],
)
def test_only_its_own_source_may_come_back(changes: dict[str, Any], wish: Rejoin, may: bool) -> None:
    assert is_half_of(KNOWN.model_copy(update=changes), MET, wish) is may


@pytest.mark.parametrize("ticket", [("web02", 5), ("web01", 4), ("web01", 6)])
async def test_a_ticket_for_another_vm_or_epoch_is_not_held(ticket: tuple[str, int]) -> None:
    handover = Handover(Role.DESTINATION, State.COPYING)
    job = SimpleNamespace(migration=KNOWN, store=SimpleNamespace(epoch=lambda _vm: 4))
    nothing = cast(Any, None)
    arrival = Arrival(cast(Any, job), handover, nothing, nothing, 1, nothing)
    with pytest.raises(SealaneError, match=r"handover\.refused"):
        await arrival.take(PostcopyTicket(vm=ticket[0], epoch=ticket[1]), 5)
    assert handover.state is State.COPYING


async def test_an_epoch_that_was_here_is_not_held() -> None:
    job = SimpleNamespace(migration=KNOWN, store=SimpleNamespace(epoch=lambda _vm: 5))
    nothing = cast(Any, None)
    arrival = Arrival(cast(Any, job), Handover(Role.DESTINATION, State.COPYING), nothing, nothing, 1, nothing)
    with pytest.raises(SealaneError, match=r"handover\.refused"):
        await arrival.take(PostcopyTicket(vm="web01", epoch=5), 5)


@pytest.mark.parametrize(
    ("capabilities", "channels", "facts", "allowed"),
    [
        ({"postcopy-ram"}, None, {}, True),
        ({"postcopy-ram"}, 0, {}, True),
        ({"multifd"}, None, {}, False),
        ({"postcopy-ram", "multifd"}, 2, {}, False),
        ({"postcopy-ram"}, None, {"has_vtpm": True}, False),
        *(({"postcopy-ram"}, None, {"protection": name}, False) for name in PROTECTIONS if name != SEALED),
    ],
)
def test_what_does_not_go_by_postcopy(
    capabilities: set[str], channels: int | None, facts: dict[str, Any], allowed: bool
) -> None:
    vm = cast(Any, SimpleNamespace(capabilities=frozenset(capabilities), qemu_version=(10, 0, 2)))
    every: dict[str, Any] = {"has_vtpm": False, "protection": SEALED, **facts}
    if allowed:
        check_postcopy(vm, channels, **every)
    else:
        with pytest.raises(SealaneError, match=r"check\.postcopy"):
            check_postcopy(vm, channels, **every)


class LeavingJob:
    """A source's job as far as a `Departure` needs it; `at_journal` is done when it journals."""

    def __init__(self) -> None:
        self.migration = KNOWN.model_copy(update={"role": "source"})
        self.store = SimpleNamespace(epoch=lambda _vm: 4)
        self.log = SimpleNamespace(warning=lambda *_a, **_k: None, error=lambda *_a, **_k: None)
        self.hurry = asyncio.Event()
        self.at_journal: Callable[[], None] = lambda: None

    def journal(self, **_changes: object) -> None:
        self.at_journal()

    def update(self, **_changes: object) -> None:
        pass


class AnsweringEnclave:
    """An enclave whose peer answers each word with `answer`."""

    def __init__(self, answer: Message) -> None:
        self.failed: asyncio.Future[SealaneError] = asyncio.get_running_loop().create_future()
        self._answer = answer

    def call(self, _call: object) -> None:
        pass

    def abort(self, _error: SealaneError) -> None:
        pass

    async def reap(self) -> None:
        pass

    async def next_message(self, _timeout_s: float, _what: str) -> Message:
        return self._answer

    async def expect(self, _kind: object, _timeout_s: float) -> Message:
        return self._answer


class LeavingQemu:
    """A source's QEMU that is in no postcopy; it notes whether it was told to switch."""

    def __init__(self) -> None:
        self.told = self.is_closed = False
        self.looks = 0

    async def migration_status(self) -> SimpleNamespace:
        return SimpleNamespace(status="failed")

    async def pause_postcopy(self) -> None:
        self.looks += 1
        raise make_error("migration.qemu-failed", "QEMU says of its postcopy: failed")

    async def migrate_continue(self) -> None:
        self.told = True


async def no_objection() -> None:
    """The policy says nothing against the peer."""


def departing(
    job: LeavingJob,
    state: State,
    qemu: LeavingQemu,
    enclave: AnsweringEnclave,
    settle: Callable[[], Awaitable[None]] = no_objection,
) -> Departure:
    async def meet() -> Any:
        return enclave

    async def nothing(*_arguments: object) -> None:
        raise AssertionError("there is nothing to join")

    return Departure(
        cast(Any, job),
        Handover(Role.SOURCE, state),
        cast(Any, qemu),
        Path("/nonexistent"),
        meet=meet,
        open_lanes=nothing,
        tell=nothing,
        settle=settle,
        word_timeout_s=1.0,
        stall_timeout_s=1.0,
    )


async def test_a_source_whose_switch_failed_hears_that_the_destination_refused() -> None:
    """Its QEMU is in no postcopy and has nothing to join; the VM is whole here, and only the destination's word brings it back."""
    enclave = AnsweringEnclave(TicketRefused(code="handover.refused", detail="no switch"))
    departure = departing(LeavingJob(), State.POSTCOPY_PAUSED, LeavingQemu(), enclave)
    with pytest.raises(SealaneError, match=r"handover\.refused"):
        await departure.see_through(None)
    assert departure.handover.state is State.ABORTED


async def test_a_refusal_counts_for_nothing_once_the_vm_ran_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a destination could have the VM twice: run it, say so, and give it back."""
    monkeypatch.setattr(postcopy_source, "REJOIN_PAUSES_S", (0.0,))
    enclave = AnsweringEnclave(TicketRefused(code="handover.refused", detail="no switch"))
    departure = departing(LeavingJob(), State.POSTCOPY_PAUSED, LeavingQemu(), enclave)
    departure.receipt = Receipt(vm="web01", epoch=5, since_resume_ms=0)
    with pytest.raises(SealaneError, match=r"migration\.postcopy-paused"):
        await departure.see_through(None)
    assert departure.handover.state is State.POSTCOPY_PAUSED


async def test_the_policys_no_that_comes_with_the_ticket_keeps_the_vm_here() -> None:
    """The destination holds the ticket for as long as it likes, and its evidence may change meanwhile."""

    async def refused() -> None:
        raise make_error("policy.denied", "the policy says no")

    job, qemu = LeavingJob(), LeavingQemu()
    job.at_journal = lambda: pytest.fail("the VM was given up")
    departure = departing(job, State.SWITCHING_OVER, qemu, AnsweringEnclave(TicketHeld(epoch=5)), refused)
    with pytest.raises(SealaneError, match=r"policy\.denied"):
        await departure.switch(cast(Any, AnsweringEnclave(TicketHeld(epoch=5))))
    assert not qemu.told
    assert departure.handover.state is State.SWITCHING_OVER


async def test_a_source_whose_switch_failed_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy_source, "REJOIN_PAUSES_S", (0.0, 0.0))
    departure = departing(LeavingJob(), State.POSTCOPY_PAUSED, LeavingQemu(), AnsweringEnclave(Rejoined(lanes=1)))
    with pytest.raises(SealaneError, match="QEMU says of its postcopy: failed"):
        await departure.see_through(None)
    assert departure.handover.state is State.POSTCOPY_PAUSED


async def test_a_source_whose_qemu_is_gone_tries_no_more_once_the_destination_lacks_its_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postcopy_source, "REJOIN_PAUSES_S", (0.0,) * 5)
    qemu = LeavingQemu()
    qemu.is_closed = True
    departure = departing(LeavingJob(), State.POSTCOPY_PAUSED, qemu, AnsweringEnclave(Rejoined(lanes=1)))
    with pytest.raises(SealaneError, match=r"that QEMU is gone.*migration\.postcopy-paused"):
        await departure.see_through(None)
    assert qemu.looks == 1


async def test_a_source_whose_qemu_is_gone_still_hears_that_all_had_arrived() -> None:
    qemu = LeavingQemu()
    qemu.is_closed = True
    enclave = AnsweringEnclave(Arrived(epoch=5, digest=None))
    departure = departing(LeavingJob(), State.POSTCOPY_PAUSED, qemu, enclave)
    assert await departure.see_through(None) is cast(Any, enclave)
    assert departure.handover.state is State.COMPLETED


async def test_a_source_that_is_hurried_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy_source, "REJOIN_PAUSES_S", (3600.0,))
    job = LeavingJob()
    job.hurry.set()
    departure = departing(job, State.POSTCOPY_PAUSED, LeavingQemu(), AnsweringEnclave(Rejoined(lanes=1)))
    with pytest.raises(SealaneError, match="1 times tried"):
        await departure.see_through(None)
    assert not job.hurry.is_set()


async def test_lanes_that_are_gone_before_the_vm_is_given_up_keep_it_here() -> None:
    enclave, qemu = AnsweringEnclave(TicketHeld(epoch=5)), LeavingQemu()
    enclave.failed.set_result(make_error("enclave.died"))
    departure = departing(LeavingJob(), State.SWITCHING_OVER, qemu, enclave)
    with pytest.raises(SealaneError, match=r"enclave\.died"):
        await departure.switch(cast(Any, enclave))
    assert departure.handover.state is State.SWITCHING_OVER
    assert not qemu.told


@pytest.mark.parametrize("lost", [False, True])
async def test_no_switch_into_lanes_that_are_known_to_be_gone(lost: bool) -> None:
    enclave, qemu, job = AnsweringEnclave(TicketHeld(epoch=5)), LeavingQemu(), LeavingJob()
    if lost:
        job.at_journal = lambda: enclave.failed.set_result(make_error("enclave.died"))
    departure = departing(job, State.SWITCHING_OVER, qemu, enclave)
    await departure.switch(cast(Any, enclave))
    assert departure.handover.state is State.POSTCOPY
    assert qemu.told is not lost


# ---- the destination's enclave outlives its agent


class ClosedEnclave(AnsweringEnclave):
    """A source's enclave whose lanes were closed in order; its peer says goodbye, or the `late` word, or nothing."""

    def __init__(self, *, bye: bool, late: Message | None = None) -> None:
        super().__init__(Arrived(epoch=5, digest=None))
        loop = asyncio.get_running_loop()
        self.counters, self._late = Counters(1, 1), late
        self.lanes_closed: asyncio.Future[LanesClosed] = loop.create_future()
        self.lanes_closed.set_result(LanesClosed("d" * 64, 1, 1))
        self.finished: asyncio.Future[None] = loop.create_future()
        if bye:
            self.finished.set_result(None)

    async def next_message(self, _timeout_s: float | None, _what: str) -> Message:
        await asyncio.sleep(0.1 if self._late else 3600.0)
        assert self._late is not None
        return self._late


class ServingQemu(LeavingQemu):
    """A source's QEMU that has sent everything."""

    async def migration_status(self) -> SimpleNamespace:
        return SimpleNamespace(status="completed")


def serving(enclave: AnsweringEnclave, monkeypatch: pytest.MonkeyPatch, answer_timeout_s: float = 60.0) -> Departure:
    async def tell() -> None:
        pass

    monkeypatch.setattr(postcopy_source, "PROGRESS_EVERY_S", 0.01)
    monkeypatch.setattr(postcopy_source, "CHANNEL_ANSWER_TIMEOUT_S", answer_timeout_s)
    monkeypatch.setattr(postcopy_source, "REJOIN_PAUSES_S", (0.0,))
    return replace(departing(LeavingJob(), State.POSTCOPY, ServingQemu(), enclave), tell=tell, stall_timeout_s=60.0)


@pytest.mark.parametrize(("bye", "answer_timeout_s"), [(True, 60.0), (False, 0.05)])
async def test_a_source_asks_when_its_lanes_were_closed_and_nobody_says_that_all_arrived(
    monkeypatch: pytest.MonkeyPatch, bye: bool, answer_timeout_s: float
) -> None:
    asked = AnsweringEnclave(Arrived(epoch=5, digest=None))
    departure = serving(asked, monkeypatch, answer_timeout_s)
    async with asyncio.timeout(20):
        assert await departure.see_through(cast(Any, ClosedEnclave(bye=bye))) is cast(Any, asked)
    assert departure.handover.state is State.COMPLETED
    assert departure.digest is None  # nobody compared it


async def test_a_source_whose_lanes_were_closed_waits_for_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = ClosedEnclave(bye=False, late=Arrived(epoch=5, digest="d" * 64))
    departure = serving(AnsweringEnclave(Rejoined(lanes=1)), monkeypatch)
    assert await departure.see_through(cast(Any, enclave)) is cast(Any, enclave)
    assert (departure.handover.state, departure.digest) == (State.COMPLETED, "d" * 64)


async def test_a_qemu_that_is_lost_after_the_word_parts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked how it is while the word comes in; what it answers is needed no more."""
    enclave = ClosedEnclave(bye=False, late=Arrived(epoch=5, digest=None))
    departure = serving(AnsweringEnclave(Rejoined(lanes=1)), monkeypatch)

    async def lost() -> SimpleNamespace:
        while departure.handover.state is not State.COMPLETED:
            await asyncio.sleep(0.01)
        raise make_error("vm.unreachable", "QEMU closed the connection during query-migrate")

    monkeypatch.setattr(departure.qemu, "migration_status", lost)
    async with asyncio.timeout(20):
        assert await departure.see_through(cast(Any, enclave)) is cast(Any, enclave)
    assert departure.handover.state is State.COMPLETED


class NotingEnclave:
    """A destination's enclave; it notes what it is told."""

    def __init__(self, told: list[str] | None = None) -> None:
        self.told = [] if told is None else told
        self.failed: asyncio.Future[SealaneError] = asyncio.get_running_loop().create_future()

    def call(self, call: object) -> None:
        self.told.append(call.payload if isinstance(call, SendMessage) else type(call).__name__)

    def abort(self, _error: SealaneError) -> None:
        self.told.append("abort")

    def leave(self) -> None:
        self.told.append("leave")

    async def reap(self) -> None:
        pass

    async def wait(self, awaitable: Awaitable[Any], *_limits: object) -> Any:
        return await awaitable


class ArrivingQemu:
    """A destination's QEMU that has all of the memory."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.state = told, "paused"

    async def migration_status(self) -> SimpleNamespace:
        return SimpleNamespace(status="completed")

    async def wait_migration(self, _statuses: set[str]) -> SimpleNamespace:
        return await self.migration_status()

    async def run_state(self) -> str:
        return self.state

    async def resume(self) -> None:
        self.told.append("resume")
        self.state = "running"

    async def lend(self) -> None:
        self.told.append("lend")

    async def end_loan(self) -> None:
        self.told.append("end of the loan")


class StandingQemu(ArrivingQemu):
    """A destination's QEMU whose VM runs, and which then waits for a page itself: `asked` is called, and it answers nothing."""

    def __init__(self, told: list[str], asked: Callable[[], None]) -> None:
        super().__init__(told)
        self.asked, self.is_closed = asked, False

    async def run_state(self) -> str:
        if self.state == "running":
            self.asked()
            await asyncio.Event().wait()
        return self.state


def arriving(state: State, told: list[str], enclave: NotingEnclave, qemu: ArrivingQemu | None = None) -> Arrival:
    job = LeavingJob()
    job.at_journal = lambda: told.append("journal")
    handover, qemu = Handover(Role.DESTINATION, state), qemu or ArrivingQemu(told)
    return Arrival(cast(Any, job), handover, cast(Any, qemu), Path("/nonexistent"), 1, cast(Any, enclave))


async def test_the_lanes_hold_without_the_agent_before_the_vm_runs() -> None:
    told: list[str] = []
    arrival = arriving(State.SWITCHING_OVER, told, NotingEnclave(told))
    await arrival.run_here()
    assert told[:-1] == [Outlive.__name__, "lend", "journal", "resume"]
    assert '"receipt"' in told[-1]


async def test_a_qemu_that_stands_still_once_its_vm_runs_keeps_its_half_as_soon_as_the_lanes_are_gone() -> None:
    """It answers nothing until the halves are joined: nobody may wait for its word first, nor end the job for want of it."""
    told: list[str] = []
    enclave = NotingEnclave(told)
    lost = make_error("lane.cut")
    arrival = arriving(State.SWITCHING_OVER, told, enclave, StandingQemu(told, lambda: enclave.failed.set_result(lost)))
    async with asyncio.timeout(20):
        await arrival.run_here()
    assert told == [Outlive.__name__, "lend", "journal", "resume"]
    assert arrival.handover.state is State.POSTCOPY


async def test_a_qemu_that_does_not_say_that_its_vm_runs_keeps_its_half() -> None:
    def silent() -> None:
        raise make_error("vm.unreachable", "no answer to query-status within 20 s")

    told: list[str] = []
    qemu = StandingQemu(told, silent)
    await arriving(State.SWITCHING_OVER, told, NotingEnclave(told), qemu).run_here()
    assert told == [Outlive.__name__, "lend", "journal", "resume"]
    qemu.is_closed, qemu.state = True, "paused"
    with pytest.raises(SealaneError, match=r"vm\.unreachable"):  # it is gone, and the VM with it
        await arriving(State.SWITCHING_OVER, told, NotingEnclave(told), qemu).run_here()


async def test_a_qemu_that_has_all_is_not_joined_again() -> None:
    """All came while no agent was there. The source that asks is told so, by the enclave that it is met with."""

    def no_lanes(_tokens: LaneTokens) -> None:
        raise AssertionError("there is nothing to join")

    told: list[str] = []
    first, met = NotingEnclave(), NotingEnclave()
    arrival = arriving(State.POSTCOPY_PAUSED, told, first)
    arrival.rejoining.put_nowait(Half(cast(Any, met), no_lanes))
    async with asyncio.timeout(20):
        await arrival.see_through(parted=True)
    arrival.say_arrived()
    assert told == ["resume", "end of the loan"]
    assert arrival.handover.state is State.COMPLETED
    assert first.told == []
    assert ['"arrived"' in each for each in met.told] == [True]


async def test_a_source_that_comes_back_when_all_is_there_is_told_on_its_new_channel() -> None:
    first, met = NotingEnclave(), NotingEnclave()
    arrival = arriving(State.POSTCOPY, [], first)
    arrival.rejoining.put_nowait(Half(cast(Any, met), lambda _tokens: None))
    async with asyncio.timeout(20):
        await arrival.see_through()
    arrival.say_arrived()
    assert first.told == ["abort"]
    assert ['"arrived"' in each for each in met.told] == [True]


class LeftHalf(DestinationMigration):
    """A destination's job, as far as it gives up; `said` is its last word."""

    def __init__(self, enclave: NotingEnclave, state: State) -> None:
        self.ended, self.cancel_code = asyncio.Event(), "migration.cancelled"
        self._enclave, self._handover = cast(Any, enclave), Handover(Role.DESTINATION, state)
        self._vm = cast(Any, SimpleNamespace(name="web01"))
        self._migration, self.said = KNOWN, ""

    def leave(self, **changes: Any) -> Migration:
        self.said = changes["state"]
        return KNOWN


@pytest.mark.parametrize(
    ("error", "state", "failed", "told", "said"),
    [
        (asyncio.CancelledError(), State.POSTCOPY, False, "leave", "postcopy"),
        (asyncio.CancelledError(), State.POSTCOPY, True, "abort", "postcopy-paused"),
        (asyncio.CancelledError(), State.POSTCOPY_PAUSED, False, "abort", "postcopy-paused"),
        (make_error("vm.not-running"), State.POSTCOPY, False, "abort", "postcopy-paused"),
    ],
)
async def test_an_agent_that_stops_leaves_lanes_that_hold(
    error: BaseException, state: State, failed: bool, told: str, said: str
) -> None:
    enclave = NotingEnclave()
    if failed:
        enclave.failed.set_result(make_error("lane.cut"))
    job = LeftHalf(enclave, state)
    await job._give_up(error)
    assert (enclave.told, job.said) == ([told], said)
