"""SGX and TDX: each check by the one change that it is there for."""

import dataclasses
import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sealane.attest.appraise import Material, appraise
from sealane.attest.dcap import judge_log, verify_quote
from sealane.attest.eventlog import Event, EventLog
from sealane.attest.quotes import TdReport, parse_quote
from sealane.attest.reasons import Level
from sealane.attest.verdict import Findings
from sealane.crypto.chains import parse_certificates
from sealane.errors import EvidenceError
from tests.attest.dcap_rig import DAY, NOW, DcapRig, certify
from tests.attest.tpm_rig import boot_events, encode_event_log

Case = tuple[str, dict[str, Any], str]


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_whole_platform_reaches_the_highest_level_only_where_its_test_root_is_accepted(version: int) -> None:
    rig = DcapRig(version=version)
    verdict = rig.verdict()
    assert verdict.why_not() == []
    assert verdict.level == Level.ISOLATED
    assert verdict.production_level == Level.NOTHING
    assert [reason.code for reason in verdict.reasons] == ["chain.test-root-accepted"]

    refused = rig.verdict(reference=rig.reference(accept_test_roots=False))
    assert codes(refused) == {"chain.test-root"}
    assert refused.level == Level.NOTHING


_ANY_MODE = {"attributesMask": "F9" + "FF" * 7 + "00" * 8}  # an identity that would let the debug bit pass

# A TCB info whose mask lets every attribute of a module pass, and a level as those of SGX are.
ANY_MODULE = {
    "tdxModuleIdentities": [
        {"id": "TDX_01", "mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "00" * 8,
         "tcbLevels": [{"tcb": {"isvsvn": 3}, "tcbStatus": "UpToDate"}]}
    ]
}  # fmt: skip
SGX_ALONE = {"sgxtcbcomponents": [{"svn": 5}] * 16, "pcesvn": 11}

REFUSALS: list[Case] = [
    ("another vendor's quoting enclave", {"vendor": bytes(16)}, "dcap.qe-vendor"),
    ("the quote's signature", {"spoil": ("quote",)}, "dcap.quote-signature"),
    ("the QE report's signature", {"spoil": ("qe",)}, "dcap.qe-signature"),
    ("the key is not bound", {"bound": False}, "dcap.qe-binding"),
    ("TCB info changed", {"spoil": ("tcb",)}, "collateral.signature"),
    ("QE identity changed", {"spoil": ("identity",)}, "collateral.signature"),
    ("TCB info missing", {"leave_out": ("tcb",)}, "collateral.missing"),
    ("QE identity missing", {"leave_out": ("identity",)}, "collateral.missing"),
    ("TCB signing certificate missing", {"leave_out": ("signer",)}, "chain.missing"),
    ("TCB signer of another name", {"signer_name": "Intel SGX Other Signing"}, "chain.missing"),
    ("root list missing", {"leave_out": ("root_crl",)}, "crl.missing"),
    ("PCK list missing", {"leave_out": ("pck_crl",)}, "crl.missing"),
    ("PCK list by another key", {"list_key": ec.generate_private_key(ec.SECP256R1())}, "crl.signature"),
    ("PCK list for a part", {"lists": {"partial": True}}, "crl.signature"),
    ("PCK list expired", {"lists": {"next_update": NOW - DAY / 2}}, "crl.expired"),
    ("PCK list of tomorrow", {"lists": {"this_update": NOW + DAY}}, "crl.not-yet-valid"),
    ("PCK revoked", {"revoke_pck": True}, "chain.revoked"),
    ("PCK authority revoked", {"revoke_ca": True}, "chain.revoked"),
    ("TCB signer revoked", {"revoke_signer": True}, "chain.revoked"),
    ("PCK expired", {"pck_arguments": {"not_after": NOW - DAY}}, "chain.expired"),
    ("PCK of tomorrow", {"pck_arguments": {"not_before": NOW + DAY}}, "chain.not-yet-valid"),
    ("PCK with a critical extension", {"pck_arguments": {"critical": True}}, "chain.broken"),
    ("the authority is none", {"ca_arguments": {"ca": False}}, "chain.broken"),
    ("PCK of another name", {"pck_name": "Some Certificate"}, "dcap.pck"),
    ("PCK authority of another name", {"ca_name": "Intel SGX Something CA"}, "dcap.pck"),
    ("PCK without platform", {"with_extension": False}, "dcap.pck"),
    ("TCB info expired", {"tcb": {"nextUpdate": "2026-05-31T00:00:00Z"}}, "collateral.expired"),
    ("TCB info of tomorrow", {"tcb": {"issueDate": "2026-06-02T00:00:00Z"}}, "collateral.not-yet-valid"),
    ("QE identity expired", {"identity": {"nextUpdate": "2026-05-31T00:00:00Z"}}, "collateral.expired"),
    ("TCB info for SGX", {"tcb": {"id": "SGX"}}, "collateral.other-kind"),
    ("TCB info of version 2", {"tcb": {"version": 2}}, "collateral.other-kind"),
    ("QE identity for SGX", {"identity": {"id": "QE"}}, "collateral.other-kind"),
    ("QE identity of version 1", {"identity": {"version": 1}}, "collateral.other-kind"),
    ("TCB info of another family", {"tcb": {"fmspc": "000000000000"}}, "collateral.other-platform"),
    ("TCB info of another PCE", {"tcb": {"pceId": "0001"}}, "collateral.other-platform"),
    ("QE of another signer", {"qe_signer": bytes(32)}, "dcap.qe-identity"),
    ("QE of another product", {"qe_prod_id": 1}, "dcap.qe-identity"),
    ("QE with other attributes", {"qe_attributes": bytes([0x31]) + bytes(15)}, "dcap.qe-identity"),
    ("QE with another MISCSELECT", {"qe_miscselect": 1}, "dcap.qe-identity"),
    ("QE in debug mode", {"qe_attributes": bytes([0x13]) + bytes(15), "identity": _ANY_MODE}, "tee.debug"),
    ("QE out of date", {"qe_svn": 3}, "dcap.tcb-out-of-date"),
    ("QE below every level", {"qe_svn": 1}, "dcap.tcb-unknown"),
    ("one component too old", {"components": (5,) * 15 + (4,)}, "dcap.tcb-unknown"),
    ("PCE too old", {"pce_svn": 10}, "dcap.tcb-unknown"),
    ("TDX component too old", {"tee_tcb_svn": bytes([3, 1, 4]) + bytes(13)}, "dcap.tcb-unknown"),
    ("TDX module out of date", {"tee_tcb_svn": bytes([2, 1, 5]) + bytes(13)}, "dcap.tcb-out-of-date"),
    ("TDX module below every level", {"tee_tcb_svn": bytes([1, 1, 5]) + bytes(13)}, "dcap.tcb-unknown"),
    ("TDX module of no version known", {"tee_tcb_svn": bytes([3, 9, 5]) + bytes(13)}, "dcap.tdx-module"),
    ("TDX module of another signer", {"mr_signer_seam": b"\x01" * 48}, "dcap.tdx-module"),
    ("TDX module with other attributes", {"seam_attributes": b"\x01" + bytes(7)}, "dcap.tdx-module"),
    (
        "TDX module with attributes beyond the mask",
        {"seam_attributes": b"\x01" + bytes(7), "tcb": ANY_MODULE},
        "dcap.tdx-module",
    ),
    ("TCB levels without a TD's components", {"level": {"tcb": SGX_ALONE}}, "dcap.tcb-unknown"),
    ("TCB revoked", {"level": {"tcbStatus": "Revoked"}}, "dcap.tcb-revoked"),
    ("TCB out of date", {"level": {"tcbStatus": "OutOfDate"}}, "dcap.tcb-out-of-date"),
    ("and to configure", {"level": {"tcbStatus": "OutOfDateConfigurationNeeded"}}, "dcap.tcb-out-of-date"),
    ("TCB status unheard of", {"level": {"tcbStatus": "Splendid"}}, "dcap.tcb-unknown"),
    ("debug", {"td_attributes": 1 << 28 | 1}, "tee.debug"),
    ("reserved attributes", {"td_attributes": 1 << 28 | 1 << 9}, "tee.attributes"),
    ("SGX debug", {"version": 3, "sgx_attributes": bytes([7]) + bytes(15)}, "tee.debug"),
    ("SGX not initialised", {"version": 3, "sgx_attributes": bytes([4]) + bytes(15)}, "tee.attributes"),
    ("empty user data", {"user_data": bytes(64)}, "binding.empty"),
    ("other user data", {"user_data": bytes(63) + b"\x01"}, "binding.mismatch"),
]


@pytest.mark.parametrize(("changes", "code"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_one_change_is_refused_for_its_own_reason(changes: dict[str, Any], code: str) -> None:
    verdict = DcapRig(**changes).verdict()
    assert refusals(verdict) == {code}
    assert verdict.level == Level.NOTHING
    assert verdict.why_not()


WEAKNESSES: list[tuple[str, dict[str, Any], set[str], Level]] = [
    ("hardening", {"level": {"tcbStatus": "SWHardeningNeeded"}}, {"dcap.tcb-hardening"}, Level.HARDWARE_ROOTED),
    ("configuration", {"level": {"tcbStatus": "ConfigurationNeeded"}}, {"dcap.tcb-configuration"}, Level(3)),
    ("both", {"level": {"tcbStatus": "ConfigurationAndSWHardeningNeeded"}},
     {"dcap.tcb-configuration", "dcap.tcb-hardening"}, Level.HARDWARE_ROOTED),
    ("SEPT_VE_DISABLE off", {"td_attributes": 0}, {"tdx.sept-ve"}, Level.HARDWARE_ROOTED),
    ("service TD", {"version": 5, "mr_service_td": b"\x01" * 48}, {"tdx.service-td"}, Level.HARDWARE_ROOTED),
    ("advisories", {"level": {"advisoryIDs": ["INTEL-SA-00001"]}}, {"dcap.advisories"}, Level.ISOLATED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected", "level"), [one[1:] for one in WEAKNESSES], ids=[w[0] for w in WEAKNESSES]
)
def test_a_weakness_bounds_the_level_and_refuses_nothing(
    changes: dict[str, Any], expected: set[str], level: Level
) -> None:
    verdict = DcapRig(**changes).verdict()
    assert codes(verdict) - {"chain.test-root-accepted"} == expected
    assert verdict.level == level
    assert verdict.accepted


EXPECTATIONS: list[tuple[str, int, dict[str, Any], str, Level]] = [
    ("another TD", 4, {"tdx": {"mrtd": ["00" * 48]}}, "reference.mismatch", Level.NOTHING),
    ("another RTMR", 4, {"tdx": {"mrtd": ["02" * 48], "rtmr2": ["00" * 48]}}, "reference.mismatch", Level.NOTHING),
    ("another enclave", 3, {"sgx": {"mrenclave": ["00" * 32]}}, "reference.mismatch", Level.NOTHING),
    ("another enclave signer", 3, {"sgx": {"mrsigner": ["00" * 32], "prod_id": 7}}, "reference.mismatch", Level(0)),
    ("another product", 3, {"sgx": {"mrsigner": ["0b" * 32], "prod_id": 8}}, "reference.mismatch", Level.NOTHING),
    ("too old", 3, {"sgx": {"mrenclave": ["0a" * 32], "minimum_svn": 4}}, "reference.mismatch", Level.NOTHING),
    ("a signer and no product", 3, {"sgx": {"mrsigner": ["0b" * 32]}}, "reference.none", Level.IDENTITY),
    ("no enclave", 3, {"sgx": None}, "reference.none", Level.IDENTITY),
    ("no TD", 4, {"tdx": None}, "reference.none", Level.IDENTITY),
    ("no RTMRs", 4, {"tdx": {"mrtd": ["02" * 48]}}, "reference.runtime-none", Level.MEASURED_SOFTWARE),
    ("no host", 4, {"hosts": None}, "reference.host-unnamed", Level.MEASURED_SOFTWARE),
    ("another host", 4, {"hosts": ["ppid:00"]}, "reference.host", Level.NOTHING),
    ("no user data", 4, {"user_data": None}, "binding.unchecked", Level.MEASURED_SOFTWARE),
    ("no root", 4, {"test_roots": []}, "chain.root-unknown", Level.NOTHING),
]


@pytest.mark.parametrize(
    ("version", "changes", "code", "level"), [one[1:] for one in EXPECTATIONS], ids=[one[0] for one in EXPECTATIONS]
)
def test_what_is_not_expected_or_not_known(version: int, changes: dict[str, Any], code: str, level: Level) -> None:
    rig = DcapRig(version=version)
    verdict = rig.verdict(reference=rig.reference(**changes))
    assert code in codes(verdict)
    assert verdict.level == level
    assert verdict.accepted is (level > 0)


def test_a_level_that_is_wanted_and_not_reached_is_told_with_what_is_weak() -> None:
    rig = DcapRig(td_attributes=0)
    verdict = rig.verdict(reference=rig.reference(minimum_level=4))
    assert not verdict.accepted
    assert verdict.level == Level.HARDWARE_ROOTED
    assert "level 3 is reached and 4 is wanted" in verdict.why_not()[0]
    assert any("SEPT_VE_DISABLE" in sentence for sentence in verdict.why_not())


def test_an_accepted_status_is_noted() -> None:
    rig = DcapRig(level={"tcbStatus": "SWHardeningNeeded"})
    verdict = rig.verdict(reference=rig.reference(accept_tcb_statuses=["SWHardeningNeeded"]))
    assert codes(verdict) == {"chain.test-root-accepted", "dcap.tcb-accepted"}
    assert verdict.level == Level.ISOLATED


def test_a_forged_quote_is_not_judged_by_what_it_says() -> None:
    verdict = DcapRig(spoil=("quote",), td_attributes=1, level={"tcbStatus": "Revoked"}).verdict()
    assert refusals(verdict) == {"dcap.quote-signature"}


def test_a_chain_longer_than_its_root_allows() -> None:
    verdict = DcapRig(root=certify("Test SGX Root CA", None, path_length=0)).verdict()
    assert refusals(verdict) == {"chain.broken"}


def test_a_signer_certified_below_a_pck_authority_is_no_tcb_signer() -> None:
    rig = DcapRig(signer_name="Intel SGX TCB Signing")
    rig.certificates()
    rig.signer = certify("Intel SGX TCB Signing", certify("Other Root", None), ca=False)
    assert "chain.missing" in refusals(rig.verdict())


def test_every_byte_of_the_signed_parts_counts() -> None:
    rig = DcapRig()
    files = rig.files()
    quote = files["quote"]
    pem = quote.index(b"-----BEGIN")
    regions = [*range(48 + 584), *range(48 + 584 + 4, 48 + 584 + 4 + 128), *range(48 + 584 + 4 + 134, pem - 8)]
    passed = [at for at in regions if not _refused(rig, files, quote[:at] + bytes([quote[at] ^ 1]) + quote[at + 1 :])]
    # the auth data's length and the certification type are structure: a change there is not understood
    assert passed == []


def _refused(rig: DcapRig, files: dict[str, bytes], quote: bytes) -> bool:
    try:
        parsed = parse_quote(quote)
    except EvidenceError:
        return True
    findings = Findings("quote")
    verify_quote(parsed, parse_certificates(rig.pck.pem)[0], findings)
    return findings.refused


def codes(verdict: Any) -> set[str]:
    return {reason.code for reason in verdict.reasons}


def refusals(verdict: Any) -> set[str]:
    return {reason.code for reason in verdict.reasons if reason.severity.value == "refusal"}


def test_the_log_of_a_trust_domain_replays_to_its_registers() -> None:
    def log(command: bytes, name: str = "sha384", register: int = 2) -> EventLog:
        return EventLog((Event(register, 0x0D, {name: hashlib.new(name, command).digest()}, b""),), (name,), 0)

    rtmr1 = log(b"kernel").replay("sha384")[2]
    rig = DcapRig()
    quote = parse_quote(rig.quote())
    assert isinstance(quote.body, TdReport)
    body = dataclasses.replace(quote.body, rtmr=(bytes(48), rtmr1, bytes(48), b"\x07" * 48))  # RTMR3 is the run time's
    cases = [
        (log(b"kernel"), False),
        (EventLog((), ("sha384",), 0), True),  # all events of a register hidden
        (log(b"other"), True),
        (log(b"kernel", "sha256"), True),
        (log(b"", register=0), True),
    ]
    for given, refused in cases:
        findings = Findings("quote")
        judge_log(given, body, findings)
        assert findings.has("tdx.log-mismatch") is refused
        assert findings.refused is refused


def test_a_log_beside_a_quote_of_a_trust_domain_is_held_against_it() -> None:
    rig = DcapRig()
    material = Material()
    for name, data in {**rig.files(), "ccel": encode_event_log(boot_events())}.items():
        material.add(name, data)
    assert refusals(appraise(material, rig.reference(), now=NOW)) == {"tdx.log-mismatch"}
