"""The platform log against reference values: what takes part in a migration has to be what is expected.

That the log is true is another question: a quote that covers its PCR says so, or a plain key, which says little.
"""

from collections.abc import Sequence

from sealane.attest.platformlog import TEXTS, Measured, PlatformLog
from sealane.attest.reference import Reference
from sealane.attest.verdict import Findings

_OWN_CODES = {"enclave_manifest": "reference.enclave", "qemu": "reference.qemu"}


def judge_platform_log(log: PlatformLog, reference: Reference, findings: Findings) -> None:
    """Consistency, then every kind that the reference names: nothing else of it, and at least one."""
    findings.facts["platform"] = {
        "entries": len(log.entries),
        "enclave_manifest": sorted(log.digests("enclave-manifest")),
        "qemu": sorted(log.digests("qemu")),
    }
    false = log.false_entries()
    if false:
        findings.add("platform.entry", f"measurements that contradict themselves: {_some(false)}")
    expected = reference.platform
    if expected is None:
        findings.add("reference.platform-none", "no reference values say which enclave, QEMU and kernel are expected")
        return
    for field_name, allowed in expected.model_dump(exclude_none=True).items():
        what = field_name.replace("_", "-")
        entries = [entry for entry in log.entries if entry.what == what]
        strange = [one for one in entries if (one.name if what in TEXTS else one.digest) not in allowed]
        code = _OWN_CODES.get(field_name, "reference.mismatch")
        if not entries:
            findings.add(code, f"the platform log has no {what}, which the reference values expect")
        elif strange:
            findings.add(code, f"{what} is none that a reference value has: {_some(strange)}")


def _some(entries: Sequence[Measured]) -> str:
    shown = ", ".join(f"{one.name[:80]} ({one.digest[7:23]}…)" for one in entries[:3])
    return shown + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
