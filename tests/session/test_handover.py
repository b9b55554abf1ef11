"""The hand-over's table: no reachable pair of states lets both ends run the VM, and none leaves the VM to nobody.

The model walks every pair of states that two ends can reach with messages that are lost or delayed at will, and with
failures at any time. A message cannot be received before it was sent; that is all that ties the ends together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import pytest

from sealane.errors import ControlError
from sealane.session.handover import ENDED, IN_POSTCOPY, TRANSITIONS, Handover, Input, Role, State
from tests.session.diagram import BEGIN, END, PAGE, drawn

Table = Mapping[Role, Mapping[State, Mapping[Input, State]]]

# What an end must have been sent before this can happen to it, and what the other end hears of what happens.
NEEDS = {
    (Role.DESTINATION, Input.VM_STOPPED): "the whole stream",
    (Role.SOURCE, Input.RELEASED): "loaded",
    (Role.DESTINATION, Input.TICKET_JOURNALLED): "ticket",
    (Role.SOURCE, Input.RECEIPT): "receipt",
    (Role.SOURCE, Input.REFUSED): "refused",
    (Role.DESTINATION, Input.TICKET_HELD): "postcopy ticket",
    (Role.SOURCE, Input.SWITCHED): "held",
    (Role.DESTINATION, Input.SWITCHED): "switch",
    (Role.SOURCE, Input.ARRIVED): "arrived",
}
SENDS = {
    (Role.SOURCE, Input.VM_STOPPED): "the whole stream",
    (Role.DESTINATION, Input.VM_STOPPED): "loaded",
    (Role.SOURCE, Input.RELEASED): "released",  # from then on the ticket may leave at any time, or never
    (Role.SOURCE, Input.NOT_SENT): "kept",
    (Role.DESTINATION, Input.RECEIPT): "receipt",
    (Role.DESTINATION, Input.REFUSED): "refused",
    (Role.DESTINATION, Input.TICKET_HELD): "held",
    (Role.SOURCE, Input.SWITCHED): "switch",  # what QEMU alone sends, and the destination's QEMU cannot do without
    (Role.DESTINATION, Input.ARRIVED): "arrived",
}
# What an operator must have seen at the destination before saying this. That a half is lost this walk does not know: postcopy.pml.
SEEN = {Input.OWN_HERE: State.ABORTED, Input.DROP_HERE: State.COMPLETED}


@dataclass(frozen=True)
class World:
    """Both ends and every message that was sent; one that was sent may come at any later time, or never."""

    source: State = State.PREPARING
    destination: State = State.PREPARING
    sent: frozenset[str] = field(default=frozenset())

    def state(self, role: Role) -> State:
        return self.source if role is Role.SOURCE else self.destination

    def may_resume(self, role: Role) -> bool:
        return Handover(role, self.state(role)).may_resume_here


def following(
    world: World, table: Table, *, not_sent_is_certain: bool = True, operator_looks: bool = True
) -> set[World]:
    """`not-sent` can only happen as long as the ticket was not sent, which the source knows for certain."""
    found = set()
    if world.source is State.SWITCHING_OVER:  # the VM is paused and whole there
        found.add(World(world.source, world.destination, world.sent | {"postcopy ticket"}))
    if "released" in world.sent and "kept" not in world.sent:
        found.add(World(world.source, world.destination, world.sent | {"ticket"}))
    for role in Role:
        for happened, after in table[role].get(world.state(role), {}).items():
            needed = NEEDS.get((role, happened))
            if needed is not None and needed not in world.sent:
                continue
            if happened is Input.NOT_SENT and not_sent_is_certain and "ticket" in world.sent:
                continue
            if operator_looks and SEEN.get(happened, world.destination) is not world.destination:
                continue
            sent = world.sent | {message for key, message in SENDS.items() if key == (role, happened)}
            states = {Role.SOURCE: world.source, Role.DESTINATION: world.destination, role: after}
            found.add(World(states[Role.SOURCE], states[Role.DESTINATION], sent))
    return found


def reachable(table: Table, **allowed: bool) -> set[World]:
    seen, waiting = {World()}, [World()]
    while waiting:
        fresh = following(waiting.pop(), table, **allowed) - seen
        seen |= fresh
        waiting += fresh
    return seen


def both_may_run(worlds: set[World]) -> list[World]:
    return [world for world in worlds if all(world.may_resume(role) for role in Role)]


def nobody_can_run(worlds: set[World]) -> list[World]:
    """The source gave the VM up, knows or believes that it is over, and the destination does not have it."""
    return [
        world
        for world in worlds
        if not any(world.may_resume(role) for role in Role) and world.source in ENDED and world.destination in ENDED
    ]


def test_no_reachable_pair_lets_both_run_or_leaves_the_vm_to_nobody() -> None:
    worlds = reachable(TRANSITIONS)
    assert {world.source for world in worlds} == set(State)
    assert {world.destination for world in worlds} == set(State) - {State.IN_DOUBT}
    assert both_may_run(worlds) == []
    assert nobody_can_run(worlds) == []


def test_where_nobody_may_resume_the_source_keeps_a_paused_copy() -> None:
    silent = [world for world in reachable(TRANSITIONS) if not any(world.may_resume(role) for role in Role)]
    assert {world.source for world in silent} == {State.HANDING_OVER, State.IN_DOUBT} | IN_POSTCOPY
    assert (State.IN_DOUBT, State.ABORTED) in {(world.source, world.destination) for world in silent}


def test_every_outcome_that_both_can_reach() -> None:
    ended = {
        (world.source, world.destination)
        for world in reachable(TRANSITIONS)
        if world.source in ENDED and world.destination in ENDED
    }
    assert ended == {(State.COMPLETED, State.COMPLETED), (State.ABORTED, State.ABORTED)}


def test_doubt_ends_when_the_word_comes_late() -> None:
    for word, end in ((Input.RECEIPT, State.COMPLETED), (Input.REFUSED, State.ABORTED)):
        source = Handover(Role.SOURCE, State.IN_DOUBT)
        assert source.step(Input.FAILED) is State.IN_DOUBT
        assert source.step(word) is end


@pytest.mark.parametrize(
    ("role", "state", "happened", "wrong"),
    [
        (Role.SOURCE, State.HANDING_OVER, Input.FAILED, State.ABORTED),
        (Role.SOURCE, State.IN_DOUBT, Input.FAILED, State.ABORTED),
        (Role.SOURCE, State.SWITCHING_OVER, Input.RELEASED, State.SWITCHING_OVER),
        (Role.SOURCE, State.SWITCHING_OVER, Input.SWITCHED, State.SWITCHING_OVER),
        (Role.SOURCE, State.POSTCOPY, Input.FAILED, State.ABORTED),
        (Role.SOURCE, State.POSTCOPY_PAUSED, Input.FAILED, State.ABORTED),
        (Role.DESTINATION, State.COPYING, Input.TICKET_HELD, State.POSTCOPY),
        (Role.DESTINATION, State.SWITCHING_OVER, Input.REFUSED, State.POSTCOPY),
        (Role.DESTINATION, State.SWITCHING_OVER, Input.FAILED, State.COMPLETED),
        (Role.DESTINATION, State.HANDING_OVER, Input.REFUSED, State.COMPLETED),
    ],
)
def test_the_walk_finds_a_table_that_lets_both_run(role: Role, state: State, happened: Input, wrong: State) -> None:
    table = {**TRANSITIONS, role: {**TRANSITIONS[role], state: {**TRANSITIONS[role][state], happened: wrong}}}
    assert both_may_run(reachable(table))


def test_the_walk_finds_a_table_that_leaves_the_vm_to_nobody() -> None:
    steps = {**TRANSITIONS[Role.DESTINATION][State.HANDING_OVER], Input.RECEIPT: State.ABORTED}
    table = {**TRANSITIONS, Role.DESTINATION: {**TRANSITIONS[Role.DESTINATION], State.HANDING_OVER: steps}}
    assert nobody_can_run(reachable(table))


def test_the_walk_finds_a_source_that_takes_an_unsure_ticket_for_one_that_was_not_sent() -> None:
    assert both_may_run(reachable(TRANSITIONS, not_sent_is_certain=False))


def test_the_walk_finds_an_operator_who_does_not_look() -> None:
    worlds = reachable(TRANSITIONS, operator_looks=False)
    assert both_may_run(worlds)
    assert nobody_can_run(worlds)


@pytest.mark.parametrize("role", Role)
def test_every_state_knows_failure_except_the_ended_ones(role: Role) -> None:
    for state, steps in TRANSITIONS[role].items():
        assert (Input.FAILED in steps) == (state not in ENDED)
        assert bool(steps) == (state not in ENDED)
    assert State.IN_DOUBT not in TRANSITIONS[Role.DESTINATION]


def test_what_the_table_does_not_have_cannot_happen() -> None:
    refused = 0
    for role, state, happened in product(Role, State, Input):
        if state not in TRANSITIONS[role] or happened in TRANSITIONS[role][state]:
            continue
        handover = Handover(role, state)
        with pytest.raises(ControlError, match=r"migration\.over"):
            handover.step(happened)
        assert handover.state is state
        refused += 1
    assert refused > 50


def test_the_drawing_in_the_docs_is_the_tables() -> None:
    page = PAGE.read_text()
    assert BEGIN in page
    assert END in page
    assert drawn(page) == page, "run: python -m tests.session.diagram"
