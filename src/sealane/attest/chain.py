"""Certificate chains up to a pinned root, with revocation and an explicit clock (RFC 5280, section 6).

Signatures come first; what a certificate says counts only when its chain holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from sealane.attest.verdict import Findings
from sealane.crypto.chains import Certificate, LinkBroken, RevocationList

CHAIN_MAX = 6  # Intel's and AMD's have three


@dataclass(frozen=True)
class Anchors:
    """Which roots count: the vendor's, and a reference file's test roots (by digest of the public key)."""

    vendor: Mapping[str, str]
    test: frozenset[str] = frozenset()
    accept_test: bool = False


def build_chain(leaf: Certificate, pool: Iterable[Certificate]) -> list[Certificate]:
    """From the leaf up by names, as far as the pool goes; the root last where it is there.

    Where several certificates of the pool have the issuer's name, one that signed is preferred.
    """
    candidates = list(pool)
    chain = [leaf]
    while not chain[-1].self_issued and len(chain) < CHAIN_MAX:
        issuers = [one for one in candidates if one.subject == chain[-1].issuer and one not in chain]
        if not issuers:
            break
        chain.append(next((one for one in issuers if _signed(chain[-1], one)), issuers[0]))
    return chain


def verify_chain(chain: Sequence[Certificate], anchors: Anchors, now: datetime, findings: Findings) -> bool:
    """Links, root and validity; True where nothing was found against the chain. Says what it finds in `findings`."""
    before = len(findings.reasons)
    root = chain[-1]
    if not root.self_issued:
        findings.add("chain.missing", f"the certificate that issued {root.name!r} is missing")
    for depth, (child, issuer) in enumerate(zip(chain, [*chain[1:], root], strict=True)):
        if child is root and not root.self_issued:
            break
        try:
            child.verify_issued_by(issuer)
        except LinkBroken as broken:
            findings.add("chain.broken", str(broken))
        if issuer.path_length is not None and issuer is not child and issuer.path_length < depth:
            findings.add("chain.broken", f"{issuer.name} allows fewer certificates below it")
    for one in chain:
        if one.unknown_critical:
            findings.add("chain.broken", f"{one.name} has a critical extension that is not known")
        if now < one.not_before:
            findings.add("chain.not-yet-valid", f"{one.name} is valid from {one.not_before:%Y-%m-%d %H:%M} on")
        if now > one.not_after:
            findings.add("chain.expired", f"{one.name} expired on {one.not_after:%Y-%m-%d %H:%M}")
    if root.self_issued:
        _judge_root(root, anchors, findings)
    return all(reason.code == "chain.test-root-accepted" for reason in findings.reasons[before:])


def check_revocation(
    chain: Sequence[Certificate],
    lists: Iterable[RevocationList],
    now: datetime,
    findings: Findings,
    *,
    missing: str = "crl.missing",
) -> bool:
    """Every certificate below the root against its issuer's list; `missing` is the reason where there is none."""
    before = len(findings.reasons)
    every = list(lists)
    for child, issuer in pairwise(chain):
        found = [one for one in every if one.issuer == issuer.subject]
        if not found:
            findings.add(missing, f"no revocation list of {issuer.name} was given, so {child.name} is unchecked")
        for one in found:
            _judge_list(one, child, issuer, now, findings)
    return len(findings.reasons) == before


def _judge_list(
    revocations: RevocationList, child: Certificate, issuer: Certificate, now: datetime, findings: Findings
) -> None:
    try:
        revocations.verify_issued_by(issuer)
    except LinkBroken as broken:
        findings.add("crl.signature", str(broken))
        return
    if revocations.indirect_or_partial:
        findings.add("crl.signature", f"the list of {issuer.name} covers only a part, or others' certificates")
    if now < revocations.this_update:
        findings.add("crl.not-yet-valid", f"the list of {issuer.name} is of {revocations.this_update:%Y-%m-%d %H:%M}")
    if revocations.next_update is None or now > revocations.next_update:
        until = "without an end" if revocations.next_update is None else f"{revocations.next_update:%Y-%m-%d %H:%M}"
        findings.add("crl.expired", f"the list of {issuer.name} was good until {until}")
    if child.serial in revocations.serials:
        findings.add("chain.revoked", f"{issuer.name} has revoked {child.name} (serial {child.serial:x})")


def _judge_root(root: Certificate, anchors: Anchors, findings: Findings) -> None:
    digest = root.public_key.digest
    if digest in anchors.vendor:
        findings.root = findings.root or anchors.vendor[digest]
    elif digest in anchors.test:
        findings.root = f"test root {root.name}"
        code = "chain.test-root-accepted" if anchors.accept_test else "chain.test-root"
        findings.add(code, f"the chain ends in the test root {root.name!r}, which proves nothing about hardware")
    else:
        findings.add("chain.root-unknown", f"the chain ends in {root.name!r}, whose key is not a vendor's root")


def _signed(child: Certificate, issuer: Certificate) -> bool:
    try:
        child.verify_issued_by(issuer)
    except LinkBroken:
        return False
    return True
