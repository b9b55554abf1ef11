"""What must hold after evidence was refused: nothing moved, and both ends' receipts say why, and about whom."""

from sealane.host.receipts.statement import Predicate
from sealane.host.receipts.verify import receipts_in, verify_chain
from sealane.testing.pair import AgentHost
from tests.e2e.rig import Attempt, Rig


def last_receipt(end: AgentHost) -> Predicate:
    report = verify_chain(end.host.paths)
    assert report.holds, report.problems
    statement = receipts_in(end.host.paths.state / "receipts")[-1].statement
    assert statement is not None
    return statement.predicate


def assert_refused(
    rig: Rig, attempt: Attempt, code: str, judge: AgentHost | None, *, liar: AgentHost | None = None, own: str = ""
) -> None:
    """Nothing moved, and both ends' receipts say why, and about whom; the `liar` may have ended with its `own` code."""
    codes = {end.name: {code, own} if end is liar else {code} for end in (rig.home, rig.away)}
    rig.assert_aborted(attempt, *codes[rig.home.name])
    assert attempt.source.progress.bytes_wire == 0
    for end, peer in ((rig.home, rig.away), (rig.away, rig.home)):
        said = last_receipt(end)
        role = "source" if end is rig.home else "destination"
        assert (said.migration.id, said.migration.role) == (attempt.source.id, role)
        assert said.outcome.state == "aborted", (end.name, said.outcome)
        assert said.outcome.code in codes[end.name], (end.name, said.outcome)
        assert said.outcome.detail
        assert said.migration.vm == rig.guest.name
        there = said.hosts.destination if end is rig.home else said.hosts.source
        assert (there.name, there.fingerprint) == (peer.name, peer.identity.fingerprint)
        assert said.key_exchange.group
        assert said.bytes.wire == 0
        if end is judge:
            verdict = said.verdicts.of_peer
            assert verdict is not None
            assert verdict.reasons
            assert {each.kind for each in verdict.evidence} >= {"tpm.quote"}
