"""A short sample of the fault campaign (`./run faults` is the long one): its points, its checks, a fault of each kind."""

import pytest

from sealane.session.handover import IN_POSTCOPY, TRANSITIONS, Input, Role, State
from sealane.testing.campaign import OPENINGS, Campaign, page
from sealane.testing.faultdirector import Injection

pytestmark = pytest.mark.e2e

SAMPLE = (
    (Injection("source:qemu:migrate_continue:before", "kill-agent"),),
    (Injection("source:journal:completed:after", "kill-agent"),),
    (Injection("destination:journal:handing-over:after", "kill-agent"),),
    (Injection("destination:journal:switching-over:before", "disk-full"),),
    (Injection("source:qemu:migrate_continue:before", "cut-link"),),
    (Injection("destination:qemu:resume:before", "kill-qemu"),),
    (
        Injection("destination:qemu:resume:before", "kill-qemu"),
        Injection("source:step:handing-over:refused", "kill-agent"),
    ),
    (Injection("source:step:switching-over:released", "kill-enclave"),),
    # while a doubt is resolved: before the promise is journalled, and after the source has journalled what the answer means
    (OPENINGS[0], Injection("destination:journal:aborted:before#2", "kill-agent")),
    (OPENINGS[0], Injection("source:journal:aborted:after", "kill-agent")),
    (OPENINGS[1], Injection("source:journal:completed:after", "kill-agent")),
)
POSTCOPY_SAMPLE = (
    # given up, and QEMU not told: the destination's QEMU never switches, and the source takes the VM back
    ((Injection("postcopy:source:journal:postcopy:after", "kill-agent"),), "aborted"),
    # the destination's QEMU has switched, and nothing says so but QEMU itself
    ((Injection("postcopy:destination:journal:postcopy:before", "kill-agent"),), "completed"),
    # QEMU itself may wait for a page, and would open no monitor for the next agent, had the lanes gone with this one
    ((Injection("postcopy:destination:say:receipt:before", "kill-agent"),), "completed"),
    ((Injection("rejoined:destination:say:rejoined:after", "kill-enclave"),), "completed"),
    # the source's QEMU is gone with its host: the next agent asks all the same, since the destination has all, or never had the VM
    ((Injection("postcopy:source:step:postcopy:arrived", "kill-host"),), "completed"),
    ((Injection("postcopy:source:qemu:migrate_continue:before", "kill-host"),), "lost"),
    ((Injection("postcopy:source:qemu:migrate_continue:before", "kill-qemu"),), "lost"),
)
WENT_WRONG = {Input.FAILED, Input.REFUSED, Input.NOT_SENT}
TO_POSTCOPY = {Input.TICKET_HELD, Input.SWITCHED}
BEFORE_A_CUT = {State.PREPARING, State.COPYING, State.SWITCHING_OVER, State.POSTCOPY}
AFTER_A_CUT = {
    (State.POSTCOPY, Input.FAILED),
    (State.POSTCOPY_PAUSED, Input.REJOINED),
    (State.POSTCOPY, Input.ARRIVED),
}


@pytest.mark.timeout(600)
def test_sample() -> None:
    campaign = Campaign(seed=1)
    try:
        points = set(campaign.points())
        assert points >= on_the_way()
        for injections in SAMPLE:
            outcome = campaign.attempt(list(injections))
            assert not outcome.problems, outcome
            assert outcome.fired == [str(each) for each in injections], outcome
    finally:
        campaign.close()
    told = page(sorted(points), campaign.outcomes)
    assert f"{len(SAMPLE)} attempts with {sum(map(len, SAMPLE))} injected faults; a check failed after 0." in told


@pytest.mark.timeout(600)
def test_sample_of_postcopy() -> None:
    campaign = Campaign(seed=1)
    try:
        points = set(campaign.points("postcopy"))
        assert points >= on_the_way_by_postcopy()
        for injections, ending in POSTCOPY_SAMPLE:
            outcome = campaign.attempt(list(injections))
            assert not outcome.problems, outcome
            assert outcome.fired == [str(each) for each in injections], outcome
            assert outcome.ending == ending, outcome
    finally:
        campaign.close()


def on_the_way() -> set[str]:
    """Every transition of a precopy hand-over that goes well, and the journal's entry of each state."""
    found = set()
    for role, state, happened in transitions():
        if state not in IN_POSTCOPY | {State.IN_DOUBT} and happened not in WENT_WRONG | TO_POSTCOPY:
            found |= met(role, state, happened)
    return found


def on_the_way_by_postcopy() -> set[str]:
    """The same by postcopy; and, once the line was cut, every one that leads from there to the end."""
    found = set()
    for role, state, happened in transitions():
        by_precopy = {Input.RELEASED, Input.TICKET_JOURNALLED}
        if role is Role.DESTINATION:
            by_precopy.add(Input.VM_STOPPED)
        if state in BEFORE_A_CUT and happened not in WENT_WRONG | by_precopy:
            found |= met(role, state, happened, "postcopy:")
        if (state, happened) in AFTER_A_CUT:
            found |= met(role, state, happened, "rejoined:")
    return found


def transitions() -> list[tuple[Role, State, Input]]:
    return [(role, state, happened) for role in Role for state, row in TRANSITIONS[role].items() for happened in row]


def met(role: Role, state: State, happened: Input, prefix: str = "") -> set[str]:
    following = TRANSITIONS[role][state][happened]
    entries = {f"{prefix}{role}:journal:{following}:{when}" for when in ("before", "after")}
    return {f"{prefix}{role}:step:{state}:{happened}"} | entries
