"""What a receipt says: an in-toto statement (v1) inside a DSSE envelope, one spelling (sorted keys, no spaces).

The statement is made of the journal's snapshot alone, so that an agent that was killed between a migration's end and its
receipt can still write it. What this host does not know stands there as null.
"""

import hashlib
import json
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealane.crypto.dsse import ENVELOPE_BYTES_MAX, Envelope, EnvelopeMalformed, parse_envelope
from sealane.errors import EvidenceError
from sealane.host.models import Digest, Fingerprint, Migration, MigrationId, PeerTrust, PolicyDecision, VtpmFacts
from sealane.seal.protect import readable_words

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
# A URI as in-toto wants one (RFC 8141); it names the format and resolves to nothing.
PREDICATE_TYPE: Final = "urn:sealane:migration-receipt:v1"
# What the first receipt of a host names as the one before it.
NO_RECEIPT: Final = "0" * 64
RECEIPT_BYTES_MAX: Final = ENVELOPE_BYTES_MAX
_WORDS_MAX: Final = 1000
_REASONS_MAX: Final = 50


class _Part(BaseModel):
    """A part of the statement; a newer Sealane may say more, which is kept out of the way."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class MigrationPart(_Part):
    """Which migration, as the signing host numbers it. `epoch`: how often the VM was handed over, as that host knows it."""

    id: MigrationId
    number: int
    role: Literal["source", "destination"]
    vm: str
    epoch: int | None
    requested_by: str | None


class OutcomePart(_Part):
    """How it ended; `code` and `detail` where something was refused or failed."""

    state: Literal["completed", "aborted", "in-doubt"]
    runs_at: Literal["source", "destination", "in-doubt", "nowhere"]
    code: str | None
    detail: str | None


class HostPart(_Part):
    """A host, as the signing one calls it."""

    name: str
    fingerprint: Fingerprint | None


class HostsPart(_Part):
    """Both ends."""

    source: HostPart
    destination: HostPart


class VerdictsPart(_Part):
    """The signing host's verdict on the other; the other's verdict on this one stands in the other's receipt."""

    of_peer: PeerTrust | None


class ProtectionPart(_Part):
    """How the lanes were protected, and what that leaves readable on the wire."""

    name: str
    readable: str


class KeyExchangePart(_Part):
    """What the channel negotiated; null where it came to none."""

    tls: str | None
    group: str | None
    cipher: str | None


class TranscriptPart(_Part):
    """SHA-256 over every record of every lane, in both directions; the same at both ends."""

    lanes: Digest | None


class TimesPart(_Part):
    """By the signing host's clock; the spans in milliseconds as that end measured them."""

    started_at: datetime
    ended_at: datetime | None
    total_ms: float | None
    copy_ms: float | None
    downtime_ms: float | None


class BytesPart(_Part):
    """What crossed the network, both directions."""

    wire: int


class ResolutionPart(_Part):
    """How a doubt ended, or who gave up a half of a VM: what was decided, by whom, and what the other end had answered."""

    decision: Literal["own-here", "drop-here", "promised"]
    by: Literal["destination", "operator", "journal"]
    answer: Literal["ran", "promise", "under-way", "gone", "unknown", "none"]
    words: str
    user: str | None
    at: datetime


class Predicate(_Part):
    """A receipt's content. `previous` is the SHA-256 of the file of the receipt before, zeros for the first."""

    sequence: Annotated[int, Field(ge=1)]
    previous: Digest
    signer: Fingerprint
    recovered: bool
    migration: MigrationPart
    outcome: OutcomePart
    hosts: HostsPart
    verdicts: VerdictsPart
    policy: PolicyDecision | None
    protection: ProtectionPart
    key_exchange: KeyExchangePart
    transcript: TranscriptPart
    times: TimesPart
    bytes: BytesPart
    peer_receipt: Digest | None
    vtpm: VtpmFacts | None = None
    resolution: ResolutionPart | None = None


class Subject(_Part):
    """in-toto's ResourceDescriptor, as far as it is used."""

    name: str
    digest: dict[str, str]


class Statement(_Part):
    """in-toto's Statement v1 with our predicate."""

    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: list[Subject]
    predicate_type: Annotated[Literal["urn:sealane:migration-receipt:v1"], Field(alias="predicateType")]
    predicate: Predicate


def subjects(migration: str, vm: str, lanes: str | None) -> list[dict[str, Any]]:
    """What the statement is about: the migration, the same at both ends, and the stream, where there was one."""
    named = {"migration": migration, "vm": vm}
    found = [{"name": f"migration/{migration}", "digest": {"sha256": hashlib.sha256(canonical(named)).hexdigest()}}]
    if lanes is not None:
        found.append({"name": "stream", "digest": {"sha256": lanes}})
    return found


def make_statement(
    migration: Migration, *, sequence: int, previous: str, name: str, fingerprint: str, epoch: int, recovered: bool
) -> bytes:
    """The payload of a receipt; `name` and `fingerprint` are this host's, `epoch` the journal's for this VM."""
    ours: dict[str, Any] = {"name": name, "fingerprint": fingerprint}
    theirs: dict[str, Any] = {"name": migration.peer, "fingerprint": migration.peer_fingerprint}
    source, destination = (ours, theirs) if migration.role == "source" else (theirs, ours)
    problem, result = migration.problem, migration.result
    trust, policy = migration.peer_trust, migration.policy
    if trust is not None:
        trust = trust.model_copy(update={"reasons": [each[:_WORDS_MAX] for each in trust.reasons[:_REASONS_MAX]]})
    predicate = {
        "sequence": sequence,
        "previous": previous,
        "signer": fingerprint,
        "recovered": recovered,
        "migration": {
            "id": migration.id,
            "number": migration.number,
            "role": migration.role,
            "vm": migration.vm,
            "epoch": epoch if migration.epoch is None else migration.epoch,
            "requested_by": migration.requested_by,
        },
        "outcome": {
            "state": migration.state,
            "runs_at": migration.runs_at,
            "code": problem.code if problem else None,
            "detail": problem.detail[:_WORDS_MAX] if problem else None,
        },
        "hosts": {"source": source, "destination": destination},
        "verdicts": {"of_peer": None if trust is None else trust.model_dump(mode="json")},
        "policy": None if policy is None else policy.model_dump(mode="json"),
        "protection": {"name": migration.protection, "readable": readable_words(migration.protection)},
        "key_exchange": {"tls": migration.tls_version, "group": migration.kex_group, "cipher": migration.cipher},
        "transcript": {"lanes": migration.stream_digest},
        "times": {
            "started_at": migration.started_at.isoformat(),
            "ended_at": None if migration.ended_at is None else migration.ended_at.isoformat(),
            "total_ms": result.total_ms if result else None,
            "copy_ms": result.copy_ms if result else None,
            "downtime_ms": result.downtime_ms if result else None,
        },
        "bytes": {"wire": result.bytes_wire if result else migration.progress.bytes_wire},
        "peer_receipt": migration.peer_receipt,
        "vtpm": None if migration.vtpm is None else migration.vtpm.model_dump(mode="json"),
        "resolution": None if migration.resolution is None else migration.resolution.model_dump(mode="json"),
    }
    return canonical(
        {
            "_type": STATEMENT_TYPE,
            "subject": subjects(migration.id, migration.vm, migration.stream_digest),
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
    )


def parse_receipt(data: bytes) -> tuple[Envelope, Statement]:
    """Read untrusted bytes; raises EvidenceError `receipt.malformed`. The signature is the caller's to verify."""
    try:
        envelope = parse_envelope(data)
    except EnvelopeMalformed as error:
        raise EvidenceError("receipt.malformed", str(error)) from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise EvidenceError("receipt.malformed", f"the payload is no {PAYLOAD_TYPE}")
    try:
        statement = Statement.model_validate_json(envelope.payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EvidenceError("receipt.malformed", f"{where or 'the statement'}: {first['msg']}") from None
    predicate = statement.predicate
    if envelope.keyid != predicate.signer:
        raise EvidenceError("receipt.malformed", "the envelope names another key than the statement")
    about = subjects(predicate.migration.id, predicate.migration.vm, predicate.transcript.lanes)
    if [each.model_dump() for each in statement.subject] != about:
        raise EvidenceError("receipt.malformed", "the subjects do not fit what the statement says")
    return envelope, statement


def digest_of(data: bytes) -> str:
    """The digest by which a receipt is named: SHA-256 of its file."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: object) -> bytes:
    """The one spelling of JSON that is signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
