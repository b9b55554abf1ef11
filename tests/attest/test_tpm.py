"""TPM quotes with their logs: each check by the one change that it is there for."""

from typing import Any

import pytest

from sealane.attest.appraise import Material, appraise
from sealane.attest.reasons import Level
from sealane.attest.verdict import Verdict
from sealane.errors import EvidenceError
from tests.attest.dcap_rig import NOW
from tests.attest.tpm_rig import FILES, PCRS, TpmRig, boot_events, replay, secure_boot_variable

Told = set[str]


@pytest.mark.parametrize("changes", [{}, {"rsa": True}, {"pss": True}, {"padded": True}, {"leave_out": ()}])
def test_a_host_with_hardware_reaches_level_3(changes: dict[str, Any]) -> None:
    verdict = TpmRig(root="hardware", **changes).verdict()
    assert codes(verdict) == set()
    assert verdict.why_not() == []
    assert verdict.level == verdict.production_level == Level.HARDWARE_ROOTED


def test_a_software_tpm_counts_only_where_it_is_accepted_and_never_for_production() -> None:
    rig = TpmRig()
    accepted = rig.verdict()
    assert codes(accepted) == {"tpm.test-root-accepted"}
    assert (accepted.level, accepted.production_level) == (Level.HARDWARE_ROOTED, Level.NOTHING)
    refused = rig.verdict(rig.reference(accept_test_roots=False))
    assert codes(refused) == {"tpm.test-root"}
    assert refused.level == Level.NOTHING


HIDDEN = [event for event in boot_events() if event[0] != 9]
CHANGED = [(pcr, kind, b"other" if pcr == 8 else data) for pcr, kind, data in boot_events()]
LINES = [line for _, line in TpmRig().measurements()]
SWAPPED = [LINES[0], LINES[2], LINES[1]]

CASES: list[tuple[str, dict[str, Any], Told, Level]] = [
    ("signature missing", {"leave_out": ("signature", "values")}, {"tpm.signature-missing"}, Level.NOTHING),
    ("key missing", {"leave_out": ("key", "values")}, {"tpm.key-missing"}, Level.NOTHING),
    ("signature bad", {"spoil": True}, {"tpm.signature"}, Level.NOTHING),
    ("SHA-1 signature", {"hash_id": 4}, {"tpm.signature"}, Level.NOTHING),
    ("key unrestricted", {"attributes": 1 << 18 | 1 << 1 | 1 << 4 | 1 << 5}, {"tpm.ak-attributes"}, Level.NOTHING),
    ("key decrypts too", {"attributes": 1 << 17 | 0x50072}, {"tpm.ak-attributes"}, Level.NOTHING),
    ("no PCR", {"pcrs": ()}, {"tpm.selection-empty"}, Level.NOTHING),
    ("empty nonce", {"nonce": b""}, {"binding.empty"}, Level.NOTHING),
    ("zero nonce", {"nonce": bytes(32)}, {"binding.empty"}, Level.NOTHING),
    ("another nonce", {"nonce": b"\x09" * 32}, {"binding.mismatch"}, Level.NOTHING),
    ("clock", {"safe": 0}, {"tpm.clock-unsafe"}, Level.HARDWARE_ROOTED),
    ("an event hidden", {"told_events": HIDDEN}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("an event changed", {"told_events": CHANGED}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("a changed event beside values", {"told_events": CHANGED, "leave_out": ()},
     {"tpm.pcr-replay", "ima.boot-aggregate"}, Level.NOTHING),
    ("a PCR's events hidden beside values", {"told_events": HIDDEN, "leave_out": ("ima",)},
     {"tpm.pcr-replay", "tpm.runtime-log-missing"}, Level.NOTHING),
    ("false values", {"values": replay(CHANGED, "sha256"), "leave_out": ()}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("values missing", {"values": {0: bytes(32)}, "leave_out": ()}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("SHA-1 log for SHA-256 PCRs", {"legacy": True}, {"tpm.pcr-replay", "eventlog.legacy"}, Level.NOTHING),
    ("boot PCR left out", {"pcrs": tuple(pcr for pcr in PCRS if pcr != 9)},
     {"tpm.boot-unquoted", "reference.mismatch"}, Level.NOTHING),
    ("no boot log, but values", {"leave_out": ("boot",)}, {"tpm.boot-log-missing"}, Level.IDENTITY),
    ("no IMA log, but values", {"leave_out": ("ima",)}, {"tpm.runtime-log-missing"}, Level.MEASURED_SOFTWARE),
    ("IMA PCR not quoted", {"pcrs": PCRS[:-1]}, {"tpm.runtime-log-missing"}, Level.MEASURED_SOFTWARE),
    ("IMA entries swapped", {"ima_lines": SWAPPED}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("IMA entry removed", {"ima_lines": LINES[:1]}, {"tpm.pcr-digest"}, Level.NOTHING),
    ("IMA log false beside values", {"ima_lines": SWAPPED, "leave_out": ()}, {"tpm.pcr-replay"}, Level.NOTHING),
    ("IMA log grew", {"quote_after": 2}, {"ima.unproved-tail"}, Level.HARDWARE_ROOTED),
    ("IMA was off", {"quote_after": 0}, {"tpm.runtime-log-missing", "ima.unproved-tail"}, Level.MEASURED_SOFTWARE),
    ("IMA without a policy", {"quote_after": 1}, {"tpm.runtime-log-missing", "ima.unproved-tail"}, Level(2)),
    ("IMA PCR quoted, no log, no values", {"leave_out": ("ima", "values")},
     {"tpm.pcr-digest", "tpm.runtime-log-missing"}, Level.NOTHING),
    ("IMA violation", {"violation": True}, {"ima.violation"}, Level.MEASURED_SOFTWARE),
    ("boot_aggregate of another boot", {"aggregate": "33" * 32}, {"ima.boot-aggregate"}, Level.NOTHING),
    ("a strange file", {"files_run": (*FILES, ("/tmp/evil", "66" * 32))}, {"reference.mismatch"}, Level.NOTHING),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected", "level"), [one[1:] for one in CASES], ids=[one[0] for one in CASES])
def test_one_change_gives_its_own_reason(changes: dict[str, Any], expected: Told, level: Level) -> None:
    verdict = TpmRig(root="hardware", **changes).verdict()
    assert codes(verdict) == expected
    assert verdict.level == level


EXPECTATIONS: list[tuple[str, dict[str, Any], str, Level]] = [
    ("unknown key", {"tpm": {"keys": []}}, "tpm.ak-unknown", Level.NOTHING),
    ("another host", {"hosts": ["ak:00"]}, "reference.host", Level.NOTHING),
    ("no host", {"hosts": None}, "reference.host-unnamed", Level.MEASURED_SOFTWARE),
    ("another PCR", {"tpm": {"pcrs": {"sha256": {"4": ["00" * 32]}}}}, "reference.mismatch", Level.NOTHING),
    ("an unquoted PCR", {"tpm": {"pcrs": {"sha256": {"14": ["00" * 32]}}}}, "reference.mismatch", Level.NOTHING),
    ("another bank", {"tpm": {"pcrs": {"sha384": {"4": ["00" * 48]}}}}, "reference.mismatch", Level.NOTHING),
    ("no PCR values", {"tpm": {"pcrs": None}}, "reference.none", Level.IDENTITY),
    ("no files", {"ima": None}, "reference.runtime-none", Level.MEASURED_SOFTWARE),
    ("no nonce", {"user_data": None}, "binding.unchecked", Level.MEASURED_SOFTWARE),
]


@pytest.mark.parametrize(("changes", "code", "level"), [e[1:] for e in EXPECTATIONS], ids=[e[0] for e in EXPECTATIONS])
def test_what_is_not_expected_or_not_known(changes: dict[str, Any], code: str, level: Level) -> None:
    rig = TpmRig(root="hardware")
    verdict = rig.verdict(rig.reference(**changes))
    assert codes(verdict) == {code}
    assert verdict.level == level


def test_sha1_pcrs_identify_and_no_more() -> None:
    verdict = TpmRig(root="hardware", bank="sha1").verdict()
    assert {"tpm.weak-bank", "reference.mismatch"} == codes(verdict)
    rig = TpmRig(root="hardware", bank="sha1")
    values = {str(pcr): [value.hex()] for pcr, value in replay(rig.events, "sha1").items() if pcr < 8}
    assert rig.verdict(rig.reference(tpm={"pcrs": {"sha1": values}})).level == Level.IDENTITY


def test_files_measured_with_sha1_are_weak() -> None:
    files = tuple((name, digest[:40]) for name, digest in FILES)
    rig = TpmRig(root="hardware", files_run=files, file_algorithm="sha1")
    reference = rig.reference(ima={"digests": [f"sha1:{digest}" for _, digest in files]})
    verdict = rig.verdict(reference)
    assert codes(verdict) == {"ima.weak-digest"}
    assert verdict.level == Level.MEASURED_SOFTWARE


def test_a_line_whose_template_digest_does_not_fit_is_refused_although_the_fields_replay() -> None:
    lines = [LINES[0], LINES[1].replace(LINES[1].split()[1], "12" * 20), LINES[2]]
    assert codes(TpmRig(root="hardware", ima_lines=lines).verdict()) == {"ima.template"}


def test_event_data_that_was_not_measured_is_refused() -> None:
    rig = TpmRig(root="hardware", leave_out=("values",))
    files = rig.files()
    files["boot"] = files["boot"].replace(secure_boot_variable(True), secure_boot_variable(False))
    assert {"eventlog.data"} < codes(judge(files, rig.reference()))


def test_two_quotes_are_not_guessed_apart() -> None:
    rig = TpmRig(root="hardware")
    verdict = judge({**rig.files(), "second": rig.quote()}, rig.reference())
    assert codes(verdict) == {"evidence.twice"}


@pytest.mark.parametrize("name", ["boot", "ima"])
def test_a_log_alone_proves_nothing(name: str) -> None:
    rig = TpmRig(root="hardware")
    verdict = judge({name: rig.files()[name]}, rig.reference())
    assert codes(verdict) == {"eventlog.unquoted" if name == "boot" else "ima.unquoted"}
    assert verdict.level == Level.NOTHING
    assert not verdict.accepted
    assert judge({name: rig.files()[name]}, rig.reference(minimum_level=0)).accepted


def test_secure_boot_is_told() -> None:
    events = [(pcr, kind, secure_boot_variable(False) if kind == 0x80000001 else d) for pcr, kind, d in boot_events()]
    assert codes(TpmRig(root="hardware", events=events).verdict()) == {"eventlog.secure-boot"}


def test_every_byte_of_quote_and_signature_counts() -> None:
    rig = TpmRig(root="hardware")
    files, reference = rig.files(), rig.reference()
    passed = []
    for name in ("quote", "signature"):
        for at in range(len(files[name])):
            data = files[name]
            changed = {**files, name: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]}
            try:
                verdict = judge(changed, reference)
            except EvidenceError:
                continue  # not understood any more
            if verdict.accepted:
                passed.append((name, at))
    assert passed == []


def test_nothing_is_refused() -> None:
    verdict = appraise(Material(), now=NOW)
    assert codes(verdict) == {"evidence.none"}
    assert verdict.why_not()


def judge(files: dict[str, bytes], reference: Any) -> Verdict:
    material = Material()
    for name, data in files.items():
        material.add(name, data)
    return appraise(material, reference, now=NOW)


def codes(verdict: Verdict) -> Told:
    return {reason.code for reason in verdict.reasons}
