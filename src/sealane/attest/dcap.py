"""Appraisal of SGX and TDX quotes. Signatures come before anything that is signed is believed:

    1  QE vendor                                    5  the signatures of TCB info and QE identity, their windows
    2  PCK chain: links, pinned root, validity      6  the quoting enclave against its identity
    3  QE report by the PCK, its binding to key     7  TCB level by FMSPC, PCE id, security versions; TDX module
       and auth data, quote by the attestation key  8  attributes: debug
    4  revocation lists                             9  binding, host, reference values

6 and 7 need 1 to 3 and 5; 8 and 9 need 1 to 3.
"""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sealane.attest.chain import Anchors, build_chain, check_revocation, verify_chain
from sealane.attest.collateral import (
    Collateral,
    EnclaveIdentity,
    SignedStatement,
    TcbInfo,
    parse_enclave_identity,
    parse_tcb_info,
)
from sealane.attest.eventlog import EventLog
from sealane.attest.expect import check_binding, check_host, check_values
from sealane.attest.pck import PckPlatform, parse_pck_platform
from sealane.attest.quotes import INTEL_QE_VENDOR, TEE_TDX, DcapQuote, EnclaveReport, TdReport
from sealane.attest.reasons import Claim, Level
from sealane.attest.reference import Reference
from sealane.attest.roots import INTEL_ROOTS
from sealane.attest.tcb import enclave_status, judge_status, platform_status
from sealane.attest.verdict import Appraisal, Findings, conclude
from sealane.crypto.chains import Certificate, CertificateMalformed, parse_certificates
from sealane.crypto.signatures import KeyMalformed, SignatureInvalid, key_from_point
from sealane.errors import EvidenceError

PCK_NAME: Final = "Intel SGX PCK Certificate"
PCK_ISSUERS: Final = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
TCB_SIGNER: Final = "Intel SGX TCB Signing"
# TD attributes that TDX modules up to 1.5 define: DEBUG 0, LASS 27, SEPT_VE_DISABLE 28, MIGRATABLE 29, PKS 30, KL 31,
# TPA 62, PERFMON 63.
_TD_ATTRIBUTES: Final = sum(1 << bit for bit in (0, 27, 28, 29, 30, 31, 62, 63))
_SEPT_VE_DISABLE: Final = 1 << 28
# Any of these, and nothing that the quote says is believed.
_FORGED: Final = (
    "chain.missing",
    "chain.broken",
    "chain.root-unknown",
    "dcap.pck",
    "dcap.qe-vendor",
    "dcap.qe-signature",
    "dcap.qe-binding",
    "dcap.quote-signature",
)


def appraise_quote(
    quote: DcapQuote,
    collateral: Collateral,
    reference: Reference,
    now: datetime,
    about: str,
    *,
    event_log: EventLog | None = None,
) -> Appraisal:
    """An SGX or TDX quote with its collateral at the time `now` (aware); a TDX quote also with its CC event log."""
    findings = Findings(about)
    anchors = Anchors(INTEL_ROOTS, frozenset(reference.test_roots), reference.accept_test_roots)
    platform = _verify_signatures(quote, collateral, anchors, now, findings)
    authentic = not findings.has(*_FORGED)
    statements = _Statements(quote, collateral, anchors, now, findings)
    info, identity = statements.tcb_info(platform), statements.enclave_identity()
    if authentic and platform is not None:
        if info is not None and identity is not None:
            _judge_tcb(quote, platform, info, identity, reference, findings)
        _judge_body(quote, findings)
        check_binding(quote.body.report_data, reference, findings)
        check_host([f"ppid:{platform.ppid.hex()}"], reference, findings)
        _judge_values(quote.body, reference, findings)
        if event_log is not None and isinstance(quote.body, TdReport):
            judge_log(event_log, quote.body, findings)
    return conclude(findings, kind=quote.kind, ceiling=Level.ISOLATED)


def _verify_signatures(
    quote: DcapQuote, collateral: Collateral, anchors: Anchors, now: datetime, findings: Findings
) -> PckPlatform | None:
    if quote.qe_vendor != INTEL_QE_VENDOR:
        findings.add("dcap.qe-vendor", f"the quoting enclave's vendor is {quote.qe_vendor.hex()}, not Intel")
    try:
        certificates = parse_certificates(quote.pck_chain_pem)
    except CertificateMalformed as error:
        findings.add("dcap.pck", f"the PCK chain in the quote cannot be read: {error}")
        return None
    leaf = certificates[0]
    chain = build_chain(leaf, certificates[1:])
    verify_chain(chain, anchors, now, findings)
    check_revocation(chain, collateral.lists, now, findings)
    if leaf.name != PCK_NAME or len(chain) < 2 or chain[1].name not in PCK_ISSUERS:
        findings.add("dcap.pck", f"{leaf.name!r} is not a PCK certificate of one of Intel's PCK authorities")
    verify_quote(quote, leaf, findings)
    try:
        return parse_pck_platform(leaf)
    except EvidenceError as error:
        findings.add("dcap.pck", error.detail)
        return None


def verify_quote(quote: DcapQuote, pck: Certificate, findings: Findings) -> None:
    """PCK over QE report, QE report over attestation key and auth data, attestation key over the quote."""
    try:
        pck.public_key.verify_ecdsa(quote.qe_signature, quote.qe_report.raw, hash_name="sha256")
    except SignatureInvalid:
        findings.add("dcap.qe-signature", "the quoting enclave's report was not signed by the platform's PCK")
    digest = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    if quote.qe_report.report_data != digest + bytes(32):
        findings.add("dcap.qe-binding", "the quoting enclave did not vouch for this attestation key and auth data")
    try:
        key = key_from_point("P-256", quote.attestation_key[:32], quote.attestation_key[32:])
        key.verify_ecdsa(quote.signature, quote.signed, hash_name="sha256")
    except (KeyMalformed, SignatureInvalid):
        findings.add(
            "dcap.quote-signature", "the quote was not signed by its attestation key: it was changed or made up"
        )


class _Statements:
    """The signed statements that belong to one quote."""

    def __init__(
        self, quote: DcapQuote, collateral: Collateral, anchors: Anchors, now: datetime, findings: Findings
    ) -> None:
        self.tdx = quote.tee == TEE_TDX
        self.collateral = collateral
        self.anchors = anchors
        self.now = now
        self.findings = findings

    def tcb_info(self, platform: PckPlatform | None) -> TcbInfo | None:
        """The TCB info for the platform, when its signature holds; None with reasons otherwise."""
        tee = "TDX" if self.tdx else "SGX"
        found = [(one, parse_tcb_info(one)) for one in self.collateral.statements if one.kind == "tcbInfo"]
        if not found:
            self.findings.add("collateral.missing", "no TCB info was given, so the platform's TCB cannot be judged")
            return None
        # Of several files the one for this platform; the rest belongs to other evidence.
        found.sort(key=lambda pair: (pair[1].tee != tee, platform is None or pair[1].fmspc != platform.fmspc))
        statement, info = found[0]
        if not self._authentic(statement, info.issued, info.next_update, "the TCB info"):
            return None
        if info.tee != tee or info.version != 3:
            self.findings.add(
                "collateral.other-kind", f"the TCB info is for {info.tee} version {info.version}, not {tee} version 3"
            )
            return None
        if platform is not None and (info.fmspc != platform.fmspc or info.pce_id != platform.pce_id):
            self.findings.add(
                "collateral.other-platform",
                f"the TCB info is for FMSPC {info.fmspc.hex()}, PCE id {info.pce_id.hex()}; "
                f"the platform has {platform.fmspc.hex()}, {platform.pce_id.hex()}",
            )
            return None
        return info

    def enclave_identity(self) -> EnclaveIdentity | None:
        """The quoting enclave's identity, when its signature holds; None with reasons otherwise."""
        name = "TD_QE" if self.tdx else "QE"
        wanted = "enclaveIdentity"
        found = [(one, parse_enclave_identity(one)) for one in self.collateral.statements if one.kind == wanted]
        if not found:
            self.findings.add("collateral.missing", "no quoting enclave identity was given, so it cannot be judged")
            return None
        found.sort(key=lambda pair: pair[1].name != name)
        statement, identity = found[0]
        if not self._authentic(statement, identity.issued, identity.next_update, "the QE identity"):
            return None
        if identity.name != name or identity.version != 2:
            text = f"the enclave identity is {identity.name} version {identity.version}, not {name} version 2"
            self.findings.add("collateral.other-kind", text)
            return None
        return identity

    def _authentic(self, statement: SignedStatement, issued: datetime, until: datetime, what: str) -> bool:
        if self.now < issued:
            self.findings.add("collateral.not-yet-valid", f"{what} was issued {issued:%Y-%m-%d %H:%M}, after the clock")
        if self.now > until:
            self.findings.add("collateral.expired", f"{what} was good until {until:%Y-%m-%d %H:%M}")
        signers = _signers(statement, self.collateral.certificates)
        if not signers:
            self.findings.add("chain.missing", f"the certificate that signs {what} ({TCB_SIGNER}) is missing")
            return False
        signer = next((one for one in signers if _signed_by(statement, one)), None)
        if signer is None:
            self.findings.add("collateral.signature", f"{what} was not signed by {TCB_SIGNER}: it was changed")
            return False
        chain = build_chain(signer, [*statement.issuer_chain, *self.collateral.certificates])
        verify_chain(chain, self.anchors, self.now, self.findings)
        check_revocation(chain, self.collateral.lists, self.now, self.findings)
        return not self.findings.has("chain.missing", "chain.broken", "chain.root-unknown")


def _signers(statement: SignedStatement, certificates: Sequence[Certificate]) -> list[Certificate]:
    """A chain that came with the statement has its signer, in whatever place; otherwise any certificate of its name may be it."""
    pool = statement.issuer_chain or tuple(certificates)
    return [one for one in pool if one.name == TCB_SIGNER]


def _signed_by(statement: SignedStatement, signer: Certificate) -> bool:
    try:
        signer.public_key.verify_ecdsa(statement.signature, statement.text, hash_name="sha256")
    except SignatureInvalid:
        return False
    return True


def _judge_tcb(
    quote: DcapQuote,
    platform: PckPlatform,
    info: TcbInfo,
    identity: EnclaveIdentity,
    reference: Reference,
    findings: Findings,
) -> None:
    findings.facts["fmspc"] = platform.fmspc.hex()
    enclave = enclave_status(quote.qe_report, identity, findings)
    whole = platform_status(info, platform, quote.body, findings)
    if enclave is not None and whole is not None:
        judge_status(whole.merged(enclave), reference, findings)


def _judge_body(quote: DcapQuote, findings: Findings) -> None:
    if quote.qe_report.debug:
        findings.add("tee.debug", "the quoting enclave runs in debug mode: its keys can be read")
    if quote.body.debug:
        findings.add("tee.debug", "debug mode is on: whoever runs the host can read and change what runs inside")
    else:
        findings.affirm(Claim.RUNTIME_OPAQUE)
    if isinstance(quote.body, EnclaveReport):
        if not quote.body.initialised:
            findings.add("tee.attributes", "the enclave was not initialised")
        return
    attributes = quote.body.td_attributes
    if attributes & ~_TD_ATTRIBUTES:
        findings.add("tee.attributes", f"reserved TD attributes are set: {attributes:016x}")
    if not attributes & _SEPT_VE_DISABLE:
        findings.add("tdx.sept-ve", "SEPT_VE_DISABLE is off: the host can make the guest's own pages fault")
    if quote.body.mr_service_td is not None and any(quote.body.mr_service_td):
        findings.add("tdx.service-td", "a service TD is bound to this TD, and nothing was said to know it")


def _judge_values(body: EnclaveReport | TdReport, reference: Reference, findings: Findings) -> None:
    if isinstance(body, EnclaveReport):
        _judge_enclave(body, reference, findings)
    else:
        _judge_domain(body, reference, findings)


def judge_log(log: EventLog, body: TdReport, findings: Findings) -> None:
    """The CC event log: its measurement registers 1 to 4 are RTMR0 to RTMR3 (ACPI CCEL)."""
    if "sha384" not in log.algorithms:
        findings.add("tdx.log-mismatch", "the event log has no SHA-384 digests, which RTMRs are made of")
        return
    # RTMR 0 to 2 are the boot's, so that hiding all events of one shows; RTMR 3 is extended at run time, by no such log
    replayed = dict.fromkeys((1, 2, 3), bytes(48)) | log.replay("sha384")
    for register, value in replayed.items():
        if not 1 <= register <= 4 or body.rtmr[register - 1] != value:
            findings.add("tdx.log-mismatch", f"the event log does not replay to RTMR{register - 1}")


def _judge_enclave(body: EnclaveReport, reference: Reference, findings: Findings) -> None:
    findings.facts |= {
        "mrenclave": body.mrenclave.hex(),
        "mrsigner": body.mrsigner.hex(),
        "prod_id": body.prod_id,
        "svn": body.svn,
    }
    expected = reference.sgx
    known = expected is not None and (expected.mrenclave or (expected.mrsigner and expected.prod_id is not None))
    if expected is None or not known:
        findings.add("reference.none", "no reference value says which enclave is expected (mrenclave)")
        return
    good = check_values(
        [("MRENCLAVE", body.mrenclave, expected.mrenclave), ("MRSIGNER", body.mrsigner, expected.mrsigner)], findings
    )
    if expected.prod_id not in {None, body.prod_id}:
        findings.add("reference.mismatch", f"ISVPRODID is {body.prod_id}, not {expected.prod_id}")
        good = False
    if expected.minimum_svn is not None and body.svn < expected.minimum_svn:
        findings.add("reference.mismatch", f"ISVSVN is {body.svn}, below {expected.minimum_svn}")
        good = False
    if good:
        findings.affirm(Claim.EXECUTABLES)


def _judge_domain(body: TdReport, reference: Reference, findings: Findings) -> None:
    values = {
        "mrtd": body.mr_td,
        "rtmr0": body.rtmr[0],
        "rtmr1": body.rtmr[1],
        "rtmr2": body.rtmr[2],
        "rtmr3": body.rtmr[3],
        "mrconfigid": body.mr_config_id,
        "mrowner": body.mr_owner,
        "mrseam": body.mr_seam,
    }
    findings.facts |= {name: value.hex() for name, value in values.items()}
    expected = reference.tdx
    if expected is None or expected.mrtd is None:
        findings.add("reference.none", "no reference value says which trust domain is expected (mrtd)")
        return
    good = check_values([(name.upper(), value, getattr(expected, name)) for name, value in values.items()], findings)
    if expected.rtmr1 is None or expected.rtmr2 is None:
        findings.add("reference.runtime-none", "no reference values for RTMR1 and RTMR2: kernel and command line")
    elif good:
        findings.affirm(Claim.EXECUTABLES)
