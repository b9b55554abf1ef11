"""What another host shows of its TPM when it is paired or enrolled: judged here, and proved by credential activation.

Each host makes a credential for the other's keys, which only the TPM that has both opens; so an attestation key that was copied
from elsewhere, or made in software beside somebody's endorsement key, is noticed before it is trusted.
"""

import asyncio
import base64
import binascii
import hmac
import socket
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import structlog

from sealane.attest.asking import ActivationAsked
from sealane.attest.endorsement import verify_endorsement
from sealane.attest.known import KnownHost
from sealane.attest.tpm import parse_tpm_public
from sealane.errors import AttestationRejected, HostError, PeerError, SealaneError
from sealane.host.fleet.evidence import ask_quoting
from sealane.quoting.enrolment import challenge
from sealane.session.pairing import Offer


class Proving(Protocol):
    """Both sides of the proof. The default proves nothing, for hosts that show no TPM."""

    async def challenge(self, offer: Offer) -> tuple[bytes, bytes]:
        """(credential, secret) for the other end's keys; both empty where it shows none. Raises SealaneError."""

    async def activate(self, credential: bytes) -> bytes:
        """What this host's TPM finds in a credential; empty for an empty one. Raises HostError."""


class TpmProving:
    """With the tools, and this host's TPM behind the quoting process."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """`connect` gives a line to the quoting process that is the agent's own."""
        self._connect = connect

    async def challenge(self, offer: Offer) -> tuple[bytes, bytes]:
        """See `Proving`."""
        keys = shown_keys(offer)
        return (b"", b"") if keys is None else await asyncio.to_thread(challenge, *keys)

    async def activate(self, credential: bytes) -> bytes:
        """See `Proving`."""
        if not credential:
            return b""
        answer = await asyncio.to_thread(ask_quoting, self._connect(), ActivationAsked(credential))
        return answer["secret"]


def check_secret(expected: bytes, found: bytes) -> None:
    """The other end's TPM opened its credential; raises PeerError `pairing.tpm`. Nothing is expected of a host without TPM."""
    if expected and not hmac.compare_digest(expected, found):
        raise PeerError("pairing.tpm")


def shown_keys(offer: Offer) -> tuple[bytes, bytes] | None:
    """(endorsement key, attestation key) as the other end shows them (TPM2B_PUBLIC); None without. Raises PeerError."""
    if "ek" not in offer.endorsements and "ak" not in offer.endorsements:
        return None
    return _part(offer, "ek"), _part(offer, "ak")


def known_host_of(offer: Offer, roots: Sequence[str], now: datetime) -> KnownHost | None:
    """What the other end shows of its hardware and software, None where it shows nothing; its TPM counts as hardware only where
    its certificate leads to one of the roots (files). Raises PeerError `peer.message`.

    A host that names hardware has to show the keys of that hardware, which are then proved.
    """
    keys = shown_keys(offer)
    if "reference" not in offer.endorsements:
        return None
    try:
        shown = KnownHost(reference=_part(offer, "reference").decode())
        named = shown.parsed().hosts or []
        digest = None if keys is None else parse_tpm_public(keys[1]).key.digest
    except (ValueError, SealaneError, RecursionError):
        raise PeerError("peer.message", "what the other end shows of itself cannot be read") from None
    if named != ([] if digest is None else [f"ak:{digest}"]):
        raise PeerError("pairing.tpm", "the other end names hardware whose keys it does not show")
    if keys is None or digest is None or not _is_hardware(offer, keys[0], roots, now):
        return shown
    return shown.model_copy(update={"hardware_keys": [digest]})


def _is_hardware(offer: Offer, endorsement_key: bytes, roots: Sequence[str], now: datetime) -> bool:
    if "ek-certificate" not in offer.endorsements or not roots:
        return False
    log = structlog.get_logger().bind(part="pairing")
    try:
        files = [Path(path).read_bytes() for path in roots]
    except OSError as error:
        raise HostError("host.permission", f"{error.filename}: {error.strerror}") from error
    try:
        root = verify_endorsement(_part(offer, "ek-certificate"), endorsement_key, files, now=now)
    except AttestationRejected as error:
        log.warning("a TPM does not count as hardware", host=offer.certificate.name, reason=error.detail)
        return False
    log.info("a TPM's maker vouches for it", host=offer.certificate.name, root=root)
    return True


def _part(offer: Offer, name: str) -> bytes:
    try:
        return base64.b64decode(offer.endorsements[name], validate=True)
    except (KeyError, ValueError, binascii.Error):
        raise PeerError("peer.message", f"the other end's {name} cannot be read") from None
