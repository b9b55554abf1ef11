"""Every form in which the kinds of evidence come: versions, TEE types, templates, digests, orders; and what is none of them."""

import hashlib
import itertools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from sealane.attest import appraise as appraising
from sealane.attest.appraise import Material, appraise
from sealane.attest.eventlog import EV_NO_ACTION, parse_event_log
from sealane.attest.ima import ImaLog, parse_ima_log
from sealane.attest.platformlog import Measured, encode_line
from sealane.attest.quotes import EnclaveReport, parse_quote
from sealane.attest.reasons import Level
from sealane.attest.reference import parse_reference
from sealane.attest.snp import parse_report
from sealane.attest.tpm import parse_pcr_values
from sealane.errors import EvidenceError
from tests.attest.dcap_rig import NOW, DcapRig
from tests.attest.test_snp import SnpRig
from tests.attest.tpm_rig import TpmRig, boot_events, encode_event_log, encode_legacy_log, ima_encoded, replay


def codes(files: dict[str, bytes], reference: Any = None) -> set[str]:
    material = Material()
    for name, data in files.items():
        material.add(name, data)
    return {reason.code for reason in appraise(material, *([reference] if reference else []), now=NOW).reasons}


# ---- SGX and TDX


@pytest.mark.parametrize(
    "knobs", [{"version": 4, "of_sgx": True}, {"version": 5, "of_sgx": True}, {"version": 5, "td_15": False}]
)
def test_later_versions_carry_either_tee(knobs: dict[str, Any]) -> None:
    rig = DcapRig(**knobs)
    verdict = rig.verdict()
    assert verdict.level is Level.ISOLATED
    assert {reason.code for reason in verdict.reasons} == {"chain.test-root-accepted"}
    quote = parse_quote(rig.quote())
    assert isinstance(quote.body, EnclaveReport) is rig.sgx
    assert quote.kind == f"{'SGX' if rig.sgx else 'TDX'} quote v{rig.version}"


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("tee", [0, 0x81, 1, 2, 0xFFFFFFFF])
def test_a_tee_type_that_is_not_the_bodys(version: int, tee: int) -> None:
    rig = DcapRig(version=version)
    quote = bytearray(rig.quote())
    if tee == int.from_bytes(quote[4:8], "little"):
        return
    struct.pack_into("<I", quote, 4, tee)
    with pytest.raises(EvidenceError):  # and not taken for the certificates that it holds
        Material().add("quote", bytes(quote))


@pytest.mark.parametrize("version", [3, 4])
def test_the_order_of_files_and_of_an_issuer_chain_does_not_matter(version: int) -> None:
    rig = DcapRig(version=version)
    files = rig.files()
    chance = random.Random(5)
    for _ in range(8):
        names = chance.sample(sorted(files), len(files))
        assert codes({name: files[name] for name in names}, rig.reference()) == {"chain.test-root-accepted"}
    chains = [rig.signer.pem + rig.root.pem, rig.root.pem + rig.signer.pem]
    for first, second in itertools.product(chains, chains):
        tcb, identity = json.loads(files["tcb"]), json.loads(files["identity"])
        bundle = {
            "tcb_info": rig.tcb_info(), "tcb_info_signature": tcb["signature"], "tcb_info_issuer_chain": first.decode(),
            "qe_identity": rig.qe_identity(), "qe_identity_signature": identity["signature"],
            "qe_identity_issuer_chain": second.decode(),
            "root_ca_crl": files["root_crl"].hex(), "pck_crl": files["pck_crl"].hex(),
        }  # fmt: skip
        for order in (sorted(bundle), sorted(bundle, reverse=True)):
            text = json.dumps({name: bundle[name] for name in order}).encode()
            assert codes({"bundle": text, "quote": files["quote"]}, rig.reference()) == {"chain.test-root-accepted"}


# ---- SEV-SNP


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFFFFFF])
def test_reports_of_versions_that_are_not_known(version: int) -> None:
    report = SnpRig(version=version).report()
    with pytest.raises(EvidenceError):
        parse_report(report)
    with pytest.raises(EvidenceError):
        Material().add("report", report)


# ---- event logs


@pytest.mark.parametrize("kind", [0x00, 0x04, 0x07, 0x09, 0x0C, 0x80000002, 0x80000010])
def test_a_log_of_tcg_1_2_may_begin_with_any_event(kind: int) -> None:
    events = [(0, kind, b"first"), *boot_events()]
    data = encode_legacy_log(events)
    assert Material().add("log", data) == "event log"
    log = parse_event_log(data)
    assert log.legacy
    assert log.replay("sha1") == {
        pcr: value for pcr, value in replay(events, "sha1").items() if pcr in log.replay("sha1")
    }
    assert codes({"log": data}) >= {"eventlog.legacy", "eventlog.unquoted"}


def test_an_agile_log_with_sha1_alone_is_as_weak() -> None:
    data = encode_event_log(boot_events(), ("sha1",))
    assert parse_event_log(data).replay("sha1") == parse_event_log(encode_legacy_log(boot_events())).replay("sha1")
    assert "eventlog.legacy" in codes({"log": data})


def test_events_that_extend_nothing_may_stand_at_no_pcr_and_others_may_not() -> None:
    nowhere = 0xFFFFFFFF
    whole = parse_event_log(encode_event_log(boot_events())).replay("sha256")
    log = parse_event_log(encode_event_log([(nowhere, EV_NO_ACTION, b"SP800-155 Event\0"), *boot_events()]))
    assert log.replay("sha256") == whole
    for pcr, kind in ((nowhere, 0x04), (24, EV_NO_ACTION)):
        with pytest.raises(EvidenceError, match="no PCR"):
            parse_event_log(encode_event_log([(pcr, kind, b"x"), *boot_events()]))


# ---- IMA logs

ENTRIES = (("boot_aggregate", "11" * 32), ("/bin/sh", "22" * 32))
TEMPLATES: dict[str, Callable[[str, str], bytes]] = {
    "ima": lambda name, digest: bytes.fromhex(digest[:40]) + name.encode().ljust(256, b"\0"),
    "ima-ng": lambda name, digest: ima_encoded("sha256", digest, name),
    "ima-sig": lambda name, digest: ima_encoded("sha256", digest, name, b"\3\2"),
    "ima-ngv2": lambda name, digest: ima_encoded("ima:sha256", digest, name),
    "ima-sigv2": lambda name, digest: ima_encoded("verity:sha256", digest, name, b""),
}
PRINTED: dict[str, Callable[[str, str], str]] = {
    "ima": lambda name, digest: f"{digest[:40]} {name}",
    "ima-ng": lambda name, digest: f"sha256:{digest} {name}",
    "ima-sig": lambda name, digest: f"sha256:{digest} {name} 0302",
    "ima-ngv2": lambda name, digest: f"ima:sha256:{digest} {name}",
    "ima-sigv2": lambda name, digest: f"verity:sha256:{digest} {name} ",
}
LABELS = {"ima": f"sha1:{'22' * 20}", "ima-sigv2": f"verity:sha256:{'22' * 32}"}


def ascii_log(template: str, bank: str) -> bytes:
    encoded = [(TEMPLATES[template](*entry), PRINTED[template](*entry)) for entry in ENTRIES]
    return "".join(f"10 {hashlib.new(bank, data).hexdigest()} {template} {said}\n" for data, said in encoded).encode()


def binary_log(template: str, bank: str) -> bytes:
    log = b""
    for name, digest in ENTRIES:
        data = TEMPLATES[template](name, digest)
        head = (
            struct.pack("<I", 10)
            + hashlib.new(bank, data).digest()
            + struct.pack("<I", len(template))
            + template.encode()
        )
        if template == "ima":  # its two fields stand bare
            data = bytes.fromhex(digest[:40]) + struct.pack("<I", len(name)) + name.encode()
            log += head + data
        else:
            log += head + struct.pack("<I", len(data)) + data
    return log


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384", "sha512"])
def test_every_template_in_both_forms_and_of_every_bank(template: str, bank: str) -> None:
    logs: list[ImaLog] = []
    for data in (ascii_log(template, bank), binary_log(template, bank)):
        assert Material().add("log", data) == "IMA log"
        logs.append(parse_ima_log(data))
    assert logs[0].entries == logs[1].entries
    assert all(entry.consistent for entry in logs[0].entries)
    assert logs[0].entries[1].label == LABELS.get(template, f"sha256:{'22' * 32}")
    assert logs[0].boot_aggregate is not None
    for data in (ascii_log(template, bank), binary_log(template, bank)):
        assert "ima.template" in codes({"log": data.replace(b"/bin/sh", b"/bin/ss")})


def test_a_weak_hash_is_weak_in_the_second_version_too() -> None:
    encoded = ima_encoded("ima:sha1", "22" * 20, "/bin/sh")
    line = f"10 {hashlib.sha1(encoded).hexdigest()} ima-ngv2 ima:sha1:{'22' * 20} /bin/sh\n"
    assert "ima.weak-digest" in codes({"log": line.encode()})


# ---- text that is none


def test_half_a_character_is_no_text() -> None:
    line = encode_line([Measured("qemu", "HALF", "sha256:" + "11" * 32)]).replace(b"HALF", b"\\ud800") + b"\n"
    identity = DcapRig().files()["identity"].replace(b'"TD_QE"', b'"\\udfff"')
    bundle = json.dumps({"tcb_info": "", "qe_identity": "", "root_ca_crl": "HALF-----BEGIN"}).replace("HALF", "\\ud800")
    for data in (line, identity, bundle.encode()):
        with pytest.raises(EvidenceError, match="malformed"):
            Material().add("file", data)
    assert Material().add("file", line.replace(b"\\ud800", b"\\ud83d\\ude00")) == "platform log"


def test_numbers_of_too_many_digits_are_no_crash() -> None:
    digits = "1" * 5000
    for text in (
        f"version = {digits}",
        f'{{"version": {digits}}}',
        f'version = 1\n[tpm.pcrs.sha256]\n{digits} = ["00"]',
    ):
        with pytest.raises(EvidenceError, match=r"attest\.reference"):
            parse_reference(text.encode())
    for index in ("0" * 5000 + "1", digits, "²", "24", "-1", "", "01"):
        with pytest.raises(EvidenceError):
            parse_pcr_values(json.dumps({"pcrs": {"sha256": {index: "00" * 32}}}).encode())


def test_files_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appraising, "TOTAL_BYTES_MAX", 1000)
    with pytest.raises(EvidenceError, match="too-large"):
        codes(DcapRig().files())


# ---- reference files say where they do not fit

DIGEST = "sha256:" + "11" * 32
TOML = f"""version = 1
hosts = ["ak:{"22" * 32}"]

[tpm]
keys = [{{ digest = "{"22" * 32}", root = "hardware" }}]

[tpm.pcrs.sha256]
4 = ["{"33" * 32}"]

[[ignored]]
x = 1

[ima]
digests = ["{DIGEST}"]

[platform]
qemu = ["{DIGEST}"]
kernel = ["6.1.0"]
"""
GOOD = TOML.replace("[[ignored]]\nx = 1\n", "")


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        ("version = 1", "version = 2", 1),
        (f'["ak:{"22" * 32}"]', '["somebody"]', 2),
        ('root = "hardware"', 'root = "hard"', 5),
        ("4 = [", "44 = [", 4),
        ("[tpm.pcrs.sha256]", "[tpm.pcrs.sha255]", 4),
        (f'digests = ["{DIGEST}"]', 'digests = ["11"]', 12),
        ('kernel = ["6.1.0"]', "kernel = 6", 16),
        ('kernel = ["6.1.0"]', 'colonel = ["6.1.0"]', 16),
        (f'qemu = ["{DIGEST}"]', 'qemu = ["sha256:xy"]', 15),
    ],
)
def test_a_reference_file_that_does_not_fit_names_its_line(right: str, wrong: str, line: int) -> None:
    assert parse_reference(GOOD.encode()).tpm is not None
    assert GOOD.count(right) == 1
    with pytest.raises(EvidenceError, match=rf"line {line}:") as caught:
        parse_reference(GOOD.replace(right, wrong).encode())
    assert caught.value.code == "attest.reference"


def test_so_does_one_in_json_and_one_with_tables_in_a_row() -> None:
    value = json.loads(TpmRig().reference().model_dump_json(exclude_none=True))
    value["ima"]["digests"].append("xx")
    text = json.dumps(value, indent=1)
    wanted = 1 + text[: text.index('"xx"')].count("\n")
    with pytest.raises(EvidenceError, match=rf"line {wanted}: ima\.digests\.2:"):
        parse_reference(text.encode())
    keys = '[[tpm.keys]]\ndigest = "11"\nroot = "hardware"\n'
    with pytest.raises(EvidenceError, match=r"line 7: tpm\.keys\.1\.root:"):
        parse_reference(("version = 1\n" + keys + keys.replace("hardware", "other")).encode())
    with pytest.raises(EvidenceError, match=r"the key 'version' stands twice"):
        parse_reference(b'{"version": 1, "version": 1}')
    for broken in (b"version = 1\nhosts = [\n", b'{"version": 1,\n "hosts": [}', b'version = 1\nhosts = ["\x80"]'):
        with pytest.raises(EvidenceError, match=r"line 2|line 3|end of document"):
            parse_reference(broken)


def test_case_does_not_count_in_what_is_hexadecimal() -> None:
    found = parse_reference(GOOD.replace("11", "aA").encode())
    assert found.platform is not None
    assert found.platform.qemu == [DIGEST.replace("11", "aa")]
