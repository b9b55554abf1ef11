"""A short sample of the fault campaign (`./run faults` is the long one): its points, its checks, a fault of each kind."""

import pytest

from sealane.session.handover import TRANSITIONS, Input, Role
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


@pytest.mark.timeout(240)
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


def on_the_way() -> set[str]:
    """Every transition of a precopy hand-over that goes well, and the journal's entry of each state."""
    went_wrong = {Input.FAILED, Input.REFUSED, Input.NOT_SENT}
    postcopy = {Input.TICKET_HELD, Input.SWITCHED, Input.REJOINED, Input.ARRIVED}
    found = set()
    for role in Role:
        for state, steps in TRANSITIONS[role].items():
            for happened in set(steps) - went_wrong - postcopy:
                if state != "in-doubt":
                    found |= {f"{role}:step:{state}:{happened}"}
                    found |= {f"{role}:journal:{steps[happened]}:{when}" for when in ("before", "after")}
    return found
