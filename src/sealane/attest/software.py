"""Evidence of a host without a root of trust: a statement under its identity's plain key. It says who, not what runs.

    {"key": "<SubjectPublicKeyInfo, hex>", "log": "<SHA-256 of the platform log, hex>", "signature": "<hex>",
     "statement": "sealane software key, identity only", "user_data": "<hex>"}

Signed: "sealane v1 software statement" || SHA-256(user data) || log digest.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Final

from sealane.attest.expect import check_binding
from sealane.attest.platform import judge_platform_log
from sealane.attest.platformlog import PlatformLog
from sealane.attest.reading import decode_text, parse_hex, parse_json
from sealane.attest.reasons import Claim, Level
from sealane.attest.reference import Reference
from sealane.attest.verdict import Appraisal, Findings, conclude
from sealane.crypto.signatures import KeyMalformed, PublicKey, SignatureInvalid, parse_public_key
from sealane.errors import EvidenceError

STATEMENT: Final = "sealane software key, identity only"
ROOT: Final = "software key (identity only)"
_LABEL: Final = b"sealane v1 software statement"
_FIELDS: Final = {"key", "log", "signature", "statement", "user_data"}


@dataclass(frozen=True)
class SoftwareStatement:
    """A parsed statement."""

    key: PublicKey
    user_data: bytes
    log_digest: bytes
    signature: bytes = field(repr=False)


def signed_bytes(user_data: bytes, log_digest: bytes) -> bytes:
    """What the key signs."""
    return _LABEL + hashlib.sha256(user_data).digest() + log_digest


def encode_statement(key: bytes, user_data: bytes, log_digest: bytes, signature: bytes) -> bytes:
    """The statement as it travels; `key` is a SubjectPublicKeyInfo."""
    fields = {
        "key": key.hex(),
        "log": log_digest.hex(),
        "signature": signature.hex(),
        "statement": STATEMENT,
        "user_data": user_data.hex(),
    }
    return json.dumps(fields, sort_keys=True).encode()


def parse_statement(data: bytes) -> SoftwareStatement | None:
    """Read untrusted JSON; None where it is other JSON. Raises EvidenceError."""
    what = "software statement"
    value = parse_json(decode_text(data, what), what)
    if not isinstance(value, dict) or value.get("statement") != STATEMENT:
        return None
    if set(value) != _FIELDS:
        raise EvidenceError("attest.malformed", f"{what}: fields are missing, or there are others")
    try:
        key = parse_public_key(parse_hex(value["key"], what))
    except KeyMalformed as error:
        raise EvidenceError("attest.malformed", f"{what}: {error}") from error
    user_data, log = parse_hex(value["user_data"], what), parse_hex(value["log"], what, 32)
    return SoftwareStatement(key, user_data, log, parse_hex(value["signature"], what, 64))


def appraise_software(
    statement: SoftwareStatement, log: PlatformLog | None, reference: Reference, about: str
) -> Appraisal:
    """The statement, and the log that it names. Never more than level 1."""
    findings = Findings(about)
    findings.root = ROOT
    findings.add(
        "software.plain-key", "a plain key in a file: it says which host speaks, and nothing of what runs there"
    )
    try:
        statement.key.verify_ed25519(statement.signature, signed_bytes(statement.user_data, statement.log_digest))
    except SignatureInvalid:
        findings.add("software.signature", "the statement was not signed by its key")
        return conclude(findings, kind="software statement", ceiling=Level.IDENTITY)
    findings.facts["key"] = statement.key.digest
    if reference.identity_key is None or statement.key.digest != reference.identity_key.lower():
        findings.add(
            "software.key-unknown", "the statement is signed by another key than that of the peer's certificate"
        )
    else:
        findings.affirm(Claim.INSTANCE_IDENTITY)
    check_binding(statement.user_data, reference, findings)
    if log is None:
        findings.add("platform.log-missing", "the platform log is missing")
        return conclude(findings, kind="software statement", ceiling=Level.IDENTITY)
    if hashlib.sha256(b"".join(line + b"\n" for line in log.lines)).digest() != statement.log_digest:
        findings.add("platform.replay", "the platform log is not the one that was signed")
    judge_platform_log(log, reference, findings)
    return conclude(findings, kind="software statement", ceiling=Level.IDENTITY)
