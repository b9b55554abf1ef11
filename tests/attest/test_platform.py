"""Sealane's own log, statements under a plain key, and bundles: what each is worth, and any bytes against their parsers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.attest.appraise import Material, appraise
from sealane.attest.bundle import PIECES_MAX, encode_bundle, parse_bundle
from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.platformlog import (
    Measured,
    PlatformLog,
    digest_of,
    encode_line,
    manifest_digest,
    parse_platform_log,
)
from sealane.attest.reasons import Level
from sealane.attest.reference import Reference
from sealane.attest.software import SoftwareStatement, parse_statement
from sealane.attest.verdict import Verdict
from sealane.crypto.identity import create_identity, public_key
from sealane.crypto.signatures import parse_public_key
from sealane.errors import AttestationRejected, EvidenceError, InternalError
from tests.attest.dcap_rig import NOW
from tests.attest.tpm_rig import PCRS, TpmRig
from tests.seal.rig import PROPERTY
from tests.session.rig import CODE, QEMU, platform_log, software_evidence

HOST = create_identity("host", now=NOW)
KEY = parse_public_key(public_key(HOST.key_pem)).digest
NONCE = bytes(range(32))
MANIFEST = manifest_digest(CODE)
PLATFORM = {"enclave_manifest": [MANIFEST], "qemu": [QEMU.digest]}


def codes(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons}


def verdict_of(pieces: dict[str, bytes], **changes: Any) -> Verdict:
    values = {"version": 1, "user_data": NONCE.hex(), "identity_key": KEY, "platform": PLATFORM, **changes}
    material = Material()
    for name, content in pieces.items():
        material.add(name, content)
    return appraise(material, Reference.model_validate(values), now=NOW)


# ---- a plain key


def test_a_plain_key_says_who_and_no_more() -> None:
    verdict = verdict_of(software_evidence(HOST, NONCE))
    assert verdict.accepted
    assert verdict.level is Level.IDENTITY
    assert codes(verdict) == {"software.plain-key"}
    assert verdict.appraisals[0].root == "software key (identity only)"
    wanted = verdict_of(software_evidence(HOST, NONCE), minimum_level=2)
    assert not wanted.accepted
    assert wanted.why_not()[0] == "level 1 is reached and 2 is wanted"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"user_data": "01" * 32}, "binding.mismatch"),
        ({"user_data": None}, "binding.unchecked"),
        ({"identity_key": "02" * 32}, "software.key-unknown"),
        ({"identity_key": None}, "software.key-unknown"),
        ({"platform": {"enclave_manifest": ["sha256:00"]}}, "reference.enclave"),
        ({"platform": {"qemu": ["sha256:00"]}}, "reference.qemu"),
        ({"platform": {"kernel": ["6.1.0"]}}, "reference.mismatch"),
        ({"platform": None}, "reference.platform-none"),
    ],
)
def test_what_is_expected_of_a_plain_key(changes: dict[str, Any], code: str) -> None:
    verdict = verdict_of(software_evidence(HOST, NONCE), **changes)
    assert codes(verdict) == {"software.plain-key", code}
    assert verdict.accepted == (code in {"binding.unchecked", "reference.platform-none"})


def test_a_changed_statement_and_a_log_that_is_not_the_signed_one() -> None:
    pieces = software_evidence(HOST, NONCE)
    said = json.loads(pieces["software.statement"])
    said["signature"] = "00" * 64
    forged = {**pieces, "software.statement": json.dumps(said).encode()}
    assert codes(verdict_of(forged)) == {"software.plain-key", "software.signature"}
    swapped = {**pieces, "platform-log": platform_log(*CODE[:2], QEMU)}
    assert "platform.replay" in codes(verdict_of(swapped))
    del pieces["platform-log"]
    assert codes(verdict_of(pieces)) == {"software.plain-key", "platform.log-missing"}


def test_measurements_that_contradict_themselves() -> None:
    kernel = Measured("kernel", "6.1.0", digest_of(b"6.2.0"))
    assert "platform.entry" in codes(verdict_of(software_evidence(HOST, NONCE, encode_line([kernel]) + b"\n")))
    manifest = Measured("enclave-manifest", "-", MANIFEST)
    hidden = encode_line([*CODE[:2], QEMU, manifest]) + b"\n"
    assert "platform.entry" in codes(verdict_of(software_evidence(HOST, NONCE, hidden)))


def test_a_log_alone_proves_nothing() -> None:
    verdict = verdict_of({"platform-log": platform_log()})
    assert codes(verdict) == {"platform.unquoted"}
    assert verdict.level is Level.NOTHING


# ---- under a TPM


def tpm_rig(**changes: Any) -> TpmRig:
    line = platform_log().rstrip(b"\n")
    return TpmRig(platform=(line,), pcrs=(*PCRS, 13), leave_out=(), **changes)


def test_a_quoted_log_with_reference_values() -> None:
    rig = tpm_rig()
    verdict = rig.verdict(rig.reference(platform=PLATFORM))
    assert codes(verdict) == {"tpm.test-root-accepted"}
    assert verdict.level is Level.HARDWARE_ROOTED
    assert verdict.production_level is Level.NOTHING


def test_a_log_that_is_not_the_quoted_one() -> None:
    rig = tpm_rig(told_platform=platform_log(*CODE, Measured("qemu", "/q", "sha256:" + "22" * 32)))
    assert "platform.replay" in codes(rig.verdict(rig.reference(platform=PLATFORM)))
    rig = tpm_rig()
    rig.leave_out = ("platform",)
    missing = rig.verdict(rig.reference(platform=PLATFORM))
    assert codes(missing) == {"tpm.test-root-accepted", "platform.log-missing"}
    assert missing.level is Level.MEASURED_SOFTWARE


def test_only_a_register_that_nobody_can_set_back_counts() -> None:
    rig = tpm_rig()
    values = rig.pcr_values()
    values[23], values[13] = values[13], bytes(32)
    rig.values, rig.pcrs = values, (*PCRS, 13, 23)
    rig.pcr_values = lambda: values  # type: ignore[method-assign]
    assert "platform.replay" in codes(rig.verdict(rig.reference(platform=PLATFORM)))


def test_without_reference_values_for_the_platform() -> None:
    rig = tpm_rig()
    verdict = rig.verdict()
    assert codes(verdict) == {"tpm.test-root-accepted", "reference.platform-none"}
    assert verdict.level is Level.MEASURED_SOFTWARE


def test_each_peer_has_its_own_hardware() -> None:
    rig = tpm_rig()
    reference = rig.reference(platform=PLATFORM, peers={"host-a": [f"ak:{rig.digest}"], "host-b": ["ak:00"]})
    assert rig.verdict(reference.for_peer("host-a")).accepted
    for stranger in ("host-b", "host-c"):
        assert codes(rig.verdict(reference.for_peer(stranger))) >= {"reference.host"}


# ---- bytes


@PROPERTY
@given(st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9.-]{0,39}", fullmatch=True), st.binary(max_size=200), max_size=8))
def test_a_bundle_comes_back(pieces: dict[str, bytes]) -> None:
    data = encode_bundle(pieces)
    assert parse_bundle(data) == pieces
    for length in range(len(data)):
        with pytest.raises(EvidenceError):
            parse_bundle(data[:length])
    with pytest.raises(EvidenceError):
        parse_bundle(data + b"x")


@PROPERTY
@given(st.binary(max_size=300))
def test_any_bytes_against_the_parsers(data: bytes) -> None:
    parsers: dict[Any, type] = {parse_bundle: dict, parse_platform_log: PlatformLog, parse_statement: SoftwareStatement}
    for parse, kind in parsers.items():
        try:
            found = parse(data)
        except EvidenceError as error:
            found = error
        assert isinstance(found, kind | EvidenceError) or (found is None and parse is parse_statement)


def test_bundles_that_cannot_be() -> None:
    with pytest.raises(InternalError):
        encode_bundle({f"piece{number}": b"" for number in range(PIECES_MAX + 1)})
    with pytest.raises(InternalError):
        encode_bundle({"Name": b""})
    twice = encode_bundle({"a": b"1"})[1:]
    with pytest.raises(EvidenceError, match="twice"):
        parse_bundle(b"\x02" + twice + twice)


@pytest.mark.parametrize(
    "text",
    [b'[]\n', b'[{"digest":"sha256:00","name":"a","what":"qemu"}]\n', b'{"a":1}\n', b'[{"digest":1,"name":2,"what":3}]\n',
     platform_log()[:-1], platform_log().replace(b"qemu", b"other")],
)  # fmt: skip
def test_logs_that_cannot_be(text: bytes) -> None:
    with pytest.raises(EvidenceError):
        parse_platform_log(text)


# ---- what a peer's judge adds


def test_only_the_test_roots_that_the_settings_name_too_count() -> None:
    reference = Reference(version=1, test_roots=["aa", "bb"], accept_test_roots=True)
    assert Expectations(accepted_test_roots=["AA"]).applied_to(reference).test_roots == ["aa"]
    assert Expectations().applied_to(reference).test_roots == []


def test_a_host_that_was_introduced_with_hardware_shows_it_with_its_evidence_and_with_its_logs() -> None:
    introduced = Reference(version=1, hosts=["ak:00"])
    peer = PeerJudge("host", KEY, lambda: NOW, Expectations(), introduced=introduced)
    for judged in (peer.check_shown, peer.appraise):
        with pytest.raises(AttestationRejected) as caught:
            judged(software_evidence(HOST, NONCE), NONCE)
        assert caught.value.code == "attest.hardware-changed"
