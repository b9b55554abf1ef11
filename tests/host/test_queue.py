"""The queue: who may begin, who waits and why, and that limits hold whatever comes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import SealaneError
from sealane.host.config import LimitSettings
from sealane.host.limits import PeerLimits, TokenBuckets
from sealane.host.models import Role
from sealane.host.queue import Queue, Turn, Wish


class Rig:
    def __init__(self, **limits: Any) -> None:
        self.admitted: list[str] = []
        self.queue = Queue(LimitSettings(**limits), self.admitted.append)
        self.number = 0

    def enter(self, id: str, peer: str = "b", role: Role = "source", **turn: Any) -> bool:
        self.number += 1
        return self.queue.enter(Wish(id, self.number, role, peer, Turn(**turn)))

    def places(self) -> dict[str, tuple[int, str]]:
        return {id: (place.place, place.why) for id, place in self.queue.places().items()}


def test_the_higher_priority_first_then_the_older() -> None:
    rig = Rig(outgoing_max=1)
    assert rig.enter("first")
    for name, priority in (("low", -1), ("a", 0), ("b", 0), ("high", 5)):
        assert not rig.enter(name, priority=priority)
    assert [*rig.places()] == ["high", "a", "b", "low"]
    assert rig.places()["low"] == (4, "its limit of 1 migrations to other hosts (limits.outgoing_max)")
    rig.queue.leave("a")  # cancelled while it waited
    for expected in ("high", "b", "low"):
        rig.queue.leave(rig.admitted[-1] if rig.admitted else "first")
        assert rig.admitted[-1] == expected
    assert rig.queue.waiting_count == 0


def test_who_waits_for_its_own_limit_holds_up_nobody() -> None:
    rig = Rig(outgoing_max=4, peers={"b": PeerLimits(outgoing_max=1)})
    assert rig.enter("b1")
    assert not rig.enter("b2", priority=9)
    assert rig.enter("c1", "c", group="evacuation", group_max=1)
    assert not rig.enter("c2", "c", group="evacuation", group_max=1)
    assert rig.enter("c3", "c")
    assert rig.places() == {
        "b2": (1, "its limit of 1 migrations to b (limits.peers.b.outgoing_max)"),
        "c2": (2, "the 1 at once that were asked for (--parallel)"),
    }
    rig.queue.leave("c1")
    assert rig.admitted == ["c2"]


def test_what_comes_from_a_peer_never_waits_and_takes_no_place_of_the_queue() -> None:
    rig = Rig(migrations_max=1, queue_max=1)
    assert rig.enter("in", role="destination")
    with pytest.raises(SealaneError, match=r"peer\.busy"):
        rig.enter("in2", role="destination")
    assert not rig.enter("out")
    with pytest.raises(SealaneError, match=r"queue\.full"):
        rig.enter("out2")
    rig.queue.leave("in")
    assert rig.admitted == ["out"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.integers(-2, 2), st.sampled_from("bc"), st.sampled_from([None, "g"])),
            st.tuples(st.just("leave"), st.integers(0, 40), st.just(""), st.none()),
        ),
        max_size=60,
    )
)
def test_limits_hold_and_nobody_is_forgotten(steps: list[tuple[str, int, str, str | None]]) -> None:
    rig = Rig(migrations_max=5, outgoing_max=4, outgoing_per_peer_max=3)
    known: dict[str, tuple[str, str | None]] = {}
    running: set[str] = set()
    for what, number, peer, group in steps:
        if what == "enter":
            id = f"m{rig.number}"
            known[id] = (peer, group)
            if rig.enter(id, peer, priority=number, group=group, group_max=2):
                running.add(id)
        elif known:
            id = [*known][number % len(known)]
            del known[id]
            running.discard(id)
            rig.queue.leave(id)
        running |= set(rig.admitted) & set(known)
        assert len(running) <= 4
        for each in "bc":
            assert sum(known[id][0] == each for id in running) <= 3
        assert sum(known[id][1] == "g" for id in running) <= 2
        assert set(rig.places()) == set(known) - running
        assert all("its limit" in why or "--parallel" in why for _, why in rig.places().values())
    for id in [*running]:
        rig.queue.leave(id)


def test_token_buckets() -> None:
    now = [0.0]
    buckets = TokenBuckets(2, 60.0, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    assert buckets.take("b"), "one name's bucket is nobody else's"
    now[0] = 30.0
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    now[0] = 3600.0
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
