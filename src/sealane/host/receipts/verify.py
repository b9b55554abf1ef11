"""Looks at a host's receipts without its agent: what is missing, changed, out of place, or cut off at the end.

Each receipt names the digest of the one before, so a change or a gap shows in the files alone. The end of the chain shows
only against something else: the journal's head (`sealane.db`), a head that was noted elsewhere (`Head`), or copies of these
receipts that other hosts hold. docs/receipts.md says what none of these can notice.
"""

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sealane.crypto.dsse import Certificate, parse_certificate
from sealane.crypto.signatures import SignatureInvalid
from sealane.errors import EvidenceError, HostError
from sealane.host.models import Migration
from sealane.host.receipts.chain import certificate_path, load_certificate, why_not_counterpart
from sealane.host.receipts.statement import NO_RECEIPT, RECEIPT_BYTES_MAX, Statement, digest_of, parse_receipt
from sealane.paths import Paths

_NAME: Final = re.compile(r"^([0-9]{6,12})-[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.dsse$")


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold: `kind` is missing, changed, reordered, truncated, unsigned, foreign or peer-copy."""

    kind: str
    receipt: int | None
    words: str


@dataclass(frozen=True)
class Head:
    """Number and digest of a receipt, noted at some time outside this host."""

    sequence: int
    digest: str


@dataclass(frozen=True)
class Item:
    """One receipt as it lies there; without a statement where it cannot be read."""

    sequence: int
    path: Path
    digest: str
    statement: Statement | None = None


@dataclass
class Report:
    """What was seen. `checked_end` names what the chain's end was held against."""

    items: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked_end: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    def add(self, kind: str, receipt: int | None, words: str) -> None:
        """One more problem."""
        self.problems.append(Problem(kind, receipt, words))


@dataclass(frozen=True)
class _Journal:
    """What the journal knows: the digest of each receipt, and migrations that rest without one."""

    digests: dict[int, str]
    without: list[int]


def receipts_in(directory: Path) -> list[Item]:
    """The receipts of a directory in the order of their names; raises `host.permission`, and nothing for what is in them."""
    try:
        names = sorted(path for path in directory.iterdir() if _NAME.match(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError("host.permission", f"{directory}: {error.strerror}") from error
    return sorted((_item(path) for path in names), key=lambda item: item.sequence)


def _item(path: Path) -> Item:
    match = _NAME.match(path.name)
    number = int(match[1]) if match else 0
    data = read_bounded(path)
    try:
        return Item(number, path, digest_of(data), parse_receipt(data)[1])
    except EvidenceError:
        return Item(number, path, digest_of(data))


def read_bounded(path: Path) -> bytes:
    """A file's bytes, one more than a receipt can have at the most; raises `host.permission`."""
    try:
        with path.open("rb") as file:
            return file.read(RECEIPT_BYTES_MAX + 1)
    except OSError as error:
        raise HostError("host.permission", f"{path}: {error.strerror}") from error


def verify_chain(paths: Paths, *, head: Head | None = None, copies: Iterable[Path] = ()) -> Report:
    """All of this host's receipts against each other, the journal, a noted head, and copies that others held."""
    report = Report(receipts_in(paths.state / "receipts"))
    _check_files(report, paths)
    journal = _read_journal(paths.database, report)
    if journal is not None:
        _check_journal(report, journal)
    if head is not None:
        _check_head(report, head)
    for path in copies:
        _check_copy(report, path, paths)
    return report


def verify_one(paths: Paths, item: Item, report: Report) -> None:
    """One receipt of ours by itself: its spelling, its signature, its place in its own words, the peer's copy."""
    data = read_bounded(item.path)
    try:
        envelope, statement = parse_receipt(data)
    except EvidenceError as error:
        report.add("changed", item.sequence, f"receipt {item.sequence} cannot be read: {error.detail}")
        return
    said = statement.predicate
    certificate = _own_certificate(paths, said.signer)
    if certificate is None:
        report.add(
            "unsigned", item.sequence, f"receipt {item.sequence} names {said.signer}, which is no key of this host"
        )
        return
    try:
        envelope.verify(certificate)
    except SignatureInvalid:
        report.add("changed", item.sequence, f"receipt {item.sequence}'s signature does not hold")
        return
    if item.path.name != f"{said.sequence:06d}-{said.migration.vm}.dsse":
        report.add("reordered", item.sequence, f"{item.path.name} is not what receipt {said.sequence} was called")
    _check_peers_copy(report, paths, item.sequence, statement)


def _check_files(report: Report, paths: Paths) -> None:
    expected, previous = 1, NO_RECEIPT
    for item in report.items:
        if item.sequence < expected:
            report.add("reordered", item.sequence, f"there is a second receipt {item.sequence}: {item.path.name}")
            continue
        if item.sequence > expected:
            gone = (
                f"receipt {expected} is"
                if item.sequence == expected + 1
                else f"receipts {expected} to {item.sequence - 1} are"
            )
            report.add("missing", expected, f"{gone} missing")
        verify_one(paths, item, report)
        named = item.statement.predicate.previous if item.statement else None
        if item.sequence == expected and named is not None and named != previous:
            words = f"receipt {item.sequence} names another receipt before it than the one that lies there"
            report.add("reordered", item.sequence, words)
        expected, previous = item.sequence + 1, item.digest


def _read_journal(database: Path, report: Report) -> _Journal | None:
    """The head's side; without it a chain that was cut at its end looks whole, which is told."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5.0)) as db:
            digests = {
                int(number): str(digest) for number, digest in db.execute("SELECT sequence, digest FROM receipts")
            }
            without = db.execute(
                "SELECT number FROM migrations WHERE state IN ('completed', 'aborted', 'in-doubt') AND NOT EXISTS "
                "(SELECT 1 FROM receipts WHERE receipts.migration = migrations.id AND receipts.state = migrations.state)"
            ).fetchall()
    except (sqlite3.Error, ValueError) as error:
        report.notes.append(f"the journal cannot be read ({error}): receipts missing at the end would not be noticed")
        return None
    report.checked_end.append("the journal's head")
    return _Journal(digests, [int(row[0]) for row in without])


def _check_journal(report: Report, journal: _Journal) -> None:
    found = {item.sequence: item for item in report.items}
    last = max(found, default=0)
    for number, digest in sorted(journal.digests.items()):
        if number not in found:
            if number > last:
                report.add("truncated", number, f"receipt {number} is in the journal and no longer here")
        elif found[number].digest != digest:
            report.add("changed", number, f"receipt {number} is not the one that the journal noted")
    for number in sorted(set(found) - set(journal.digests)):
        if number > max(journal.digests, default=0):
            report.notes.append(f"receipt {number} is not in the journal yet; the agent notes it at its next start")
        else:
            report.add("foreign", number, f"receipt {number} is not in the journal")
    for number in journal.without:
        report.add("missing", None, f"migration {number} has ended and has no receipt (a starting agent writes it)")


def _check_head(report: Report, head: Head) -> None:
    report.checked_end.append("the head that was given")
    found = next((item for item in report.items if item.sequence == head.sequence), None)
    if found is None:
        report.add("truncated", head.sequence, f"receipt {head.sequence}, the head that was given, is not here")
    elif found.digest != head.digest:
        report.add("changed", head.sequence, f"receipt {head.sequence} is not the one of the head that was given")


def _check_copy(report: Report, path: Path, paths: Paths) -> None:
    """A receipt that came from elsewhere: one of ours must be in the chain as it is, a peer's must hold by itself."""
    data = read_bounded(path)
    try:
        envelope, statement = parse_receipt(data)
    except EvidenceError as error:
        report.add("foreign", None, f"{path}: {error.detail}")
        return
    said = statement.predicate
    own = _own_certificate(paths, said.signer)
    certificate = own or _peer_certificate(paths, said.signer)
    if certificate is None:
        report.add("unsigned", None, f"{path} is signed by {said.signer}, which is not known here")
        return
    try:
        envelope.verify(certificate)
    except SignatureInvalid:
        report.add("foreign", None, f"{path}: the signature does not hold")
        return
    if own is None:
        report.notes.append(
            f"{path}: receipt {said.sequence} of {certificate.name}, {said.signer}; its signature holds"
        )
        return
    report.checked_end.append(f"{path.name}")
    found = next((item for item in report.items if item.sequence == said.sequence), None)
    if found is None:
        report.add("truncated", said.sequence, f"receipt {said.sequence}, of which {path} is a copy, is not here")
    elif found.digest != digest_of(data):
        report.add("changed", said.sequence, f"receipt {said.sequence} differs from its copy {path}")


def _check_peers_copy(report: Report, paths: Paths, sequence: int, ours: Statement) -> None:
    said = ours.predicate
    path = paths.state / "receipts" / "peers" / f"{said.migration.id}.dsse"
    if not path.exists():
        if said.peer_receipt is not None:
            report.add("peer-copy", sequence, f"the other end's receipt, which receipt {sequence} names, is missing")
        return
    data = read_bounded(path)
    if said.peer_receipt is not None and digest_of(data) != said.peer_receipt:
        report.add("peer-copy", sequence, f"the other end's receipt is not the one that receipt {sequence} names")
        return
    there = said.hosts.destination if said.migration.role == "source" else said.hosts.source
    certificate = _peer_certificate(paths, there.fingerprint or "")
    try:
        envelope, theirs = parse_receipt(data)
        if certificate is None:
            raise EvidenceError("receipt.malformed", "its certificate is missing")
        envelope.verify(certificate)
    except (EvidenceError, SignatureInvalid) as error:
        why = str(error) or "its signature does not hold"
        report.add("peer-copy", sequence, f"the other end's receipt to receipt {sequence}: {why}")
        return
    if (wrong := why_not_counterpart(theirs, _as_migration(ours), said.signer)) is not None:
        report.add("peer-copy", sequence, f"the other end's receipt contradicts receipt {sequence}: {wrong}")


def _as_migration(statement: Statement) -> Migration:
    """What the comparison with the other end needs of our own statement."""
    said = statement.predicate
    there = said.hosts.destination if said.migration.role == "source" else said.hosts.source
    return Migration(
        id=said.migration.id,
        number=said.migration.number,
        vm=said.migration.vm,
        role=said.migration.role,
        peer=there.name,
        state=said.outcome.state,
        runs_at=said.outcome.runs_at,
        started_at=said.times.started_at,
        epoch=said.migration.epoch,
        stream_digest=said.transcript.lanes,
        peer_fingerprint=there.fingerprint,
    )


def _own_certificate(paths: Paths, fingerprint: str) -> Certificate | None:
    """The present identity's certificate, or a kept one of an earlier identity of this host."""
    with contextlib.suppress(OSError, ValueError):
        present = parse_certificate(paths.identity_certificate.read_bytes())
        if present.fingerprint == fingerprint:
            return present
    return load_certificate(certificate_path(paths.state / "receipts", "own", fingerprint), fingerprint)


def _peer_certificate(paths: Paths, fingerprint: str) -> Certificate | None:
    return load_certificate(certificate_path(paths.state / "receipts", "peer", fingerprint), fingerprint)


def statements(items: Iterable[Item]) -> Iterator[tuple[Item, Statement]]:
    """Those that can be read."""
    for item in items:
        if item.statement is not None:
            yield item, item.statement
