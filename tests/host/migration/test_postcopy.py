"""Who may come back to a VM whose memory is in two halves, and what a ticket must be."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.enclave.interface import PeerEstablished
from sealane.errors import SealaneError
from sealane.host.migration.checks import check_postcopy
from sealane.host.migration.destination import is_half_of
from sealane.host.migration.messages import PostcopyTicket, Rejoin
from sealane.host.migration.postcopy_destination import Arrival
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
