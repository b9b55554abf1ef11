"""The chain: what is written, what is noticed, and what an agent that was killed leaves to the next one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealane.crypto.dsse import parse_certificate, parse_envelope, pre_authentication_encoding, sign_envelope
from sealane.crypto.identity import create_identity, save_identity
from sealane.crypto.signatures import SignatureInvalid
from sealane.errors import EvidenceError, SealaneError
from sealane.host.models import PeerTrust, Problem
from sealane.host.receipts.chain import Receipts
from sealane.host.receipts.statement import PAYLOAD_TYPE, canonical, digest_of, parse_receipt
from sealane.host.receipts.verify import Head, Report, receipts_in, verify_one
from tests.host.factories import NOW
from tests.host.receipts.rig import LANES, ReceiptHost, make_host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ReceiptHost]:
    made = make_host(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiptHost]:
    """Four receipts that no test changes for good."""
    made = make_host(tmp_path_factory.mktemp("chain"))
    for number in range(1, 5):
        made.end(number)
    yield made
    made.store.close()


def test_what_a_receipt_says(host: ReceiptHost) -> None:
    problem = Problem(title="t", status=409, detail="not allowed", code="migration.cancelled")
    issued = host.end(1, state="aborted", runs_at="source", problem=problem, peer_trust=PeerTrust(seen_at=NOW))
    assert issued.receipt == 1
    envelope, statement = parse_receipt(host.files()[0].read_bytes())
    value = json.loads(envelope.payload)
    assert (value["_type"], value["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "urn:sealane:migration-receipt:v1",
    )
    assert envelope.payload_type == "application/vnd.in-toto+json"
    assert value["subject"][1] == {"name": "stream", "digest": {"sha256": LANES}}
    said = statement.predicate
    assert (said.outcome.code, said.outcome.runs_at, said.bytes.wire) == ("migration.cancelled", "source", 7)
    assert said.verdicts.of_peer is not None
    assert (said.verdicts.of_peer.level, said.verdicts.of_peer.evidence) == (1, [])
    assert (said.protection.name, said.protection.readable) == ("sealed", "nothing")
    assert (said.previous, said.sequence, said.recovered) == ("0" * 64, 1, False)


def test_the_signature_covers_dsse_own_encoding() -> None:
    """The example of the DSSE specification (protocol.md)."""
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_an_undisturbed_chain_holds(chain: ReceiptHost) -> None:
    report = chain.verify()
    assert report.holds, report.problems
    assert (len(report.items), report.checked_end, report.notes) == (4, ["the journal's head"], [])


def test_once_for_each_state(host: ReceiptHost) -> None:
    doubt = host.journal(1, state="in-doubt", runs_at="in-doubt", epoch=None)
    assert host.receipts.issue(doubt).receipt == host.receipts.issue(doubt).receipt == 1
    assert host.end(1).receipt == 2
    assert host.receipts.issue(host.journal(3, state="copying")).receipt is None
    assert host.verify().holds


# What is noticed


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_byte_is_noticed(chain: ReceiptHost, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(chain.files()))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(
        st.sampled_from([bytes(changed), whole[:at], whole + bytes([at % 256]), whole[:at] + whole[at + 1 :]])
    )
    try:
        path.write_bytes(cut)
        alone = Report()
        verify_one(chain.paths, next(i for i in receipts_in(path.parent) if i.path == path), alone)
        assert not alone.holds, "by itself"
        assert not chain.verify().holds
    finally:
        path.write_bytes(whole)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_receipt_or_one_error(noise: bytes) -> None:
    with pytest.raises(EvidenceError):
        parse_receipt(noise)


def test_another_spelling_is_refused(chain: ReceiptHost) -> None:
    whole = chain.files()[0].read_bytes()
    with pytest.raises(ValueError, match="spelled"):
        parse_envelope(json.dumps(json.loads(whole)).encode())


@pytest.mark.parametrize(
    ("lost", "kind"),
    [([0], "missing"), ([1, 2], "missing"), ([3], "truncated"), ([2, 3], "truncated"), ([0, 1, 2, 3], "truncated")],
)
def test_lost_ones(chain: ReceiptHost, tmp_path: Path, lost: list[int], kind: str) -> None:
    files = chain.files()
    for each in lost:
        shutil.move(files[each], tmp_path)
    try:
        assert chain.kinds() == {kind} if kind == "truncated" else kind in chain.kinds()
    finally:
        for path in tmp_path.glob("*.dsse"):
            shutil.move(path, chain.receipts.directory)
    assert chain.verify().holds


def test_exchanged_ones(host: ReceiptHost) -> None:
    for number in range(1, 4):
        host.end(number)
    first, second, _ = host.files()
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert {"reordered", "changed"} <= host.kinds()


def resigned(host: ReceiptHost, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What whoever has the key can do: another statement under a good signature, and its digest in the journal."""
    value = json.loads(parse_envelope(path.read_bytes()).payload)
    change(value)
    data = sign_envelope(host.identity, PAYLOAD_TYPE, canonical(value)).encode()
    path.write_bytes(data)
    sequence = int(path.name[:6])
    host.store._db.execute("UPDATE receipts SET digest = ? WHERE sequence = ?", (digest_of(data), sequence))


def test_one_that_was_signed_anew_no_longer_fits_the_next(host: ReceiptHost) -> None:
    for number in range(1, 4):
        host.end(number)
    resigned(host, host.files()[1], lambda value: value["predicate"]["bytes"].update(wire=8))
    assert [(problem.kind, problem.receipt) for problem in host.verify().problems] == [("reordered", 3)]


def test_subjects_that_do_not_fit_the_statement(host: ReceiptHost) -> None:
    host.end(1)
    resigned(host, host.files()[0], lambda value: value["subject"][0]["digest"].update(sha256="0" * 64))
    assert host.kinds() == {"changed"}


def test_a_name_that_leads_elsewhere_is_never_a_file(host: ReceiptHost) -> None:
    with pytest.raises(SealaneError, match=r"internal\.error"):
        host.end(1, vm="../../x")
    assert host.files() == []


def test_a_second_file_of_the_same_number(host: ReceiptHost) -> None:
    host.end(1)
    shutil.copy(host.files()[0], host.receipts.directory / "000001-other.dsse")
    assert "reordered" in host.kinds()


def test_a_receipt_signed_by_somebody_else(host: ReceiptHost, tmp_path: Path) -> None:
    """Well formed, in its place, its head even in the journal: only the key is not this host's."""
    other = make_host(tmp_path, "host-x")
    other.end(1)
    host.end(1)
    path = host.files()[0]
    path.write_bytes(other.files()[0].read_bytes())
    host.store._db.execute("UPDATE receipts SET digest = ?", (digest_of(path.read_bytes()),))
    assert host.kinds() == {"unsigned"}
    other.store.close()


def test_a_chain_that_was_cut_with_its_journal_is_noticed_by_a_head_or_a_copy(
    host: ReceiptHost, tmp_path: Path
) -> None:
    for number in range(1, 4):
        host.end(number)
    report = host.verify()
    head = Head(3, report.items[-1].digest)
    copy = Path(shutil.copy(host.files()[2], tmp_path / "copy.dsse"))
    assert host.verify(head=head, copies=[copy]).holds
    host.files()[2].unlink()
    host.store._db.execute("DELETE FROM receipts WHERE sequence = 3")
    host.store._db.execute("DELETE FROM migrations WHERE number = 3")
    assert host.verify().holds, "nothing on this host tells of it any more"
    assert host.kinds(head=head) == {"truncated"}
    assert host.kinds(copies=[copy]) == {"truncated"}
    host.end(4)
    assert host.kinds(head=head) == {"changed"}
    assert host.kinds(copies=[copy]) == {"changed"}


def test_without_a_journal_the_end_is_not_said_to_be_checked(host: ReceiptHost, tmp_path: Path) -> None:
    host.end(1)
    shutil.move(host.paths.database, tmp_path / "away")
    report = host.verify()
    assert report.checked_end == []
    assert "would not be noticed" in report.notes[0]


# Crashes


def test_killed_before_the_receipt(host: ReceiptHost) -> None:
    host.end(1)
    host.journal(2)
    assert host.kinds() == {"missing"}
    (late,) = host.receipts.catch_up()
    assert (late.number, late.receipt) == (2, 2)
    assert parse_receipt(host.files()[1].read_bytes())[1].predicate.recovered
    assert host.verify().holds


def test_killed_between_the_receipt_and_its_note(host: ReceiptHost) -> None:
    host.end(1)
    host.end(2)
    host.store._db.execute("DELETE FROM receipts WHERE sequence = 2")
    before = host.files()[1].read_bytes()
    assert "not in the journal yet" in host.verify().notes[0]
    (adopted,) = host.receipts.catch_up()
    assert (adopted.receipt, host.files()[1].read_bytes()) == (2, before)
    assert host.verify().holds
    assert host.receipts.catch_up() == []


def test_a_foreign_file_in_the_next_place_is_put_aside(host: ReceiptHost) -> None:
    host.end(1)
    shutil.copy(host.files()[0], host.receipts.directory / "000002-web01.dsse")
    host.journal(2)
    assert [each.receipt for each in host.receipts.catch_up()] == [2]
    assert (host.receipts.directory / "000002-web01.rejected").exists()
    assert host.verify().holds


def test_a_full_disk_is_told_and_mended_later(host: ReceiptHost, monkeypatch: pytest.MonkeyPatch) -> None:
    done = host.journal(1)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _full)
        with pytest.raises(SealaneError, match=r"host\.disk-full"):
            host.receipts.issue(done)
    assert [each.receipt for each in host.receipts.catch_up()] == [1]
    assert host.verify().holds


def _full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_renewed_identity_leaves_the_old_receipts_good(host: ReceiptHost) -> None:
    host.end(1)
    renewed = create_identity("host-a", now=NOW)
    save_identity(host.paths, renewed, replace=True)
    host.receipts = Receipts(host.paths.state, host.store, renewed, "host-a")
    host.end(2)
    assert host.verify().holds
    for kept in host.receipts.directory.glob("certificates/*"):
        kept.unlink()
    assert host.kinds() == {"unsigned"}


# The other end's


def both_ends(tmp_path: Path) -> tuple[ReceiptHost, ReceiptHost]:
    return make_host(tmp_path, "a"), make_host(tmp_path, "b")


def test_the_other_ends_receipt_is_kept_and_named(tmp_path: Path) -> None:
    a, b = both_ends(tmp_path)
    there = b.end(1, role="destination", peer="a", peer_fingerprint=a.identity.fingerprint)
    theirs = b.receipts.read(there)
    assert theirs is not None
    here = a.journal(1, peer="b", peer_fingerprint=b.identity.fingerprint)
    digest = a.receipts.keep_peers(here, theirs, b.identity.certificate_pem)
    assert digest == digest_of(theirs)
    mine = a.receipts.read(a.receipts.issue(here.model_copy(update={"peer_receipt": digest})))
    assert mine is not None
    b.receipts.keep_peers(there, mine, a.identity.certificate_pem)
    assert a.verify().holds
    assert b.verify().holds
    kept = next((a.receipts.directory / "peers").iterdir())
    kept.write_bytes(theirs.replace(b"A", b"B", 1))
    assert a.kinds() == {"peer-copy"}
    kept.unlink()
    assert a.kinds() == {"peer-copy"}
    for end in (a, b):
        end.store.close()


@pytest.mark.parametrize(
    "other",
    [
        {"epoch": 2},
        {"stream_digest": "cd" * 32},
        {"vm": "db02"},
        {"state": "aborted", "runs_at": "source"},
        {"role": "source"},
        {"peer_fingerprint": "SHA256:" + "0" * 64},
        {"id": "f" * 32},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_receipt_that_tells_another_story_is_not_kept(tmp_path: Path, other: dict[str, object]) -> None:
    a, b = both_ends(tmp_path)
    facts = {"role": "destination", "peer": "a", "peer_fingerprint": a.identity.fingerprint, **other}
    theirs = b.receipts.read(b.end(1, **facts))
    assert theirs is not None
    here = a.journal(1, peer="b", peer_fingerprint=b.identity.fingerprint)
    with pytest.raises(SealaneError, match=r"peer\.message"):
        a.receipts.keep_peers(here, theirs, b.identity.certificate_pem)
    for end in (a, b):
        end.store.close()


def test_a_receipt_under_another_key_is_not_kept(tmp_path: Path) -> None:
    a, b = both_ends(tmp_path)
    theirs = b.receipts.read(b.end(1, role="destination", peer="a", peer_fingerprint=a.identity.fingerprint))
    assert theirs is not None
    here = a.journal(1, peer="b", peer_fingerprint=b.identity.fingerprint)
    with pytest.raises(SealaneError, match="another certificate"):
        a.receipts.keep_peers(here, theirs, a.identity.certificate_pem)
    envelope = parse_envelope(theirs)
    with pytest.raises(SignatureInvalid):
        envelope.verify(parse_certificate(a.identity.certificate_pem))
    forged = theirs.replace(envelope.encode()[-12:-6], b"AAAAAA")
    with pytest.raises(SealaneError, match=r"peer\.message"):
        a.receipts.keep_peers(here, forged, b.identity.certificate_pem)
    for end in (a, b):
        end.store.close()
