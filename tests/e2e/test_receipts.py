"""Receipts of real migrations, verified by the command line without an agent; and what was done to them, found."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sealane.host.receipts.verify import verify_chain
from sealane.testing.pair import AgentHost
from tests.e2e.rig import Rig, make_rig

pytestmark = pytest.mark.e2e


def receipts(end: AgentHost, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """`sealane receipts …` on that host: exit status and objects."""
    done = end.host.run(sys.executable, "-m", "sealane.cli", "--json", "receipts", *words, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def newest(end: AgentHost) -> dict[str, Any]:
    paths = sorted(end.host.paths.state.glob("receipts/*.dsse"))
    status, (shown,) = receipts(end, "show", str(int(paths[-1].name[:6])))
    assert status == 0
    predicate: dict[str, Any] = shown["statement"]["predicate"]
    return predicate


def test_a_completed_migration_leaves_one_at_both_ends(rig: Rig, tmp_path: Path) -> None:
    source, destination = rig.home, rig.away
    attempt = rig.attempt()
    rig.assert_arrived(attempt)
    for end in (source, destination):
        status, (report,) = receipts(end, "verify")
        assert (status, report["holds"], report["checked_end"]) == (0, True, ["the journal's head"]), report
    here, there = newest(source), newest(destination)
    assert here["transcript"] == there["transcript"] != {"lanes": None}
    assert here["migration"]["epoch"] == there["migration"]["epoch"] == attempt.source.epoch
    assert (
        here["hosts"]["source"]["fingerprint"] == there["hosts"]["source"]["fingerprint"] == source.identity.fingerprint
    )
    assert here["hosts"]["destination"]["fingerprint"] == destination.identity.fingerprint
    assert here["key_exchange"]["group"] == there["key_exchange"]["group"] == attempt.source.kex_group
    assert here["outcome"] == {"state": "completed", "runs_at": "destination", "code": None, "detail": None}
    assert here["bytes"]["wire"] > 0
    # each end holds the other's
    kept = [end.host.paths.state / "receipts" / "peers" / f"{attempt.source.id}.dsse" for end in (source, destination)]
    assert here["peer_receipt"]
    assert [path.exists() for path in kept] == [True, True]
    # and the source's copy of the destination's receipt is good against the destination's chain
    assert verify_chain(destination.host.paths, copies=[kept[0]]).holds
    status, (report,) = receipts(source, "verify", str(kept[0]))
    assert status == 0
    assert destination.identity.fingerprint in report["notes"][0]


def test_a_refused_migration_leaves_one_at_both_ends(rig: Rig) -> None:
    with rig.launched_as([], name="another"):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "check.vm-unknown", destination=["check.vm-unknown"])
    for end in (rig.home, rig.away):
        said = newest(end)
        assert (said["outcome"]["state"], said["outcome"]["code"]) == ("aborted", "check.vm-unknown")
        assert said["outcome"]["runs_at"] == "source"
        assert said["migration"]["id"] == attempt.source.id


def test_a_changed_one_is_found(rig: Rig) -> None:
    path = sorted(rig.home.host.paths.state.glob("receipts/*.dsse"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"sig", b"sog", 1))
    try:
        status, (report,) = receipts(rig.home, "verify")
        assert (status, report["holds"]) == (1, False)
        assert "changed" in {problem["kind"] for problem in report["problems"]}
    finally:
        path.write_bytes(whole)
    status, _ = receipts(rig.home, "verify")
    assert status == 0


def test_an_agent_that_is_killed_writes_it_at_its_next_start(rig: Rig) -> None:
    def kill(_: object) -> None:
        assert rig.home.agent is not None
        rig.home.agent.stop(9)

    found = rig.begin(max_bandwidth_bytes_per_s=8 << 20)
    with rig.home.client() as client:
        for event in client.events(found.id):
            if event.migration.state == "copying":
                break
    kill(found)
    rig.home.start_agent()
    rig.pair.await_end(rig.home, found.id)
    rig.assert_goes_on()
    said = newest(rig.home)
    assert (said["migration"]["id"], said["outcome"]["code"]) == (found.id, "agent.restarted")
    assert receipts(rig.home, "verify")[0] == 0


def test_refused_evidence_leaves_one_at_both_ends() -> None:
    """Both hosts ask for level 3 and show identity alone; the VM runs on."""
    with make_rig(settings="[attestation]\nleast_level = 3\n") as rig:
        attempt = rig.attempt()
        rig.assert_aborted(attempt, "attest.level")
        assert attempt.source.progress.bytes_wire == 0
        for end in (rig.home, rig.away):
            assert receipts(end, "verify")[0] == 0
            assert newest(end)["outcome"]["code"] == "attest.level"
            assert newest(end)["policy"] is None
