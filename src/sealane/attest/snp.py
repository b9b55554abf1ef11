"""SEV-SNP attestation reports (AMD 56860, ATTESTATION_REPORT), little-endian, 1184 bytes:

    0x000 version    0x030 VMPL         0x050 report data 64        0x140 report id     0x1A0 chip id 64
    0x004 guest SVN  0x034 algorithm    0x090 measurement 48        0x160 id of the MA  0x1E0 committed TCB
    0x008 policy     0x038 current TCB  0x0C0 host data 32          0x180 reported TCB  0x1F0 launch TCB
    0x010 family, image id              0x0E0 id key, author key    0x188 CPUID (v3+)   0x2A0 signature r 72, s 72
    |<----------------------------------------- signed: 0 to 0x2A0 ------------------------------------->|

Checks in their order: chain of VCEK, ASK, ARK to a pinned ARK; signature; the VCEK's TCB and chip id against the report;
policy; VMPL; binding, host, reference values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from sealane.attest import der
from sealane.attest.chain import Anchors, build_chain, check_revocation, verify_chain
from sealane.attest.collateral import Collateral
from sealane.attest.expect import check_binding, check_host, check_values
from sealane.attest.reading import Reader, describe
from sealane.attest.reasons import Claim, Level
from sealane.attest.reference import Reference, SnpReference
from sealane.attest.roots import AMD_ROOTS
from sealane.attest.verdict import Appraisal, Findings, conclude
from sealane.crypto.chains import Certificate
from sealane.crypto.signatures import SignatureInvalid
from sealane.errors import EvidenceError

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
ECDSA_P384_SHA384: Final = 1
POLICY_SMT: Final = 1 << 16
POLICY_RESERVED_ONE: Final = 1 << 17
POLICY_MIGRATE_MA: Final = 1 << 18
POLICY_DEBUG: Final = 1 << 19
VCEK, VLEK = 0, 1
_OID: Final = "1.3.6.1.4.1.3704.1"
_OID_PRODUCT, _OID_HWID = f"{_OID}.2", f"{_OID}.4"
_OID_SPL: Final = {"boot_loader": f"{_OID}.3.1", "tee": f"{_OID}.3.2", "snp": f"{_OID}.3.3", "microcode": f"{_OID}.3.8"}
_OID_FMC: Final = f"{_OID}.3.9"
_SIGNERS: Final = {VCEK: "SEV-VCEK", VLEK: "SEV-VLEK"}
_FORGED: Final = (
    "chain.missing",
    "chain.broken",
    "chain.root-unknown",
    "snp.signing-key",
    "snp.signature",
)


@dataclass(frozen=True)
class SnpReport:
    """A report: what is signed, and the signature as r || s, big-endian, 48 bytes each."""

    version: int
    guest_svn: int
    policy: int
    vmpl: int
    signing_key: int
    chip_key_masked: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    reported_tcb: bytes
    chip_id: bytes
    family_model: tuple[int, int] | None
    signed: bytes = field(repr=False)
    signature: bytes | None = field(repr=False)

    def __repr__(self) -> str:
        return f"SnpReport(version={self.version}, {describe(self.signed)})"

    @property
    def debug(self) -> bool:
        """Policy bit 19: the host may debug the guest, that is read and write its memory."""
        return bool(self.policy & POLICY_DEBUG)


def looks_like_report(data: bytes) -> bool:
    """Whether version, length and algorithm are those of a report."""
    return (
        len(data) >= REPORT_BYTES
        and 2 <= int.from_bytes(data[:4], "little") <= 5
        and int.from_bytes(data[0x34:0x38], "little") == ECDSA_P384_SHA384
    )


def parse_report(data: bytes) -> SnpReport:
    """Read untrusted bytes; raises EvidenceError `attest.malformed`. Bytes past the report are not looked at."""
    raw = Reader(data, "SEV-SNP report").take(REPORT_BYTES)

    def number(offset: int, size: int) -> int:
        return int.from_bytes(raw[offset : offset + size], "little")

    version = number(0, 4)
    if not 2 <= version <= 5:
        raise EvidenceError("attest.malformed", f"SEV-SNP report: version {version} is not known (2 to 5 are)")
    if number(0x34, 4) != ECDSA_P384_SHA384:
        raise EvidenceError("attest.malformed", f"SEV-SNP report: signature algorithm {number(0x34, 4)} is not known")
    r, s = number(SIGNED_BYTES, 72), number(SIGNED_BYTES + 72, 72)
    fits = r < 1 << 384 and s < 1 << 384 and not any(raw[SIGNED_BYTES + 144 :])
    return SnpReport(
        version=version,
        guest_svn=number(4, 4),
        policy=number(8, 8),
        vmpl=number(0x30, 4),
        signing_key=number(0x48, 4) >> 2 & 7,
        chip_key_masked=bool(number(0x48, 4) & 2),
        report_data=raw[0x50:0x90],
        measurement=raw[0x90:0xC0],
        host_data=raw[0xC0:0xE0],
        id_key_digest=raw[0xE0:0x110],
        reported_tcb=raw[0x180:0x188],
        chip_id=raw[0x1A0:0x1E0],
        family_model=(raw[0x188], raw[0x189]) if version >= 3 else None,
        signed=raw[:SIGNED_BYTES],
        signature=r.to_bytes(48, "big") + s.to_bytes(48, "big") if fits else None,
    )


def appraise_report(
    report: SnpReport, collateral: Collateral, reference: Reference, now: datetime, about: str
) -> Appraisal:
    """A report with its certificates at the time `now` (aware)."""
    findings = Findings(about)
    anchors = Anchors(AMD_ROOTS, frozenset(reference.test_roots), reference.accept_test_roots)
    signer = _verify_signatures(report, collateral, anchors, now, findings)
    if signer is not None and not findings.has(*_FORGED):
        _judge_signer(report, signer, findings)
        expected = reference.snp or SnpReference()
        _judge_policy(report, expected, findings)
        _judge_tcb(report, signer, expected, findings)
        check_binding(report.report_data, reference, findings)
        masked = report.chip_key_masked or not any(report.chip_id)
        check_host([] if masked else [f"chip:{report.chip_id.hex()}"], reference, findings)
        _judge_values(report, expected, findings)
    return conclude(findings, kind=f"SEV-SNP report v{report.version}", ceiling=Level.ISOLATED)


def _verify_signatures(
    report: SnpReport, collateral: Collateral, anchors: Anchors, now: datetime, findings: Findings
) -> Certificate | None:
    name = _SIGNERS.get(report.signing_key)
    if name is None:
        findings.add("snp.signing-key", f"the report was signed by key {report.signing_key}: neither VCEK nor VLEK")
        return None
    candidates = [one for one in collateral.certificates if one.name == name]
    if not candidates:
        findings.add("chain.missing", f"the certificate of the key that signed the report ({name}) is missing")
        return None
    signer = next((one for one in candidates if _signed_by(report, one)), None)
    if signer is None:
        findings.add("snp.signature", f"the report was not signed by this {name}: it was changed, or is another chip's")
    chain = build_chain(signer or candidates[0], collateral.certificates)
    verify_chain(chain, anchors, now, findings)
    check_revocation(chain[1:], collateral.lists, now, findings, missing="snp.crl-missing")
    return signer


def _signed_by(report: SnpReport, signer: Certificate) -> bool:
    if report.signature is None or signer.public_key.kind != "P-384":
        return False
    try:
        signer.public_key.verify_ecdsa(report.signature, report.signed, hash_name="sha384")
    except SignatureInvalid:
        return False
    return True


def _judge_signer(report: SnpReport, signer: Certificate, findings: Findings) -> None:
    """The certificate's TCB and chip id against the report's (AMD 57230, 3)."""
    try:
        product, certified = _product(signer), _certified_tcb(signer)
    except EvidenceError as error:
        findings.add("snp.product", error.detail)
        return
    findings.facts["product"] = product
    reported = _tcb_parts(report.reported_tcb, turin=_OID_FMC_PRESENT in certified)
    certified.pop(_OID_FMC_PRESENT, None)
    if certified != reported:
        findings.add("snp.tcb-mismatch", f"the report's TCB {reported} is not the certificate's {certified}")
    else:
        findings.affirm(Claim.HARDWARE)
    if report.signing_key != VCEK:
        return  # a VLEK belongs to a provider, not to a chip
    chip = _chip_id(signer)
    if report.chip_key_masked or not any(report.chip_id):
        findings.add("snp.chip-masked", "the chip id is masked: the report does not say which chip made it")
    elif chip is None or report.chip_id != chip.ljust(64, b"\0"):
        findings.add("snp.chip-mismatch", "the report's chip id is not that of the certificate")


_OID_FMC_PRESENT: Final = "fmc present"


def _product(signer: Certificate) -> str:
    raw = signer.extension(_OID_PRODUCT)
    if raw is None:
        raise EvidenceError("attest.malformed", f"{signer.name} does not name its product")
    return der.read_one(raw, der.IA5_STRING, "productName").decode("ascii", "replace")


def _certified_tcb(signer: Certificate) -> dict[str, int]:
    found = {}
    for name, oid in _OID_SPL.items():
        raw = signer.extension(oid)
        if raw is None:
            raise EvidenceError("attest.malformed", f"{signer.name} does not state its {name} version")
        found[name] = der.read_integer(der.read_one(raw, der.INTEGER, name), name)
    fmc = signer.extension(_OID_FMC)
    found["fmc"] = 0 if fmc is None else der.read_integer(der.read_one(fmc, der.INTEGER, "fmc"), "fmc")
    if fmc is not None:
        found[_OID_FMC_PRESENT] = 1
    return found


def _tcb_parts(raw: bytes, *, turin: bool) -> dict[str, int]:
    """TCB_VERSION: Turin and later have FMC, boot loader, TEE, SNP in front; earlier chips have no FMC."""
    if turin:
        return {"boot_loader": raw[1], "tee": raw[2], "snp": raw[3], "microcode": raw[7], "fmc": raw[0]}
    return {"boot_loader": raw[0], "tee": raw[1], "snp": raw[6], "microcode": raw[7], "fmc": 0}


def _chip_id(signer: Certificate) -> bytes | None:
    """hwID: the bare bytes in the certificates of today, or an OCTET STRING around them."""
    raw = signer.extension(_OID_HWID)
    if raw is not None and len(raw) in {10, 66} and raw[0] == der.OCTET_STRING:
        return der.read_one(raw, der.OCTET_STRING, "hwID")
    return raw if raw else None


def _judge_policy(report: SnpReport, expected: SnpReference, findings: Findings) -> None:
    findings.facts |= {"policy": f"{report.policy:#x}", "vmpl": report.vmpl}
    if report.debug:
        findings.add(
            "tee.debug", "the guest's policy allows debugging (bit 19): the host can read and change its memory"
        )
    else:
        findings.affirm(Claim.RUNTIME_OPAQUE)
    if not report.policy & POLICY_RESERVED_ONE:
        findings.add("snp.policy", "policy bit 17, which is always one, is zero")
    if report.policy & POLICY_MIGRATE_MA:
        findings.add("snp.migration-agent", "the policy lets a migration agent move the guest's memory")
    if report.policy & POLICY_SMT and not expected.allow_smt:
        findings.add("snp.policy", "the policy allows SMT, which the reference file does not")
    if report.vmpl not in expected.vmpl:
        findings.add("snp.vmpl", f"the report was asked for at VMPL {report.vmpl}, expected are {expected.vmpl}")


def _judge_tcb(report: SnpReport, signer: Certificate, expected: SnpReference, findings: Findings) -> None:
    parts = _tcb_parts(report.reported_tcb, turin=signer.extension(_OID_FMC) is not None)
    findings.facts["reported_tcb"] = parts
    least = expected.minimum_tcb
    if least is None:
        findings.add("snp.tcb-unjudged", "no least TCB was given, and AMD publishes no list of levels to compare with")
        return
    below = [f"{name} {value}" for name, value in parts.items() if value < getattr(least, name)]
    if below:
        findings.add(
            "snp.tcb-out-of-date", f"the platform's TCB is below the least that is expected: {', '.join(below)}"
        )


def _judge_values(report: SnpReport, expected: SnpReference, findings: Findings) -> None:
    findings.facts |= {
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "guest_svn": report.guest_svn,
    }
    if expected.measurement is None:
        findings.add("reference.none", "no reference value says which guest is expected (measurement)")
        return
    values: list[tuple[str, bytes, Sequence[str] | None]] = [
        ("MEASUREMENT", report.measurement, expected.measurement),
        ("HOST_DATA", report.host_data, expected.host_data),
        ("ID_KEY_DIGEST", report.id_key_digest, expected.id_key_digest),
    ]
    good = check_values(values, findings)
    if expected.minimum_guest_svn is not None and report.guest_svn < expected.minimum_guest_svn:
        findings.add("reference.mismatch", f"GUEST_SVN is {report.guest_svn}, below {expected.minimum_guest_svn}")
        good = False
    if good:
        findings.affirm(Claim.EXECUTABLES)
