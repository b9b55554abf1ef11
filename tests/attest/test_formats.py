"""Any bytes give evidence or one typed error; and what the parsers read is what was written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sealane.attest import der, eventlog, ima, quotes, snp, tpm
from sealane.attest.appraise import FILES_MAX, Material, appraise
from sealane.attest.certtable import parse_table
from sealane.attest.collateral import parse_enclave_identity, parse_json_collateral, parse_tcb_info
from sealane.attest.reading import Reader, parse_json
from sealane.attest.reasons import REASONS, Level
from sealane.attest.verdict import Findings, conclude
from sealane.crypto.chains import parse_certificates
from sealane.errors import EvidenceError
from tests.attest.dcap_rig import NOW, DcapRig, tlv
from tests.attest.test_snp import SnpRig
from tests.attest.tpm_rig import TpmRig, boot_events, encode_event_log, encode_legacy_log, ima_encoded

DCAP, TPM, SNP = DcapRig(version=5).files(), TpmRig(leave_out=()).files(), SnpRig().files()
IMA_BINARY = b"".join(
    struct.pack("<I20sI6sI", 10, bytes(range(20)), 6, b"ima-ng", len(encoded)) + encoded
    for encoded in (ima_encoded("sha256", "11" * 32, "boot_aggregate"), ima_encoded("sha256", "22" * 32, "/bin/sh"))
)
SAMPLES: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "quote v5": (quotes.parse_quote, DCAP["quote"]),
    "quote v3": (quotes.parse_quote, DcapRig(version=3).quote()),
    "tcb info": (parse_json_collateral, DCAP["tcb"]),
    "identity": (parse_json_collateral, DCAP["identity"]),
    "snp": (snp.parse_report, SNP["report"]),
    "tpm quote": (tpm.parse_tpm_quote, TPM["quote"]),
    "tpm signature": (tpm.parse_tpm_signature, TPM["signature"]),
    "tpm key": (tpm.parse_tpm_public, TPM["key"]),
    "tpm rsa key": (tpm.parse_tpm_public, TpmRig(rsa=True).public()),
    "pcr values": (tpm.parse_pcr_values, TPM["values"]),
    "event log": (eventlog.parse_event_log, TPM["boot"]),
    "legacy log": (eventlog.parse_event_log, encode_legacy_log(boot_events())),
    "ima": (ima.parse_ima_log, TPM["ima"]),
    "ima binary": (ima.parse_ima_log, IMA_BINARY),
}
JSON_SAMPLES = {"tcb info", "identity", "pcr values"}  # their parsers give None for JSON that is something else
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_an_error_or_evidence(name: str) -> None:
    parse, data = SAMPLES[name]
    kind = type(parse(data))
    for length in {*range(0, len(data), max(1, len(data) // 400)), len(data) - 1}:
        assert _evidence_or_error(parse, data[:length]) in {kind, EvidenceError}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in {"ima", "event log", "legacy log"}])
def test_a_truncated_structure_is_never_evidence(name: str) -> None:
    parse, data = SAMPLES[name]
    with pytest.raises(EvidenceError):
        parse(data[:-1])


@pytest.mark.parametrize("name", SAMPLES)
@QUICK
@given(data=st.data())
def test_mutations_are_errors_or_evidence(name: str, data: Any) -> None:
    parse, sample = SAMPLES[name]
    mutated = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(("set", "insert", "delete", "repeat")))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "delete":
            del mutated[at : at + data.draw(st.integers(1, 40))]
        else:
            mutated[at:at] = mutated[at : at + 50]
        if not mutated:
            break
    kinds = {type(parse(sample)), EvidenceError} | ({type(None)} if name in JSON_SAMPLES else set())
    assert _evidence_or_error(parse, bytes(mutated)) in kinds


@QUICK
@given(st.binary(max_size=2000))
@example(b"")
@example(b"{" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\x30\x82")
@example(b"\xffTCG\x80\x18")
def test_any_bytes_are_one_file_or_one_error(data: bytes) -> None:
    material = Material()
    try:
        material.add("file", data)
    except EvidenceError:
        return
    verdict = appraise(material, now=NOW)
    assert not verdict.accepted
    assert verdict.as_dict()["why_not"] == verdict.why_not()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_kind_is_found_from_the_content(name: str) -> None:
    told = Material().add("file", SAMPLES[name][1])
    assert told in {
        "SGX or TDX quote", "collateral", "SEV-SNP report", "TPM quote", "TPM signature", "TPM public area",
        "PCR values", "event log", "IMA log",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tcb", "identity", "signer", "root_crl", "pck_crl", "quote"])
@QUICK
@given(data=st.data())
def test_mutated_files_of_a_whole_platform_never_crash_the_appraisal(name: str, data: Any) -> None:
    files = dict(DCAP)
    raw = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    changed = bytes(raw) != files[name]
    files[name] = bytes(raw)
    material = Material()
    try:
        for one, content in files.items():
            material.add(one, content)
        verdict = appraise(material, now=NOW)
    except EvidenceError:
        return
    assert verdict.level == Level.NOTHING, changed


def test_a_statement_keeps_its_exact_text() -> None:
    inner = '{ "id":"TDX",\n "x": "\\u00e9" , "version" :3}'
    found = parse_json_collateral(f' {{"signature":"{"ab" * 64}" , "tcbInfo" :  {inner} }}\n'.encode())
    assert found is not None
    assert found.statements[0].text == inner.encode()


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', "{", "[" * 5000, '{"a": 1} x', '"\\ud800']
)
def test_loose_json_is_refused(text: str) -> None:
    with pytest.raises(EvidenceError):
        parse_json(text, "text")


@pytest.mark.parametrize(
    ("member", "value"),
    [("issueDate", "2026-01-01T00:00:00"), ("issueDate", 5), ("fmspc", "00"), ("fmspc", "zz" * 6), ("pceId", None),
     ("tcbLevels", {}), ("tcbLevels", [{}]), ("tcbLevels", [{"tcb": {"sgxtcbcomponents": []}}]), ("version", True),
     ("version", -1), ("tdxModule", []), ("tcbLevels", [5])],
)  # fmt: skip
def test_odd_tcb_info_is_an_error(member: str, value: object) -> None:
    rig = DcapRig(tcb={member: value})
    rig.certificates()
    found = parse_json_collateral(b'{"tcbInfo": %s, "signature": "%s"}' % (rig.tcb_info().encode(), b"00" * 64))
    assert found is not None
    with pytest.raises(EvidenceError) as caught:
        parse_tcb_info(found.statements[0])
    assert caught.value.code == "attest.malformed"


@pytest.mark.parametrize(("member", "value"), [("mrsigner", "00"), ("tcbLevels", None), ("isvprodid", "2"), ("id", 1)])
def test_odd_enclave_identity_is_an_error(member: str, value: object) -> None:
    rig = DcapRig(identity={member: value})
    found = parse_json_collateral(
        b'{"enclaveIdentity": %s, "signature": "%s"}' % (rig.qe_identity().encode(), b"00" * 64)
    )
    assert found is not None
    with pytest.raises(EvidenceError):
        parse_enclave_identity(found.statements[0])


def test_padding_ends_an_event_log_and_nothing_else_does() -> None:
    log = encode_event_log(boot_events())
    whole = eventlog.parse_event_log(log)
    for filler in (b"\0", b"\xff"):
        assert eventlog.parse_event_log(log + filler * 5000) == whole
    with pytest.raises(EvidenceError):
        eventlog.parse_event_log(log + b"\x01")
    with pytest.raises(EvidenceError):
        eventlog.parse_event_log(log + bytes(5000) + b"\x01")


def test_startup_locality_is_where_pcr_0_starts() -> None:
    event = (0, 3, b"StartupLocality\0\x03")
    with_locality = eventlog.parse_event_log(encode_event_log([event, *boot_events()]))
    without = eventlog.parse_event_log(encode_event_log(boot_events()))
    assert with_locality.replay("sha256")[0] != without.replay("sha256")[0]
    assert with_locality.replay("sha256")[7] == without.replay("sha256")[7]
    with pytest.raises(EvidenceError):
        eventlog.parse_event_log(encode_event_log([event, event]))


def test_the_two_forms_of_an_ima_log_are_the_same_log() -> None:
    binary = ima.parse_ima_log(IMA_BINARY)
    digest = bytes(range(20)).hex()
    lines = f"10 {digest} ima-ng sha256:{'11' * 32} boot_aggregate\n10 {digest} ima-ng sha256:{'22' * 32} /bin/sh\n"
    assert ima.parse_ima_log(lines.encode()) == binary


def test_the_templates_encode_as_the_kernel_does() -> None:
    name = b"/init".ljust(256, b"\0")
    lines = [
        f"10 {'00' * 19}01 ima {'ab' * 20} /init",
        f"10 {'00' * 19}01 ima-ng sha256:{'ab' * 32} /init",
        f"10 {'00' * 19}01 ima-sig sha256:{'ab' * 32} /init 0302",
        f"10 {'00' * 19}01 ima-sig sha256:{'ab' * 32} /init ",
    ]
    first, second, third, fourth = ima.parse_ima_log("\n".join(lines).encode()).entries
    assert first.encoded == b"\xab" * 20 + name
    field = b"\x28\0\0\0sha256:\0" + b"\xab" * 32 + b"\x06\0\0\0/init\0"
    assert second.encoded == field
    assert third.encoded == field + b"\x02\0\0\0\x03\x02"
    assert fourth.encoded == field + bytes(4)
    assert not first.consistent


def test_an_ima_log_of_a_firmware_pcr_is_none() -> None:
    for pcr in (0, 4, 7, 15, 23):
        with pytest.raises(EvidenceError):
            ima.parse_ima_log(f"{pcr} {'00' * 20} ima-ng sha256:{'ab' * 32} /init\n".encode())


def test_a_quote_with_a_bank_twice_is_none() -> None:
    quote = TPM["quote"]
    at = quote.rindex(struct.pack(">IHB", 1, 0x000B, 3))
    twice = struct.pack(">I", 2) + quote[at + 4 : at + 10] * 2 + quote[at + 10 :]
    with pytest.raises(EvidenceError, match="twice"):
        tpm.parse_tpm_quote(quote[:at] + twice)


def certificate_table(vcek: bytes, chain_pem: bytes) -> bytes:
    ask, ark = (one.der for one in parse_certificates(chain_pem))
    guids = (
        "63da758d-e664-4564-adc5-f4b93be8accd", "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    )  # fmt: skip
    table, blob, start = b"", b"", 24 * 4
    for guid, certificate in zip(guids, (vcek, ask, ark), strict=True):
        table += UUID(guid).bytes_le + struct.pack("<II", start + len(blob), len(certificate))
        blob += certificate
    return table + bytes(24) + blob


def test_a_certificate_table() -> None:
    table = certificate_table(SNP["vcek"], SNP["ask"] + SNP["ark"])
    assert [one.name for one in parse_table(table)] == ["SEV-VCEK", "SEV-Test", "ARK-Test"]
    for length in range(0, len(table), 31):
        with pytest.raises(EvidenceError):
            parse_table(table[:length])


def test_bounds() -> None:
    with pytest.raises(EvidenceError, match="too-large"):
        Reader(bytes(65 * 1024 * 1024), "much")
    material = Material()
    for index in range(FILES_MAX):
        material.add(f"f{index}", DCAP["root_crl"])
    with pytest.raises(EvidenceError, match="too-large"):
        material.add("one more", DCAP["root_crl"])


def test_every_reason_is_tested_for() -> None:
    """A check whose removal no test would notice has no place in the catalogue."""
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [code for code in REASONS if f'"{code}"' not in text] == []


def test_every_reason_has_a_clause_and_a_whole_sentence() -> None:
    assert all(rule.clause for rule in REASONS.values())
    findings = Findings("evidence")
    with pytest.raises(KeyError):
        findings.add("no.such-reason", "")
    findings.add("evidence.none", "nothing")
    findings.add("evidence.none", "nothing")
    assert len(conclude(findings, kind="", ceiling=Level.NOTHING).reasons) == 1


def test_der_is_bounded() -> None:
    assert der.read_elements(tlv(4, b"x" * 300), "der") == [(4, b"x" * 300)]
    for bad in (b"\x30", b"\x30\x80", b"\x30\x84\0\0\0\0", b"\x30\x05\0", b"\x30\x82\x01"):
        with pytest.raises(EvidenceError):
            der.read_elements(bad, "der")
    for bad in (b"", b"\x80", bytes(9)):
        with pytest.raises(EvidenceError):
            der.read_integer(bad, "integer")


def _evidence_or_error(parse: Callable[[bytes], Any], data: bytes) -> type:
    """What came of it; what was parsed can be shown."""
    try:
        value = parse(data)
    except EvidenceError:
        return EvidenceError
    json.dumps(repr(value))
    return type(value)


def test_a_reason_that_quotes_the_evidence_is_fit_for_a_terminal() -> None:
    findings = Findings("evidence")
    findings.add("evidence.none", "the log has /usr/bin/\x1b]0;title\x07 and \udcff")
    assert findings.reasons[0].sentence == "the log has /usr/bin/?]0;title? and ?"
