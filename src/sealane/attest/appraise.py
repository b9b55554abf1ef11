"""Everything together: files of any kind in, one verdict out.

The kind of each file is found from its content, never from its name. Bytes that fit no kind raise EvidenceError.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypeAlias, TypeVar

from sealane.attest import eventlog, ima, platformlog, quotes, snp, software, tpm
from sealane.attest.certtable import looks_like_table, parse_table
from sealane.attest.collateral import Collateral, parse_json_collateral
from sealane.attest.dcap import appraise_quote
from sealane.attest.measured import TpmEvidence, appraise_boot_log, appraise_runtime_log, appraise_tpm
from sealane.attest.platform import judge_platform_log
from sealane.attest.reading import EVIDENCE_BYTES_MAX
from sealane.attest.reasons import Level
from sealane.attest.reference import NO_REFERENCE, Reference
from sealane.attest.verdict import Appraisal, Findings, Verdict, conclude
from sealane.crypto.chains import CertificateMalformed, parse_certificates, parse_revocation_list
from sealane.crypto.signatures import KeyMalformed, parse_public_key
from sealane.errors import EvidenceError

FILES_MAX: Final = 64
# One log as large as any may be, and as much again: what is parsed takes some times as much memory.
TOTAL_BYTES_MAX: Final = 2 * EVIDENCE_BYTES_MAX
_Thing = TypeVar("_Thing")


@dataclass
class Material:
    """What was recognised, each with the name under which it came."""

    dcap_quotes: list[tuple[str, quotes.DcapQuote]] = field(default_factory=list)
    snp_reports: list[tuple[str, snp.SnpReport]] = field(default_factory=list)
    tpm_quotes: list[tuple[str, tpm.TpmQuote]] = field(default_factory=list)
    tpm_signatures: list[tuple[str, tpm.TpmSignature]] = field(default_factory=list)
    tpm_keys: list[tuple[str, tpm.TpmKey]] = field(default_factory=list)
    pcr_values: list[tuple[str, tpm.PcrValues]] = field(default_factory=list)
    boot_logs: list[tuple[str, eventlog.EventLog]] = field(default_factory=list)
    runtime_logs: list[tuple[str, ima.ImaLog]] = field(default_factory=list)
    platform_logs: list[tuple[str, platformlog.PlatformLog]] = field(default_factory=list)
    statements: list[tuple[str, software.SoftwareStatement]] = field(default_factory=list)
    collateral: Collateral = field(default_factory=Collateral)
    kinds: list[tuple[str, str]] = field(default_factory=list)
    total_bytes: int = 0

    def add(self, name: str, data: bytes) -> str:
        """Recognise and parse one file; gives its kind. Raises EvidenceError."""
        if len(data) > EVIDENCE_BYTES_MAX:
            raise EvidenceError("attest.too-large", f"{name}: {len(data)} bytes")
        if len(self.kinds) >= FILES_MAX:
            raise EvidenceError("attest.too-large", f"more than {FILES_MAX} files")
        self.total_bytes += len(data)
        if self.total_bytes > TOTAL_BYTES_MAX:
            raise EvidenceError("attest.too-large", f"{name} and the files before it: {self.total_bytes} bytes")
        for kind, looks, take in _KINDS:
            if looks(data):
                told = take(self, name, data) or kind
                self.kinds.append((name, told))
                return told
        raise EvidenceError("attest.unknown-kind", f"{name}: {len(data)} bytes of no kind that is known")


def appraise(material: Material, reference: Reference = NO_REFERENCE, *, now: datetime) -> Verdict:
    """The verdict over everything in `material` at the time `now` (aware)."""
    found: list[Appraisal] = []
    boot_log = material.boot_logs[0][1] if len(material.boot_logs) == 1 else None
    for name, quote in material.dcap_quotes:
        log = None if material.tpm_quotes else boot_log
        found.append(appraise_quote(quote, material.collateral, reference, now, name, event_log=log))
    for name, report in material.snp_reports:
        found.append(snp.appraise_report(report, material.collateral, reference, now, name))
    if material.tpm_quotes:
        found.append(_appraise_tpm(material, reference))
    else:
        tied = any(quote.tee == quotes.TEE_TDX for _, quote in material.dcap_quotes) and boot_log is not None
        if not tied:
            found += [appraise_boot_log(log, reference, name) for name, log in material.boot_logs]
        found += [appraise_runtime_log(log, reference, name) for name, log in material.runtime_logs]
    platform = material.platform_logs[0][1] if len(material.platform_logs) == 1 else None
    for name, statement in material.statements:
        found.append(software.appraise_software(statement, platform, reference, name))
    if not material.tpm_quotes and not material.statements:
        found += [_unquoted(log, reference, name) for name, log in material.platform_logs]
    if not found:
        findings = Findings("evidence")
        findings.add("evidence.none", "nothing that was given is evidence (a quote, a report or a log)")
        found.append(conclude(findings, kind="nothing", ceiling=Level.NOTHING))
    return Verdict(tuple(found), reference.wanted)


def _unquoted(log: platformlog.PlatformLog, reference: Reference, name: str) -> Appraisal:
    findings = Findings(name)
    findings.add("platform.unquoted", "nothing signs this log: anybody can have written it")
    judge_platform_log(log, reference, findings)
    return conclude(findings, kind="platform log", ceiling=Level.HARDWARE_ROOTED)


def _appraise_tpm(material: Material, reference: Reference) -> Appraisal:
    name, quote = material.tpm_quotes[0]
    parts: dict[str, Sequence[object]] = {
        "TPM quotes": material.tpm_quotes,
        "signatures": material.tpm_signatures,
        "attestation keys": material.tpm_keys,
        "files of PCR values": material.pcr_values,
        "boot logs": material.boot_logs,
        "IMA logs": material.runtime_logs,
        "platform logs": material.platform_logs,
    }
    several = [what for what, things in parts.items() if len(things) > 1]
    if several:
        findings = Findings(name)
        findings.add("evidence.twice", f"several {' and '.join(several)}: which belong together cannot be told")
        return conclude(findings, kind="TPM 2.0 quote", ceiling=Level.NOTHING)
    evidence = TpmEvidence(
        quote,
        signature=_only(material.tpm_signatures),
        key=_only(material.tpm_keys) or _certified_key(material),
        values=_only(material.pcr_values),
        boot_log=_only(material.boot_logs),
        runtime_log=_only(material.runtime_logs),
        platform_log=_only(material.platform_logs),
    )
    return appraise_tpm(evidence, reference, name)


def _certified_key(material: Material) -> tpm.TpmKey | None:
    """The key of a certificate, where exactly one came; that it is known is the reference file's to say."""
    certificates = material.collateral.certificates
    return tpm.TpmKey(certificates[0].public_key, None) if len(certificates) == 1 else None


def _only(things: Sequence[tuple[str, _Thing]]) -> _Thing | None:
    return things[0][1] if things else None


def _take_json(material: Material, name: str, data: bytes) -> str:
    values = tpm.parse_pcr_values(data)
    if values is not None:
        material.pcr_values.append((name, values))
        return "PCR values"
    statement = software.parse_statement(data)
    if statement is not None:
        material.statements.append((name, statement))
        return "software statement"
    found = parse_json_collateral(data)
    if found is None:
        raise EvidenceError("attest.unknown-kind", f"{name}: JSON that is neither collateral nor PCR values")
    material.collateral.extend(found)
    return "collateral"


def _take_pki(material: Material, name: str, data: bytes) -> str:
    """Certificates, revocation lists and public keys, PEM or DER; a PEM file may hold several."""
    if b"-----BEGIN CERTIFICATE-----" in data or b"-----BEGIN X509 CERTIFICATE-----" in data:
        try:
            material.collateral.certificates += parse_certificates(data)
        except CertificateMalformed as error:
            raise EvidenceError("attest.malformed", f"{name}: {error}") from error
        return "certificates"
    for kind, take in (("certificate", _certificate), ("revocation list", _revocations), ("public key", _public_key)):
        try:
            take(material, name, data)
        except (CertificateMalformed, KeyMalformed):
            continue
        return kind
    raise EvidenceError("attest.malformed", f"{name}: neither a certificate, a revocation list nor a public key")


def _certificate(material: Material, name: str, data: bytes) -> None:
    material.collateral.certificates += parse_certificates(data)


def _revocations(material: Material, name: str, data: bytes) -> None:
    material.collateral.lists.append(parse_revocation_list(data))


def _public_key(material: Material, name: str, data: bytes) -> None:
    material.tpm_keys.append((name, tpm.TpmKey(parse_public_key(data), None)))


def _looks_like_pki(data: bytes) -> bool:
    """DER, or PEM with nothing but text in front: quotes hold PEM too, and one of an unknown version is no certificate."""
    before, begin, _ = data[:4096].partition(b"-----BEGIN ")
    return data[:2] in {b"\x30\x82", b"\x30\x81", b"\x30\x59", b"\x30\x76"} or bool(begin and b"\0" not in before)


_Take: TypeAlias = Callable[[Material, str, bytes], str | None]


def _into(pick: Callable[[Material], list[tuple[str, _Thing]]], parse: Callable[[bytes], _Thing]) -> _Take:
    def take(material: Material, name: str, data: bytes) -> None:
        pick(material).append((name, parse(data)))

    return take


def _take_table(material: Material, name: str, data: bytes) -> None:
    material.collateral.certificates += parse_table(data)


# Kind, how it is recognised, what is done with it. The first that fits decides, the most telling magic first.
_KINDS: Final[tuple[tuple[str, Callable[[bytes], bool], _Take], ...]] = (
    ("TPM quote", tpm.looks_like_quote, _into(lambda one: one.tpm_quotes, tpm.parse_tpm_quote)),
    (
        "platform log",
        platformlog.looks_like_platform_log,
        _into(lambda one: one.platform_logs, platformlog.parse_platform_log),
    ),
    ("JSON", lambda data: data.lstrip()[:1] == b"{", _take_json),
    ("IMA log", ima.looks_like_ima, _into(lambda one: one.runtime_logs, ima.parse_ima_log)),
    ("SEV-SNP report", snp.looks_like_report, _into(lambda one: one.snp_reports, snp.parse_report)),
    ("SGX or TDX quote", quotes.looks_like_quote, _into(lambda one: one.dcap_quotes, quotes.parse_quote)),
    ("certificates, lists, keys", _looks_like_pki, _take_pki),
    ("SEV-SNP certificate table", looks_like_table, _take_table),
    ("TPM signature", tpm.looks_like_signature, _into(lambda one: one.tpm_signatures, tpm.parse_tpm_signature)),
    ("TPM public area", tpm.looks_like_public, _into(lambda one: one.tpm_keys, tpm.parse_tpm_public)),
    ("event log", eventlog.looks_like_event_log, _into(lambda one: one.boot_logs, eventlog.parse_event_log)),
)
