"""What the enclave tells its agent of the peer: who it is, and what was thought of its evidence."""

import json
from collections.abc import Mapping
from typing import Final

from sealane.attest.peer import PeerRejected, summarise
from sealane.attest.verdict import Verdict
from sealane.enclave.interface import PeerEstablished, PeerSeen
from sealane.errors import SealaneError
from sealane.session.channel import Established, Met
from sealane.session.vouching import Vouched

_AUTHORITY_SHOWN: Final = 64


def established(event: Established, protection: str) -> PeerEstablished:
    """The peer was met and attested."""
    attested = event.attested
    return PeerEstablished(
        event.peer_name,
        event.peer_fingerprint,
        event.tls_version,
        event.group,
        event.cipher,
        attested.subject.vm,
        attested.subject.epoch,
        _in_words(attested.verdict, attested.evidence),
        protection,
        _voucher(event.vouched),
    )


def seen(
    met: Met, protection: str, verdict: Verdict | None, evidence: Mapping[str, str], *, accepted: bool
) -> PeerSeen:
    """What was thought of the evidence that a peer showed, at first or again."""
    subject = met.known.subject
    return PeerSeen(
        met.peer_name,
        met.peer_fingerprint,
        met.tls_version,
        met.group,
        met.cipher,
        "" if subject is None else subject.vm,
        0 if subject is None else subject.epoch,
        _in_words(verdict, evidence),
        protection,
        _voucher(met.vouched),
        accepted,
    )


def refused(met: Met, protection: str, error: SealaneError) -> PeerSeen:
    """For the last word before the failure: the verdict that refused the peer, or the one there was."""
    if isinstance(error, PeerRejected):
        return seen(met, protection, error.verdict, error.evidence, accepted=False)
    return seen(met, protection, met.known.verdict, met.known.evidence, accepted=False)


def _in_words(verdict: Verdict | None, evidence: Mapping[str, str]) -> str:
    return "" if verdict is None else json.dumps(summarise(verdict, evidence))


def _voucher(vouched: Vouched | None) -> str:
    return vouched.authority[:_AUTHORITY_SHOWN] if vouched else ""
