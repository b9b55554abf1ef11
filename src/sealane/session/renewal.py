"""Between a host and its CA, without I/O: the host shows what it is, the CA's host grants a certificate for a short time.

Both speak TLS 1.3 with their identities; the CA's host knows whom it has enrolled, and the host whose CA it has joined. A
frame inside TLS is `length u32 | kind u8 | payload`, length counting kind and payload.

    host                                    CA's host
    ASK  want, port   ------------------->
                      <-------------------  CHALLENGE  nonce 32         where a certificate is wanted
    EVIDENCE  bundle  ------------------->
                      <-------------------  GRANT  certificate, revocation list, hosts       or REFUSE, at any time

    REPORTDATA = SHA-256("sealane v1 renewal" || nonce || exporter || certificate of the host || certificate of the CA's host)

The exporter is TLS's, with the nonce as its context, and certificates are SHA-256 over DER: evidence of one renewal serves
no other, and no migration.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealane.attest.bundle import encode_bundle, parse_bundle
from sealane.crypto.identity import Identity
from sealane.crypto.tls import TlsConnection
from sealane.errors import CATALOGUE, EvidenceError, PeerError, SealaneError, make_error, printable
from sealane.limits import EVIDENCE_MAX

_FRAME: Final = struct.Struct(">IB")
_LABEL: Final = b"sealane v1 renewal"
_EXPORTER: Final = b"EXPORTER-sealane-renewal"
_NONCE_BYTES: Final = 32
# Certificate, list and directory: a host takes some 3 KiB with its reference values.
GRANT_BYTES_MAX: Final = EVIDENCE_MAX


class FrameKind(IntEnum):
    """What a frame carries."""

    ASK = 1
    CHALLENGE = 2
    EVIDENCE = 3
    GRANT = 4
    REFUSE = 5


_LENGTHS: Final = {
    FrameKind.ASK: 1024,
    FrameKind.CHALLENGE: _NONCE_BYTES,
    FrameKind.EVIDENCE: EVIDENCE_MAX + 4096,
    FrameKind.GRANT: GRANT_BYTES_MAX,
    FrameKind.REFUSE: 1024,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Ask(_Strict):
    """What a host wants: a certificate, or only what is new. `port` is where its agent listens."""

    want: Literal["certificate", "news"]
    port: Annotated[int, Field(ge=1, le=65535)]


class HostEntry(_Strict):
    """A host of the fleet as its CA knows it; `reference` are the reference values that were taken when it joined (JSON), and
    `hardware_keys` the attestation keys that the CA has seen to be a hardware TPM's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    fingerprint: Annotated[str, Field(pattern=r"^SHA256:[0-9a-f]{64}$")]
    address: Annotated[str, Field(max_length=255)] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    reference: str = ""
    hardware_keys: list[str] = []


class Grant(_Strict):
    """What the CA gives: a host certificate (PEM; empty where only news were asked for), its list, and the fleet's hosts."""

    certificate: str = ""
    revocations: str
    hosts: list[HostEntry] = []


@dataclass(frozen=True)
class Asked:
    """CA: a host that was enrolled asks. `accept` it (`challenge`, `grant`) or `refuse` it."""

    ask: Ask
    fingerprint: str


@dataclass(frozen=True)
class Shown:
    """CA: the evidence that was asked for, to be appraised for these user data and this key (SubjectPublicKeyInfo)."""

    pieces: dict[str, bytes] = field(repr=False)
    user_data: bytes
    public_key: bytes


@dataclass(frozen=True)
class EvidenceWanted:
    """Host: have these user data quoted, and give the pieces to `evidence_made`."""

    user_data: bytes


@dataclass(frozen=True)
class Granted:
    """Host: what the CA gives. The caller checks certificate and list before it keeps them."""

    grant: Grant


Event: TypeAlias = Asked | Shown | EvidenceWanted | Granted


class Renewal:
    """One end of one renewal: bytes in, events and bytes out, or one SealaneError that ends it."""

    def __init__(
        self,
        identity: Identity,
        *,
        peers: frozenset[str],
        now: datetime,
        ask: Ask | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """A host gives its `ask` and the one fingerprint of its CA's host; that one gives all that are enrolled."""
        self._identity, self._peers, self._now, self._ask, self._random = identity, peers, now, ask, random
        self._tls = TlsConnection(identity, "server" if ask is None else "client")
        self._buffer = bytearray()
        self._greeted = False
        self._nonce = b""
        self._awaited = FrameKind.ASK if ask is None else FrameKind.CHALLENGE
        if ask is not None:
            self._tls.start()

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the wire; raises SealaneError. Send `bytes_to_send()` afterwards, also after an error."""
        self._buffer += self._tls.receive(data)
        if self._tls.established and not self._greeted:
            self._greeted = True
            self._judge_peer()
        return self._frames()

    def bytes_to_send(self) -> bytes:
        """Everything that waits for the wire."""
        return self._tls.bytes_to_send()

    def challenge(self) -> None:
        """CA: ask for evidence."""
        self._nonce = self._random(_NONCE_BYTES)
        self._send(FrameKind.CHALLENGE, self._nonce)
        self._awaited = FrameKind.EVIDENCE

    def grant(self, grant: Grant) -> None:
        """CA: give it. Raises InternalError where it is too large."""
        self._send(FrameKind.GRANT, grant.model_dump_json().encode())
        self._tls.close()

    def refuse(self, error: SealaneError) -> None:
        """Tell the other end why; nothing where TLS does not stand yet."""
        if self._tls.established:
            reason = {"code": error.code, "detail": error.detail[:500]}
            self._send(FrameKind.REFUSE, json.dumps(reason).encode()[: _LENGTHS[FrameKind.REFUSE]])

    def evidence_made(self, pieces: Mapping[str, bytes]) -> None:
        """Host: what EvidenceWanted asked for."""
        self._send(FrameKind.EVIDENCE, encode_bundle(pieces))
        self._awaited = FrameKind.GRANT

    def _judge_peer(self) -> None:
        if self._tls.peer_fingerprint not in self._peers:
            if self._ask is None:
                raise PeerError("ca.not-enrolled", f"{self._tls.peer_fingerprint} is not enrolled")
            raise PeerError("peer.unknown", "another host answers at the address of the CA's")
        self._tls.check_peer_validity(self._now)
        if self._ask is not None:
            self._send(FrameKind.ASK, self._ask.model_dump_json().encode())
            if self._ask.want == "news":
                self._awaited = FrameKind.GRANT

    def _frames(self) -> list[Event]:
        events: list[Event] = []
        while len(self._buffer) >= _FRAME.size:
            length, number = _FRAME.unpack_from(self._buffer)
            if number not in (self._awaited, FrameKind.REFUSE):
                raise PeerError("peer.message", "something came out of turn")
            kind = FrameKind(number)
            if not 1 <= length <= _LENGTHS[kind] + 1:
                raise PeerError("peer.message", f"a {kind.name} of {length} bytes")
            end = _FRAME.size + length - 1
            if len(self._buffer) < end:
                break
            payload = bytes(self._buffer[_FRAME.size : end])
            del self._buffer[:end]
            events.append(self._take(kind, payload))
        return events

    def _take(self, kind: FrameKind, payload: bytes) -> Event:
        match kind:
            case FrameKind.ASK:
                self._awaited = FrameKind.REFUSE  # until the caller has decided
                return Asked(_parse(Ask, payload), self._tls.peer_fingerprint)
            case FrameKind.CHALLENGE:
                if len(payload) != _NONCE_BYTES:
                    raise PeerError("peer.message", "a nonce of another length")
                self._nonce, self._awaited = payload, FrameKind.REFUSE  # until the evidence is made
                return EvidenceWanted(self._user_data(self._identity.fingerprint, self._tls.peer_fingerprint))
            case FrameKind.EVIDENCE:
                self._awaited = FrameKind.REFUSE
                try:
                    pieces = parse_bundle(payload)
                except EvidenceError as error:
                    raise PeerError("peer.message", error.detail) from None
                user_data = self._user_data(self._tls.peer_fingerprint, self._identity.fingerprint)
                return Shown(pieces, user_data, self._tls.peer_public_key)
            case FrameKind.GRANT:
                return Granted(_parse(Grant, payload))
            case FrameKind.REFUSE:
                raise _parse_refusal(payload)

    def _user_data(self, host: str, authority: str) -> bytes:
        exporter = self._tls.export(_EXPORTER, self._nonce, 32)
        digests = [bytes.fromhex(one.removeprefix("SHA256:")) for one in (host, authority)]
        return hashlib.sha256(_LABEL + self._nonce + exporter + b"".join(digests)).digest()

    def _send(self, kind: FrameKind, payload: bytes) -> None:
        if len(payload) > _LENGTHS[kind]:
            raise make_error("internal.error", f"a {kind.name} of {len(payload)} bytes")
        self._tls.send(_FRAME.pack(len(payload) + 1, kind) + payload)


def _parse(model: type[Any], payload: bytes) -> Any:
    try:
        return model.model_validate_json(payload)
    except (ValidationError, ValueError, RecursionError):
        raise PeerError("peer.message", f"a message that does not fit ({model.__name__})") from None


def _parse_refusal(payload: bytes) -> SealaneError:
    try:
        value = json.loads(payload)
        code, detail = value["code"], value["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        code = detail = None
    if not isinstance(code, str) or not isinstance(detail, str) or code not in CATALOGUE:
        return PeerError("peer.message", "a refusal without a known code")
    return make_error(code, f"the CA's host says: {printable(detail)}")
