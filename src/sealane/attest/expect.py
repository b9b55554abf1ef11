"""Evidence against expectations, the same way for every kind: values, host, binding to this conversation."""

import hmac
from collections.abc import Iterable, Sequence

from sealane.attest.reasons import Claim
from sealane.attest.reference import Reference
from sealane.attest.verdict import Findings


def check_binding(user_data: bytes, reference: Reference, findings: Findings) -> None:
    """REPORTDATA or a TPM quote's qualifying data against what the relying party asked for.

    Expected bytes that are shorter than the field stand in front, with zeros behind.
    """
    findings.facts["user_data"] = user_data.hex()
    if not any(user_data):
        findings.add("binding.empty", "the user data is empty: the evidence is bound to no channel and no nonce")
        return
    if reference.user_data is None:
        findings.add("binding.unchecked", "no expected user data was given: the evidence may be old or another's")
        return
    expected = bytes.fromhex(reference.user_data)
    if not hmac.compare_digest(expected.ljust(len(user_data), b"\0"), user_data):
        findings.add("binding.mismatch", "the user data is not what was asked for: other evidence, or another channel")


def check_host(identities: Sequence[str], reference: Reference, findings: Findings) -> None:
    """The hardware's own name against the hosts that are expected."""
    findings.facts["host"] = list(identities)
    if reference.hosts is None:
        findings.add("reference.host-unnamed", "no host was named: the same software runs on others' hardware too")
    elif not set(identities) & {name.lower() for name in reference.hosts}:
        findings.add("reference.host", f"this is another host than those named: {', '.join(identities) or 'nameless'}")
    else:
        findings.affirm(Claim.INSTANCE_IDENTITY)


def check_values(values: Iterable[tuple[str, bytes, Sequence[str] | None]], findings: Findings) -> bool:
    """Each (name, value, allowed): True where nothing that is allowed for was missed. None expects nothing."""
    good = True
    for name, value, allowed in values:
        if allowed is not None and value.hex() not in allowed:
            findings.add("reference.mismatch", f"{name} is {value.hex()}, which no reference value has")
            good = False
    return good
