"""Policies between two real agents: a no at either end, with the VM running on and a receipt at both."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sealane.host.models import PolicyQuestion
from sealane.host.receipts.verify import receipts_in, verify_chain
from sealane.testing.pair import AgentHost
from tests.e2e.rig import Rig

pytestmark = pytest.mark.e2e


@contextmanager
def policy(end: AgentHost, text: str, entities: object = None) -> Iterator[None]:
    """While it lasts, that host has this policy."""
    directory = end.host.paths.config / "policy"
    directory.mkdir(exist_ok=True)
    files = [(directory / "own.cedar", text), (directory / "entities.json", json.dumps(entities or []))]
    for path, content in files:
        path.write_text(content)
    try:
        yield
    finally:
        for path, _ in files:
            path.unlink()


def last_words(end: AgentHost) -> tuple[str | None, str | None, str | None]:
    """Of the newest receipt: the code, the policy's decision, its digest; after all receipts were verified."""
    report = verify_chain(end.host.paths)
    assert report.holds, report.problems
    statement = receipts_in(end.host.paths.state / "receipts")[-1].statement
    assert statement is not None
    said = statement.predicate
    if said.policy is None:
        return said.outcome.code, None, None
    return said.outcome.code, said.policy.decision, said.policy.digest


def test_refused_at_the_source(rig: Rig) -> None:
    rule = 'permit (principal, action, resource); @id("not to there") forbid (principal, action == Action::"send", resource)'
    with policy(rig.home, f'{rule} when {{ context.peer == Host::"{rig.away.name}" }};'):
        attempt = rig.attempt()
        with rig.home.client() as client:
            answer = client.check_policy(PolicyQuestion(vm=rig.guest.name, host=rig.away.name)).decision
            (row,) = client.hosts(rig.guest.name)
    rig.assert_aborted(attempt, "policy.denied", destination=["policy.denied"])
    assert attempt.source.progress.bytes_wire == 0
    assert attempt.source.policy is not None
    assert attempt.source.policy.words == answer.words == 'forbidden by "not to there"'
    assert row.decision == answer
    assert last_words(rig.home) == ("policy.denied", "deny", answer.digest)
    assert last_words(rig.away) == ("policy.denied", None, None)


def test_refused_at_the_destination(rig: Rig) -> None:
    with policy(rig.away, 'permit (principal == Host::"elsewhere", action == Action::"receive", resource);'):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "policy.denied", destination=["policy.denied"])
    assert "no policy allows it" in (attempt.source.problem.detail if attempt.source.problem else "")
    assert last_words(rig.home)[:2] == ("policy.denied", "allow")
    assert last_words(rig.away)[:2] == ("policy.denied", "deny")


def test_a_broken_policy_allows_nothing(rig: Rig) -> None:
    with policy(rig.away, "permit (principal, action"):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "policy.broken", destination=["policy.broken"])


def test_the_user_who_asks_is_whom_the_kernel_names(rig: Rig) -> None:
    """Only this user, by name; and the destination by the group that its policy puts the source into."""
    member = [
        {"uid": {"type": "Host", "id": rig.home.name}, "attrs": {}, "parents": [{"type": "HostGroup", "id": "rack"}]}
    ]
    me = Path("/proc/self").owner()
    with (
        policy(rig.home, f'@id("me") permit (principal == User::"{me}", action == Action::"send", resource);'),
        policy(rig.away, '@id("rack") permit (principal in HostGroup::"rack", action, resource);', member),
    ):
        attempt = rig.attempt()
    rig.assert_arrived(attempt)
    assert attempt.source.requested_by == me
    assert attempt.source.policy is not None
    assert attempt.source.policy.words == 'allowed by "me"'
    assert attempt.destination is not None
    assert attempt.destination.policy is not None
    assert attempt.destination.policy.words == 'allowed by "rack"'
    assert attempt.destination.requested_by is None
