"""Who may come back to a VM whose memory is in two halves, and what a ticket must be."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.enclave.interface import PeerEstablished
from sealane.errors import SealaneError, make_error
from sealane.host.migration import postcopy_source
from sealane.host.migration.checks import check_postcopy
from sealane.host.migration.messages import (
    Arrived,
    Message,
    PostcopyTicket,
    Rejoin,
    Rejoined,
    TicketHeld,
    TicketRefused,
)
from sealane.host.migration.postcopy_destination import Arrival
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


def departing(job: LeavingJob, state: State, qemu: LeavingQemu, enclave: AnsweringEnclave) -> Departure:
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
