"""Evidence that other people's hardware made: the right verdict at the right time, and each refusal for its reason."""

import calendar
import importlib
import json
import platform
import random
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sealane.attest.appraise import Material, appraise
from sealane.attest.eventlog import parse_event_log
from sealane.attest.ima import parse_ima_log
from sealane.attest.quotes import parse_quote
from sealane.attest.reasons import Level
from sealane.attest.reference import NO_REFERENCE, Reference
from sealane.attest.snp import parse_report
from sealane.attest.verdict import Verdict
from sealane.errors import EvidenceError
from tests.attest.test_formats import certificate_table

WITHIN = datetime(2025, 7, 1, tzinfo=UTC)
LATER = datetime(2026, 11, 1, tzinfo=UTC)
UNKNOWN = {"binding.unchecked", "reference.host-unnamed", "reference.none"}
MILAN_REPORT = ("snp_v3_report.bin", "snp_v3_vcek.der", "snp_milan.testcer")


def load(vectors: Path, *names: str) -> dict[str, bytes]:
    return {name: (vectors / "attestation" / name).read_bytes() for name in names}


def judge(files: Mapping[str, bytes], *, now: datetime = WITHIN, reference: Reference = NO_REFERENCE) -> Verdict:
    material = Material()
    for name, data in files.items():
        material.add(name, data)
    return appraise(material, reference, now=now)


def codes(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons}


def refusals(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons if reason.severity.value == "refusal"}


def dcap(vectors: Path, kind: str) -> dict[str, bytes]:
    return load(vectors, f"{kind}_quote", f"{kind}_quote_collateral.json")


def bundle(vectors: Path, kind: str) -> dict[str, Any]:
    value = json.loads((vectors / "attestation" / f"{kind}_quote_collateral.json").read_text())
    assert isinstance(value, dict)
    return value


def test_the_sgx_quote_needs_hardening_and_configuration(vectors: Path) -> None:
    verdict = judge(dcap(vectors, "sgx"))
    assert verdict.accepted
    assert codes(verdict) == UNKNOWN | {"dcap.tcb-hardening", "dcap.tcb-configuration"}
    assert verdict.appraisals[0].facts["tcb_status"] == "ConfigurationAndSWHardeningNeeded"
    assert verdict.appraisals[0].facts["advisories"] == ["INTEL-SA-00289", "INTEL-SA-00615"]
    assert verdict.level == verdict.production_level == Level.IDENTITY


def test_the_tdx_quote_is_up_to_date(vectors: Path) -> None:
    verdict = judge(dcap(vectors, "tdx"))
    assert verdict.accepted
    assert codes(verdict) == UNKNOWN
    assert verdict.appraisals[0].facts["tcb_status"] == "UpToDate"
    assert verdict.appraisals[0].root == "Intel SGX Root CA"


def test_the_tdx_quote_reaches_level_4_for_production_when_it_is_expected(vectors: Path) -> None:
    files = dcap(vectors, "tdx")
    facts = judge(files).appraisals[0].facts
    tdx = {name: [facts[name]] for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")}
    values = {"version": 1, "user_data": facts["user_data"], "hosts": facts["host"], "tdx": tdx, "minimum_level": 4}
    verdict = judge(files, reference=Reference.model_validate(values))
    assert verdict.why_not() == []
    assert codes(verdict) == set()
    assert verdict.level == verdict.production_level == Level.ISOLATED
    assert verdict.as_dict()["vector"] == {
        "instance-identity": 2, "configuration": 0, "executables": 2, "hardware": 2, "runtime-opaque": 2,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_collateral_out_of_its_window(vectors: Path, kind: str) -> None:
    files = dcap(vectors, kind)
    assert refusals(judge(files, now=LATER)) == {"collateral.expired", "crl.expired"}
    assert refusals(judge(files, now=datetime(2025, 6, 1, tzinfo=UTC))) == {
        "collateral.not-yet-valid",
        "crl.not-yet-valid",
    }
    assert "chain.expired" in refusals(judge(files, now=datetime(2060, 1, 1, tzinfo=UTC)))


def test_the_window_ends_to_the_second(vectors: Path) -> None:
    files = dcap(vectors, "tdx")
    end = datetime(2025, 7, 19, 10, 0, 35, tzinfo=UTC)  # nextUpdate of the PCK list, the first to end
    assert judge(files, now=end).accepted
    assert refusals(judge(files, now=end.replace(second=36))) == {"crl.expired"}


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_collateral_missing_or_of_the_other_kind(vectors: Path, kind: str) -> None:
    files = dcap(vectors, kind)
    alone = {name: data for name, data in files.items() if name.endswith("_quote")}
    assert refusals(judge(alone)) == {"collateral.missing", "crl.missing"}
    other = "tdx" if kind == "sgx" else "sgx"
    verdict = judge({**alone, "collateral": json.dumps(bundle(vectors, other)).encode()})
    assert {"collateral.other-kind", "crl.missing"} == refusals(verdict)


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
@pytest.mark.parametrize(
    ("member", "code"),
    [("tcb_info", "collateral.signature"), ("qe_identity", "collateral.signature"),
     ("root_ca_crl", "crl.signature"), ("pck_crl", "crl.signature")],
)  # fmt: skip
def test_collateral_with_one_digit_changed(vectors: Path, kind: str, member: str, code: str) -> None:
    value = bundle(vectors, kind)
    text = value[member]
    at = text.index('"svn":') + 6 if member == "tcb_info" else text.index("mrsigner") + 20 if "{" in text else -2
    digit = "1" if text[at] != "1" else "2"
    value[member] = text[:at] + digit + text[at + 1 if at >= 0 else len(text) + at + 1 :]
    files = {**dcap(vectors, kind), f"{kind}_quote_collateral.json": json.dumps(value).encode()}
    assert refusals(judge(files)) == {code}


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_lists_swapped_with_the_other_platforms(vectors: Path, kind: str) -> None:
    value = bundle(vectors, kind)
    value["pck_crl"] = bundle(vectors, "tdx" if kind == "sgx" else "sgx")["pck_crl"]
    files = {**dcap(vectors, kind), f"{kind}_quote_collateral.json": json.dumps(value).encode()}
    assert refusals(judge(files)) == {"crl.missing"}


@pytest.mark.parametrize(("kind", "stride"), [("sgx", 7), ("tdx", 7)])
def test_one_bit_anywhere_in_the_quote(vectors: Path, kind: str, stride: int) -> None:
    """Signed body, signatures, keys, QE report, auth data, certificates: nothing of a quote may change."""
    files = dcap(vectors, kind)
    name = f"{kind}_quote"
    quote = files[name]
    material = Material()
    material.add("collateral", files[f"{kind}_quote_collateral.json"])
    passed = []
    length = parse_quote(quote).length
    pem = quote.index(b"-----BEGIN")
    for at in [*range(pem), *range(pem, length, 13 * stride)]:
        changed = quote[:at] + bytes([quote[at] ^ (1 << at % 8)]) + quote[at + 1 :]
        one = Material(collateral=material.collateral)
        try:
            one.add(name, changed)
        except EvidenceError:
            continue
        if appraise(one, now=WITHIN).accepted:
            passed.append(at)
    # PEM allows what is not data to differ: the text around the blocks, and the line ends
    assert [at for at in passed if at < pem] == []


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_trailing_bytes_do_not_count(vectors: Path, kind: str) -> None:
    files = dcap(vectors, kind)
    quote = files[f"{kind}_quote"]
    length = parse_quote(quote).length
    assert judge({**files, f"{kind}_quote": quote[:length]}).accepted
    assert judge({**files, f"{kind}_quote": quote + b"\x99" * 50}).accepted
    with pytest.raises(EvidenceError):
        parse_quote(quote[: length - 1])


def test_the_production_quote_with_what_pcs_answered(vectors: Path) -> None:
    """PCS sends the issuer chains in HTTP headers, which the vectors lack: so the statements cannot be verified."""
    files = load(
        vectors, "tdx_prod_quote_SPR_E4.dat", "sample_tcbInfo_response", "sample_qeIdentity_response", "pckcrl",
        "rootcrl.der",
    )  # fmt: skip
    at = datetime(2023, 7, 1, tzinfo=UTC)
    verdict = judge(files, now=at)
    assert refusals(verdict) == {"chain.missing"}
    assert codes(verdict) - refusals(verdict) == UNKNOWN | {"tdx.sept-ve"}
    # The signer's key is the same since 2018, its certificate is a later one: right signature, wrong time.
    signer = bundle(vectors, "tdx")["tcb_info_issuer_chain"].encode()
    with_signer = judge({**files, "signer.pem": signer}, now=at)
    assert "collateral.signature" not in codes(with_signer)
    assert "chain.not-yet-valid" in refusals(with_signer)


def test_the_snp_sample_is_refused_for_its_debug_policy(vectors: Path) -> None:
    files = load(vectors, "snp_attestation.bin", "snp_vcek.testcer", "snp_milan.testcer")
    verdict = judge(files)
    assert refusals(verdict) == {"tee.debug"}
    assert verdict.level == Level.NOTHING


def test_the_newer_snp_report(vectors: Path) -> None:
    verdict = judge(load(vectors, *MILAN_REPORT))
    assert verdict.accepted
    assert codes(verdict) == UNKNOWN | {"snp.crl-missing", "snp.tcb-unjudged"}
    assert verdict.appraisals[0].root == "ARK-Milan"
    assert verdict.production_level == Level.IDENTITY


def test_the_newer_snp_report_out_of_its_certificates_time(vectors: Path) -> None:
    files = load(vectors, *MILAN_REPORT)
    assert refusals(judge(files, now=datetime(2031, 1, 1, tzinfo=UTC))) == {"chain.expired"}
    assert refusals(judge(files, now=datetime(2020, 1, 1, tzinfo=UTC))) == {"chain.not-yet-valid"}


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("snp_v3_report.bin",), "chain.missing"),
        (("snp_v3_report.bin", "snp_v3_vcek.der"), "chain.missing"),
        (("snp_v3_report.bin", "snp_milan.testcer"), "chain.missing"),
        (("snp_v3_report.bin", "snp_vcek.testcer", "snp_milan.testcer"), "snp.signature"),
        (("snp_attestation.bin", "snp_v3_vcek.der", "snp_milan.testcer"), "snp.signature"),
    ],
)
def test_snp_certificates_missing_or_swapped(vectors: Path, names: tuple[str, ...], code: str) -> None:
    assert refusals(judge(load(vectors, *names))) == {code}


def test_one_bit_anywhere_in_the_snp_report(vectors: Path) -> None:
    files = load(vectors, *MILAN_REPORT)
    report = files.pop("snp_v3_report.bin")
    certificates = Material()
    for name, data in files.items():
        certificates.add(name, data)
    passed = []
    for at in range(len(report)):
        one = Material(collateral=certificates.collateral)
        try:
            one.add("report", report[:at] + bytes([report[at] ^ (1 << at % 8)]) + report[at + 1 :])
        except EvidenceError:
            continue
        if appraise(one, now=WITHIN).accepted:
            passed.append(at)
    assert passed == []


def test_a_certificate_table_serves_as_well(vectors: Path) -> None:
    files = load(vectors, *MILAN_REPORT)
    table = certificate_table(files["snp_v3_vcek.der"], files["snp_milan.testcer"])
    assert judge({"report": files["snp_v3_report.bin"], "auxblob": table}).accepted


def test_the_boot_log_of_a_real_machine(vectors: Path) -> None:
    data = (vectors / "eventlog" / "binary_bios_measurements").read_bytes()
    log = parse_event_log(data)
    assert (len(log.events), log.algorithms, log.startup_locality) == (120, ("sha1", "sha256"), 3)
    assert log.unproved_data() == []
    assert log.secure_boot() is False
    replayed = log.replay("sha256")
    assert sorted(replayed) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14]
    # PCRs 3 and 6 saw their separator only: SHA-256 of 32 zero bytes and the digest of four.
    assert (
        replayed[3] == replayed[6] == bytes.fromhex("3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969")
    )
    verdict = judge({"log": data})
    assert codes(verdict) == {"eventlog.unquoted", "reference.none", "eventlog.secure-boot"}
    assert (verdict.level, verdict.accepted) == (Level.NOTHING, False)


def test_a_real_boot_log_with_any_byte_changed_replays_elsewhere_or_is_not_understood(vectors: Path) -> None:
    data = (vectors / "eventlog" / "binary_bios_measurements").read_bytes()
    log = parse_event_log(data)
    whole = log.replay("sha256")
    for at in range(0, len(data), 97):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            other = parse_event_log(changed)
        except EvidenceError:
            continue
        same = other.replay("sha256") == whole if "sha256" in other.algorithms else False
        # what replays the same differs in what no SHA-256 digest covers: SHA-1 digests, types, descriptions
        assert not same or [one.digests["sha256"] for one in other.events] == [
            one.digests["sha256"] for one in log.events
        ]


@pytest.mark.parametrize(("name", "violations"), [("sha1", 1), ("sha256", 0), ("sha384", 1)])
def test_the_ima_logs(vectors: Path, name: str, violations: int) -> None:
    data = (vectors / "eventlog" / f"ima-log-{name}").read_bytes()
    log = parse_ima_log(data)
    assert [entry.name for entry in log.entries] == ["boot_aggregate", "/data"]
    assert {entry.algorithm for entry in log.entries} == {name}
    assert all(entry.consistent for entry in log.entries)
    assert sum(entry.violation for entry in log.entries) == violations
    verdict = judge({"log": data})
    assert "ima.unquoted" in codes(verdict)
    assert ("ima.violation" in codes(verdict)) is bool(violations)
    assert not verdict.accepted
    changed = data.replace(b"/data", b"/dat4")
    assert "ima.template" in refusals(judge({"log": changed}))


def test_report_fields(vectors: Path) -> None:
    report = parse_report((vectors / "attestation" / "snp_attestation.bin").read_bytes())
    assert report.debug
    assert report.policy == 0xB0000
    assert report.signature is not None


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_the_same_answers_as_another_verifier(vectors: Path, kind: str) -> None:
    """dcap-qvl: status and advisories, window, and changed bytes."""
    if platform.machine() != "x86_64":
        pytest.skip("dcap-qvl is not installed on this machine")
    oracle: Any = importlib.import_module("dcap_qvl")
    files = dcap(vectors, kind)
    quote, text = files[f"{kind}_quote"], files[f"{kind}_quote_collateral.json"].decode()
    collateral = oracle.QuoteCollateralV3.from_json(text)

    def theirs(data: bytes, now: datetime) -> tuple[str, tuple[str, ...]] | None:
        try:
            report = oracle.verify(data, collateral, calendar.timegm(now.utctimetuple()))
        except ValueError:
            return None
        return report.status, tuple(report.advisory_ids)

    def ours(data: bytes, now: datetime) -> tuple[str, tuple[str, ...]] | None:
        try:
            verdict = judge({**files, f"{kind}_quote": data}, now=now)
        except EvidenceError:
            return None
        facts = verdict.appraisals[0].facts
        return (facts["tcb_status"], tuple(facts["advisories"])) if verdict.accepted else None

    for now in (WITHIN, LATER, datetime(2025, 6, 1, tzinfo=UTC), datetime(2025, 7, 19, 9, 59, tzinfo=UTC)):
        assert ours(quote, now) == theirs(quote, now), now
    pem = quote.index(b"-----BEGIN")
    for at in range(0, pem, 11):
        changed = quote[:at] + bytes([quote[at] ^ 0x10]) + quote[at + 1 :]
        # stricter than the other one in one thing: lengths have to fit exactly (it lets the PCK chain's be shorter)
        assert ours(changed, WITHIN) in {None, theirs(changed, WITHIN)}, at


def test_real_files_cut_changed_and_thrown_together_give_a_verdict_or_one_error(vectors: Path) -> None:
    chance = random.Random(4)
    files = sorted(path for path in vectors.rglob("*") if path.is_file() and path.suffix != ".md")
    whole = {path.name: path.read_bytes() for path in files}
    taken, verdicts, errors = 0, 0, 0
    for _ in range(400):
        material = Material()
        for name in chance.sample(sorted(whole), chance.randint(1, 4)):
            data = bytearray(whole[name])
            at, how = chance.randrange(len(data)), chance.randrange(5)
            if how == 0:
                del data[at:]
            elif how == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif how == 2:
                data[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), chance.randbytes(4)])
            elif how == 3:
                del data[at : at + chance.randrange(1, 64)]
            with suppress(EvidenceError):
                material.add(name, bytes(data))
                taken += 1
        try:
            verdict = appraise(material, now=chance.choice([WITHIN, LATER]))
        except EvidenceError:
            errors += 1
        else:
            verdicts += 1
            assert json.loads(json.dumps(verdict.as_dict()))["level"] == verdict.level
    assert (verdicts + errors, taken > 400, verdicts > 0) == (400, True, True), (taken, verdicts, errors)
