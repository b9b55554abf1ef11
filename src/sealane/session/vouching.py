"""Whether a CA that this host trusts vouches for a peer: its host certificate, judged without I/O (RFC 5280, 6.1 and 6.3).

A peer shows its own certificate, whose key TLS proves, and behind it the certificate that a CA has issued over the same key.
What is checked, in this order; each has an error of its own:

    ca.malformed       it is a host certificate as a CA of ours writes it, with the claims below
    ca.not-a-host      it is not a CA's certificate: who can issue must not be a peer
    ca.key             it is over the key that the peer has proved to hold
    ca.unknown         a CA that this host trusts has signed it
    ca.authority-over  that CA's own certificate is valid now
    ca.not-yet-valid   it is valid already
    ca.expired         it is valid still
    ca.list            there is a revocation list that this CA has signed
    ca.revoked         the list does not have it
    ca.list-stale      that list is of now, unless the settings accept an older one
    ca.name            it is of the host that is wanted, and does not take the name of one that is trusted by itself
    ca.level           the CA found the level that this host wants

CLAIMS, an extension of the certificate, is JSON: {"hardware": ["ak:<sha256>", …], "level": 3, "production_level": 1,
"root": "<words>", "version": 1}.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealane.crypto.authority import CLAIMS
from sealane.crypto.chains import (
    Certificate,
    CertificateMalformed,
    LinkBroken,
    RevocationList,
    parse_certificates,
    parse_revocation_list,
)
from sealane.crypto.signatures import parse_public_key
from sealane.errors import InternalError, PeerError, printable

# What a host certificate's claims may take; an attestation key's name has 67 characters, and a host has one or two.
CLAIMS_BYTES_MAX: Final = 4096
_UNKNOWN: Final = "ca.unknown"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Claims(_Strict):
    """What the CA found when it issued the certificate. `hardware` are identities as a policy has them (`ak:…`)."""

    version: Literal[1] = 1
    level: Annotated[int, Field(ge=1, le=4)]
    production_level: Annotated[int, Field(ge=0, le=4)]
    root: Annotated[str, Field(max_length=200)] = ""
    hardware: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=8)] = []

    def encode(self) -> bytes:
        """As the extension has it."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


class TrustedAuthority(_Strict):
    """A CA's certificate and its revocation list, PEM; an empty list where there is none yet."""

    certificate: str
    revocations: str = ""


class Vouchers(_Strict):
    """Who may vouch for peers here, and what is wanted of what they say. `wanted_name` is empty where any host may come."""

    authorities: Annotated[list[TrustedAuthority], Field(max_length=8)] = []
    stale_list: Literal["refuse", "accept"] = "refuse"
    least_level: Annotated[int, Field(ge=1, le=4)] = 1
    wanted_name: str = ""


NO_VOUCHERS: Final = Vouchers()


def parse_vouchers(text: str) -> Vouchers:
    """What an agent tells its enclave; empty is none. Raises InternalError."""
    try:
        return Vouchers.model_validate_json(text) if text else NO_VOUCHERS
    except ValidationError as error:
        raise InternalError("internal.error", f"{error.error_count()} fields of the CAs do not fit") from None


@dataclass(frozen=True)
class Vouched:
    """A peer that a CA vouches for."""

    name: str
    authority: str
    serial: int
    not_after: datetime
    claims: Claims


@dataclass(frozen=True)
class _Anchor:
    certificate: Certificate
    revocations: RevocationList | None = field(repr=False)


class Notary:
    """Judges what peers show. Made of bytes that this host keeps; raises PeerError `ca.malformed` where those are broken."""

    def __init__(self, vouchers: Vouchers) -> None:
        self._vouchers = vouchers
        self._anchors = [_anchor(one) for one in vouchers.authorities]

    @property
    def is_there(self) -> bool:
        """Whether any CA is trusted."""
        return bool(self._anchors)

    def judge(
        self, own: bytes, shown: Sequence[bytes], *, peer_key: bytes, taken: Iterable[str], now: datetime
    ) -> Vouched:
        """Who the peer is. `own` is its certificate and `shown` what came behind it (DER), `peer_key` the key that it holds
        (SubjectPublicKeyInfo), `taken` the names of hosts that are trusted by themselves. Raises PeerError `ca.*`, and
        `peer.unknown` where nothing was shown.
        """
        if _parse(own).is_authority:
            raise PeerError("ca.not-a-host", "the peer shows a CA's certificate as its own")
        failed: PeerError | None = None
        for der in shown:
            try:
                return self._judge_one(_parse(der), peer_key, frozenset(taken), now)
            except PeerError as error:
                failed = error if failed is None or failed.code == _UNKNOWN else failed
        raise failed or PeerError("peer.unknown", "the peer is not trusted by itself, and shows no CA's certificate")

    def _judge_one(self, shown: Certificate, peer_key: bytes, taken: frozenset[str], now: datetime) -> Vouched:
        if shown.is_authority:
            raise PeerError("ca.not-a-host", f"{printable(shown.name, 64)} is a CA, and shows itself as a host")
        if shown.unknown_critical:
            raise PeerError("ca.malformed", "the host certificate has a critical extension that is not known")
        if shown.public_key != parse_public_key(peer_key):
            raise PeerError("ca.key", "the host certificate is over another key than the peer's")
        anchor = self._issuer_of(shown)
        if not anchor.certificate.not_before <= now <= anchor.certificate.not_after:
            raise PeerError("ca.authority-over", f"the CA {anchor.certificate.name} is not valid now")
        if now < shown.not_before:
            raise PeerError("ca.not-yet-valid", f"the host certificate is valid from {_when(shown.not_before)}")
        if now > shown.not_after:
            raise PeerError("ca.expired", f"the host certificate of {shown.name} expired at {_when(shown.not_after)}")
        self._check_list(anchor, shown, now)
        claims = _claims(shown)
        wanted = self._vouchers.wanted_name
        if wanted and shown.name != wanted:
            raise PeerError("ca.name", f"the CA says that this is {printable(shown.name, 64)}, not {wanted}")
        if shown.name in taken:
            raise PeerError("ca.name", f"{printable(shown.name, 64)} is trusted here by another certificate")
        if claims.level < self._vouchers.least_level:
            least = self._vouchers.least_level
            raise PeerError("ca.level", f"the CA found {shown.name} at level {claims.level}, and {least} is wanted")
        return Vouched(shown.name, anchor.certificate.name, shown.serial, shown.not_after, claims)

    def _issuer_of(self, shown: Certificate) -> _Anchor:
        for anchor in self._anchors:
            try:
                shown.verify_issued_by(anchor.certificate)
            except LinkBroken:
                continue
            return anchor
        raise PeerError(_UNKNOWN, f"no CA that is trusted here has signed for {printable(shown.name, 64)}")

    def _check_list(self, anchor: _Anchor, shown: Certificate, now: datetime) -> None:
        name, revocations = anchor.certificate.name, anchor.revocations
        if revocations is None:
            raise PeerError("ca.list", f"there is no revocation list of the CA {name}")
        try:
            revocations.verify_issued_by(anchor.certificate)
        except LinkBroken as error:
            raise PeerError("ca.list", str(error)) from None
        if revocations.indirect_or_partial or revocations.number is None or revocations.next_update is None:
            raise PeerError("ca.list", f"the revocation list of {name} is not a whole one with number and next update")
        if shown.serial in revocations.serials:
            raise PeerError("ca.revoked", f"the CA {name} has revoked the certificate of {printable(shown.name, 64)}")
        fresh = revocations.this_update <= now <= revocations.next_update
        if not fresh and self._vouchers.stale_list == "refuse":
            raise PeerError("ca.list-stale", f"the list of {name} is of {_when(revocations.this_update)}")


def check_newer(own: bytes, fresh: bytes, authority: bytes) -> RevocationList:
    """A list that came: signed by the CA, and with no lower number than the one that is kept. Raises PeerError `ca.list`."""
    try:
        found = parse_revocation_list(fresh)
        found.verify_issued_by(parse_certificates(authority)[0])
        kept = parse_revocation_list(own).number if own else None
    except (CertificateMalformed, LinkBroken) as error:
        raise PeerError("ca.list", f"the revocation list does not fit: {error}") from None
    if found.number is None or (kept is not None and found.number < kept):
        raise PeerError("ca.list", f"the revocation list has number {found.number}, after {kept}")
    return found


def _anchor(one: TrustedAuthority) -> _Anchor:
    certificate = _parse(one.certificate.encode())
    if not certificate.is_authority:
        raise PeerError("ca.malformed", f"{certificate.name} is trusted as a CA, and is none")
    try:
        revocations = parse_revocation_list(one.revocations.encode()) if one.revocations else None
    except CertificateMalformed as error:
        raise PeerError("ca.list", f"the revocation list of {certificate.name}: {error}") from None
    return _Anchor(certificate, revocations)


def _parse(data: bytes) -> Certificate:
    try:
        (certificate,) = parse_certificates(data)
    except (CertificateMalformed, ValueError) as error:
        raise PeerError("ca.malformed", f"what the peer shows is no certificate: {error}") from None
    return certificate


def _claims(shown: Certificate) -> Claims:
    content = shown.extension(CLAIMS)
    if content is None or len(content) > CLAIMS_BYTES_MAX:
        raise PeerError("ca.malformed", "the host certificate does not say what the CA found")
    try:
        value: Any = json.loads(content)
        return Claims.model_validate(value)
    except (ValueError, RecursionError, ValidationError):
        raise PeerError("ca.malformed", "what the CA found cannot be read") from None


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
