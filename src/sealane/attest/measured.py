"""Appraisal of TPM quotes and of the logs behind their PCRs:

    1  signature by the attestation key, key known        4  PCRs against reference values
    2  qualifying data, host                              5  runtime log: template digests, replay, files
    3  boot log: event data, replay to the quoted PCRs

2 to 5 need 1. A log without a quote says only what it says of itself: level 0.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sealane.attest.eventlog import EventLog
from sealane.attest.expect import check_binding, check_host
from sealane.attest.ima import ImaLog
from sealane.attest.platform import judge_platform_log
from sealane.attest.platformlog import PlatformLog
from sealane.attest.reasons import Claim, Level
from sealane.attest.reference import Reference, TpmReference
from sealane.attest.tpm import PcrValues, TpmKey, TpmQuote, TpmSignature
from sealane.attest.verdict import Appraisal, Findings, conclude
from sealane.crypto.signatures import SignatureInvalid

BOOT_PCRS: Final = tuple(range(8))
# Where Sealane's log can be: the operating system's. 16 and 23 can be set back at any time, and 17 to 22 by a launch.
LOG_PCRS: Final = tuple(range(8, 16))
_WEAK: Final = ("sha1", "md5")
_MEASURED_LEAST: Final = 2  # boot_aggregate and one file
_SHOWN: Final = 3  # how many files of a long list a sentence names


@dataclass(frozen=True)
class TpmEvidence:
    """A quote with what came with it."""

    quote: TpmQuote
    signature: TpmSignature | None = None
    key: TpmKey | None = None
    values: PcrValues | None = None
    boot_log: EventLog | None = None
    runtime_log: ImaLog | None = None
    platform_log: PlatformLog | None = None


def appraise_tpm(evidence: TpmEvidence, reference: Reference, about: str) -> Appraisal:
    """A quote, its signature, key and logs."""
    findings = Findings(about)
    quote = evidence.quote
    expected = reference.tpm or TpmReference()
    if _verify_signature(evidence, findings) and evidence.key is not None:
        _judge_key(evidence.key, expected, reference, findings)
        check_binding(quote.qualifying_data, reference, findings)
        check_host([f"ak:{evidence.key.key.digest}"], reference, findings)
        findings.facts |= {"resets": quote.resets, "restarts": quote.restarts, "firmware": f"{quote.firmware:#x}"}
        if not quote.clock_safe:
            findings.add("tpm.clock-unsafe", "the TPM's clock may have gone back")
        _judge_pcrs(evidence, expected, reference, findings)
    return conclude(findings, kind="TPM 2.0 quote", ceiling=Level.HARDWARE_ROOTED)


def appraise_boot_log(log: EventLog, reference: Reference, about: str) -> Appraisal:
    """A boot log that no quote covers: what it says is compared, and proves nothing."""
    findings = Findings(about)
    findings.add("eventlog.unquoted", "no TPM quote came with this log: anybody can have written it")
    _judge_boot_log(log, findings)
    bank = _best(list(log.algorithms))
    replayed = log.replay(bank) if bank else {}
    findings.facts["replay"] = {bank: {str(pcr): value.hex() for pcr, value in sorted(replayed.items())}}
    expected = reference.tpm or TpmReference()
    _judge_reference(expected, {bank: replayed}, findings)
    return conclude(findings, kind="event log", ceiling=Level.HARDWARE_ROOTED)


def appraise_runtime_log(log: ImaLog, reference: Reference, about: str) -> Appraisal:
    """An IMA log that no quote covers."""
    findings = Findings(about)
    findings.add("ima.unquoted", "no TPM quote came with this log: anybody can have written it")
    _judge_entries(log, len(log.entries), reference, findings)
    findings.facts["entries"] = len(log.entries)
    findings.facts["replay"] = {bank: log.replay(bank)[-1].hex() for bank in ("sha1", "sha256", "sha384")}
    return conclude(findings, kind="IMA log", ceiling=Level.HARDWARE_ROOTED)


def _verify_signature(evidence: TpmEvidence, findings: Findings) -> bool:
    if evidence.signature is None:
        findings.add("tpm.signature-missing", "the quote's signature (TPMT_SIGNATURE) is missing")
    if evidence.key is None:
        findings.add("tpm.key-missing", "the attestation key's public part is missing")
    if evidence.signature is None or evidence.key is None:
        return False
    try:
        evidence.signature.verify(evidence.key.key, evidence.quote.signed)
    except SignatureInvalid:
        findings.add("tpm.signature", "the quote was not signed by this key: it was changed, or another TPM made it")
        return False
    return True


def _judge_key(key: TpmKey, expected: TpmReference, reference: Reference, findings: Findings) -> None:
    findings.facts["ak"] = key.key.digest
    if key.is_attestation_key is False:
        findings.add(
            "tpm.ak-attributes", "the key is not restricted to what its TPM made: it could sign a made-up quote"
        )
    known = next((one for one in expected.keys if one.digest == key.key.digest), None)
    if known is None:
        findings.root = "unknown"
        findings.add("tpm.ak-unknown", f"no reference value vouches for the attestation key {key.key.digest[:16]}…")
        return
    findings.root = f"TPM {known.name or known.digest[:16]} ({known.root})"
    if known.root == "hardware":
        findings.affirm(Claim.HARDWARE)
    else:
        code = "tpm.test-root-accepted" if reference.accept_test_roots else "tpm.test-root"
        findings.add(code, "the TPM is software: whoever runs its host can make it say anything")


def _judge_pcrs(evidence: TpmEvidence, expected: TpmReference, reference: Reference, findings: Findings) -> None:
    quote = evidence.quote
    bank = _best([name for name, _ in quote.selection])
    if not quote.selection or not bank:
        findings.add("tpm.selection-empty", "the quote covers no PCR of a bank that is known")
        return
    if bank in _WEAK:
        findings.add("tpm.weak-bank", "only SHA-1 PCRs are quoted, for which collisions can be made")
    quoted = {pcr for name, pcrs in quote.selection if name == bank for pcr in pcrs}
    values = _explain(evidence, bank, findings)
    if evidence.boot_log is None:
        findings.add("tpm.boot-log-missing", "no boot log came with the quote, so that its PCRs explain nothing")
    else:
        _judge_boot_log(evidence.boot_log, findings)
        bare = sorted((set(BOOT_PCRS) | {one.pcr for one in evidence.boot_log.events if one.type != 3}) - quoted)
        if bare:
            findings.add("tpm.boot-unquoted", f"the quote leaves out PCRs of the boot: {_numbers(bare)}")
    if values is not None:
        _judge_reference(expected, {bank: {pcr: values[bank][pcr] for pcr in quoted}}, findings)
    _judge_runtime(evidence, quoted, bank, values, reference, findings)
    if evidence.platform_log is not None:
        _judge_platform(evidence.platform_log, bank, values, reference, findings)
    elif reference.platform is not None:
        findings.add("platform.log-missing", "no platform log came: enclave, QEMU and kernel are not known")


def _explain(evidence: TpmEvidence, bank: str, findings: Findings) -> dict[str, dict[int, bytes]] | None:
    """The value of every quoted PCR, such that together they give the quote's digest; None where they do not."""
    if evidence.values is not None:
        return _from_values(evidence, evidence.values, bank, findings)
    if evidence.boot_log is None:
        return None  # said by `tpm.boot-log-missing`
    missing = {name for name, _ in evidence.quote.selection} - set(evidence.boot_log.algorithms)
    if missing:
        findings.add("tpm.pcr-replay", f"the boot log has no digests for the bank {', '.join(sorted(missing))}")
        return None
    for values in _predictions(evidence, evidence.boot_log):
        if _digest(evidence, values) == evidence.quote.pcr_digest:
            return values
    findings.add("tpm.pcr-digest", "the logs do not replay to the quoted PCRs: something was measured that they hide")
    return None


def _from_values(
    evidence: TpmEvidence, given: PcrValues, bank: str, findings: Findings
) -> dict[str, dict[int, bytes]] | None:
    wanted = {(name, pcr) for name, pcrs in evidence.quote.selection for pcr in pcrs}
    lacking = sorted(pcr for name, pcr in wanted if pcr not in given.banks.get(name, {}))
    if lacking:
        findings.add("tpm.pcr-digest", f"values of quoted PCRs are missing: {_numbers(lacking)}")
        return None
    values = {name: {pcr: given.banks[name][pcr] for pcr in pcrs} for name, pcrs in evidence.quote.selection}
    if _digest(evidence, values) != evidence.quote.pcr_digest:
        findings.add("tpm.pcr-digest", "the PCR values are not those that the TPM signed")
        return None
    log = evidence.boot_log
    if log is not None and bank not in log.algorithms:
        findings.add("tpm.pcr-replay", f"the boot log has no digests for the bank {bank}")
    elif log is not None:
        # 10 and above may be extended without the firmware's log; 0 to 9 are the boot's, and hiding all events of one shows
        told = (set(log.replay(bank)) | set(range(10))) & set(values[bank])
        for pcr, value in _by_log(log, bank, sorted(told)).items():
            if value != values[bank][pcr]:
                findings.add(
                    "tpm.pcr-replay", f"the boot log does not replay to PCR {pcr}: events are missing or false"
                )
    return values


def _predictions(evidence: TpmEvidence, log: EventLog) -> Iterable[dict[str, dict[int, bytes]]]:
    """What the quoted PCRs would be by the logs; the runtime log may have grown after the quote, so every prefix counts."""
    base = {name: _by_log(log, name, pcrs) for name, pcrs in evidence.quote.selection}
    runtime = evidence.runtime_log
    if runtime is None or not runtime.entries:
        yield base
        return
    pcr = runtime.entries[0].pcr
    banks = [name for name, pcrs in evidence.quote.selection if pcr in pcrs]
    if not banks:
        yield base
        return
    for padded in (False, True):
        replays = {name: runtime.replay(name, padded=padded) for name in banks}
        for count in range(len(runtime.entries), -1, -1):
            yield base | {name: base[name] | {pcr: replays[name][count]} for name in banks}


def _by_log(log: EventLog, bank: str, pcrs: Sequence[int]) -> dict[int, bytes]:
    """PCRs that no event extended keep what they have from reset (PFP, 2.3: 17 to 22 ones, the others zeros)."""
    size = hashlib.new(bank).digest_size
    replayed = log.replay(bank)
    return {pcr: replayed.get(pcr, (b"\xff" if 17 <= pcr <= 22 else b"\0") * size) for pcr in pcrs}


def _digest(evidence: TpmEvidence, values: Mapping[str, Mapping[int, bytes]]) -> bytes:
    """TPM2_Quote: the digest, by the signature's hash, over the selected PCRs in their order."""
    name = evidence.signature.hash_name if evidence.signature is not None else "sha256"
    joined = b"".join(values[bank][pcr] for bank, pcrs in evidence.quote.selection for pcr in pcrs)
    return hashlib.new(name, joined).digest()


def _judge_boot_log(log: EventLog, findings: Findings) -> None:
    if log.legacy:
        findings.add("eventlog.legacy", "the log has SHA-1 digests only, for which collisions can be made")
    false = log.unproved_data()
    if false:
        where = _numbers(sorted({event.pcr for event in false}))
        findings.add("eventlog.data", f"{len(false)} events (PCR {where}) say other data than was measured")
    secure = log.secure_boot()
    findings.facts["secure_boot"] = secure
    if secure:
        findings.affirm(Claim.CONFIGURATION)
    else:
        said = "is off" if secure is False else "was not measured"
        findings.add("eventlog.secure-boot", f"secure boot {said}")


def _judge_reference(expected: TpmReference, values: Mapping[str, Mapping[int, bytes]], findings: Findings) -> None:
    wanted = {bank: pcrs for bank, pcrs in (expected.pcrs or {}).items() if pcrs}
    if not wanted:
        findings.add("reference.none", "no reference values say what the PCRs should be")
        return
    for bank, pcrs in wanted.items():
        for index, choices in pcrs.items():
            value = values.get(bank, {}).get(int(index))
            if value is None:
                findings.add("reference.mismatch", f"PCR {index} of {bank} is expected and not in the evidence")
            elif value.hex() not in choices:
                findings.add("reference.mismatch", f"PCR {index} of {bank} is {value.hex()}, not a reference value")


def _judge_runtime(
    evidence: TpmEvidence,
    quoted: set[int],
    bank: str,
    values: Mapping[str, Mapping[int, bytes]] | None,
    reference: Reference,
    findings: Findings,
) -> None:
    log = evidence.runtime_log
    if log is None or not log.entries or log.entries[0].pcr not in quoted:
        findings.add("tpm.runtime-log-missing", "no IMA log with its PCR quoted: what ran after the boot is not known")
        return
    if values is None:
        if evidence.boot_log is None:
            findings.add("tpm.pcr-digest", "without a boot log or PCR values the IMA log cannot be tied to the quote")
        return
    target = values[bank][log.entries[0].pcr]
    count = _quoted_entries(log, bank, target)
    if count is None:
        findings.add("tpm.pcr-replay", f"the IMA log does not replay to PCR {log.entries[0].pcr}")
        return
    if count < len(log.entries):
        findings.add("ima.unproved-tail", f"the last {len(log.entries) - count} IMA entries came after the quote")
    if count < _MEASURED_LEAST:
        # IMA switched off leaves its PCR at zero, and without a policy it measures nothing but the boot
        findings.add(
            "tpm.runtime-log-missing", "the quote covers no file of the IMA log: nothing was measured at run time"
        )
        return
    _judge_aggregate(log, evidence.boot_log, findings)
    _judge_entries(log, count, reference, findings)
    if not findings.refused:
        findings.affirm(Claim.EXECUTABLES)


def _judge_platform(
    log: PlatformLog,
    bank: str,
    values: Mapping[str, Mapping[int, bytes]] | None,
    reference: Reference,
    findings: Findings,
) -> None:
    if values is None:
        findings.add("tpm.pcr-digest", "without PCR values the platform log cannot be tied to the quote")
    elif log.replay(bank) not in {values[bank].get(pcr) for pcr in LOG_PCRS}:
        findings.add("platform.replay", "the platform log does not replay to any PCR that is quoted")
    judge_platform_log(log, reference, findings)


def _quoted_entries(log: ImaLog, bank: str, target: bytes) -> int | None:
    for padded in (False, True):
        values = log.replay(bank, padded=padded)
        if target in values:
            return len(values) - 1 - values[::-1].index(target)
    return None


def _judge_aggregate(log: ImaLog, boot_log: EventLog | None, findings: Findings) -> None:
    """boot_aggregate ties the runtime log to the boot: over PCRs 0 to 7, in later kernels 0 to 9 except with SHA-1."""
    first = log.boot_aggregate
    if first is None:
        findings.add("ima.boot-aggregate", "the IMA log does not begin with boot_aggregate")
        return
    if boot_log is None or first.hash_name not in boot_log.algorithms or first.violation:
        return  # both PCRs are in one quote, which ties them as well
    values = boot_log.replay(first.hash_name)
    size = hashlib.new(first.hash_name).digest_size
    aggregates = {
        hashlib.new(first.hash_name, b"".join(values.get(pcr, bytes(size)) for pcr in range(last))).digest()
        for last in (8, 10)
    }
    if first.file_digest not in aggregates:
        findings.add("ima.boot-aggregate", "boot_aggregate in the IMA log is not that of this boot log")


def _judge_entries(log: ImaLog, count: int, reference: Reference, findings: Findings) -> None:
    entries = log.entries[:count]
    false = [entry.name for entry in entries if not entry.consistent]
    if false:
        findings.add("ima.template", f"template digests that do not fit their fields: {_some(false)}")
    violations = [entry.name for entry in entries if entry.violation]
    if violations:
        findings.add("ima.violation", f"files were written while they were measured: {_some(violations)}")
    files = [entry for entry in entries if not entry.violation and entry.name != "boot_aggregate"]
    weak = [entry.name for entry in files if entry.hash_name in _WEAK]
    if weak:
        findings.add("ima.weak-digest", f"files were measured with SHA-1 or MD5: {_some(weak)}")
    if reference.ima is None:
        findings.add("reference.runtime-none", "no reference values say which files may run")
        return
    known = {digest.lower() for digest in reference.ima.digests}
    strange = [entry.name for entry in files if entry.label not in known]
    if strange:
        findings.add("reference.mismatch", f"files ran that no reference value has: {_some(strange)}")


def _best(names: Sequence[str]) -> str:
    """The strongest bank that is known; empty where there is none."""
    order = ("sha512", "sha384", "sha256", "sha1")
    return next((name for name in order if name in names), "")


def _numbers(pcrs: Iterable[int]) -> str:
    return ", ".join(str(pcr) for pcr in pcrs)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(name[:80] for name in names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
