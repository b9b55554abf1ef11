"""The channel between two enclaves, without I/O: TLS 1.3, frames inside it, the hellos, and the migration's secret.

A frame is `length u32 | kind u8 | payload`, length counting kind and payload. Kinds:

    HELLO    first frame of either side: JSON, checked field by field against what this side expects
    REFUSE   instead of a hello, or at any time after it: JSON {"code", "detail"}; the migration ends for that reason
    MESSAGE  between the agents; opaque here
    BYE      everything is said

Order: the TLS handshake, then one HELLO from each side, then MESSAGEs in either direction. The peer's certificate is
judged after TLS and before its HELLO is read. A side that does not accept says so by REFUSE.

    migration secret = TLS-Exporter("EXPORTER-sealane-lanes", SHA-256(source hello || destination hello), 32)

The hellos name both certificates, the migration, the protection and the versions, so lanes open only where both ends
saw the same ones.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

from sealane.crypto.identity import Identity
from sealane.crypto.tls import TlsConnection
from sealane.errors import CATALOGUE, InternalError, PeerError, SealaneError, make_error
from sealane.limits import CHANNEL_MESSAGE_MAX
from sealane.session.preface import PROTOCOL_VERSION

_FRAME: Final = struct.Struct(">IB")
_LABEL: Final = b"EXPORTER-sealane-lanes"
_SECRET_BYTES: Final = 32

Role: TypeAlias = Literal["source", "destination"]


class FrameKind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    REFUSE = 2
    MESSAGE = 3
    BYE = 4


@dataclass(frozen=True)
class Hello:
    """What each side says of itself and expects of the other; all of it goes into the migration's secret."""

    protocol: int
    role: Role
    migration: str
    own_fingerprint: str
    peer_fingerprint: str
    protection: str
    cipher: str

    def encode(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Established:
    """Both sides accepted each other; the lanes' secret can be taken with `Channel.migration_secret`."""

    peer_name: str
    peer_fingerprint: str
    tls_version: str
    group: str
    cipher: str


@dataclass(frozen=True)
class MessageReceived:
    """A message from the peer's agent."""

    payload: bytes

    def __repr__(self) -> str:
        return f"MessageReceived({len(self.payload)} bytes)"


@dataclass(frozen=True)
class PeerRefused:
    """The peer ends the migration, for this reason."""

    error: SealaneError


@dataclass(frozen=True)
class PeerSaidBye:
    """The peer has nothing more to say."""


Event: TypeAlias = Established | MessageReceived | PeerRefused | PeerSaidBye


class FrameReader:
    """Cuts a byte stream into frames; memory bounded by CHANNEL_MESSAGE_MAX and one chunk."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[tuple[FrameKind, bytes]]:
        """All frames that `data` completes; raises PeerError `peer.message`."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _FRAME.size:
            length, kind = _FRAME.unpack_from(self._buffer)
            if not 1 <= length <= CHANNEL_MESSAGE_MAX + 1 or kind not in iter(FrameKind):
                raise PeerError("peer.message", f"a frame of kind {kind} and {length} bytes does not fit")
            end = _FRAME.size + length - 1
            if len(self._buffer) < end:
                break
            frames.append((FrameKind(kind), bytes(self._buffer[_FRAME.size : end])))
            del self._buffer[:end]
        return frames


def encode_frame(kind: FrameKind, payload: bytes) -> bytes:
    """One frame; raises InternalError where the payload is beyond CHANNEL_MESSAGE_MAX."""
    if len(payload) > CHANNEL_MESSAGE_MAX:
        raise InternalError("internal.error", f"a channel message of {len(payload)} bytes")
    return _FRAME.pack(len(payload) + 1, kind) + payload


class Channel:
    """One end of the channel: bytes in, events and bytes out, or one PeerError that ends it."""

    def __init__(
        self,
        identity: Identity,
        *,
        role: Role,
        migration: str,
        trusted: Mapping[str, str],
        protection: str,
        cipher: str,
        now: datetime,
    ) -> None:
        """`trusted` maps fingerprints to names: the destination's alone at a source, all that are known at a destination."""
        self._tls = TlsConnection(identity, "client" if role == "source" else "server")
        self._identity, self._role, self._migration = identity, role, migration
        self._trusted, self._protection, self._cipher, self._now = trusted, protection, cipher, now
        self._frames = FrameReader()
        self._own_hello: bytes | None = None
        self._peer_hello: bytes | None = None
        if role == "source":
            self._tls.start()

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the wire; raises PeerError. Send `bytes_to_send()` afterwards, also after an error."""
        plaintext = self._tls.receive(data)
        if self._tls.established and self._own_hello is None:
            self._judge_and_greet()
        return [event for kind, payload in self._frames.receive(plaintext) for event in self._take(kind, payload)]

    def ended(self) -> None:
        """The connection ended."""
        raise PeerError("peer.closed" if self._tls.established else "peer.tls", "the peer closed the channel")

    def send_message(self, payload: bytes) -> None:
        """Queue a message for the peer's agent."""
        if not self.established:
            raise InternalError("internal.error", "a message before the hellos")
        self._tls.send(encode_frame(FrameKind.MESSAGE, payload))

    def refuse(self, error: SealaneError) -> None:
        """Queue the reason why this side ends the migration; nothing where TLS does not stand yet."""
        if self._tls.established:
            reason = {"code": error.code, "detail": error.detail[:500]}
            self._tls.send(encode_frame(FrameKind.REFUSE, json.dumps(reason).encode()))

    def say_bye(self) -> None:
        """Queue the orderly end."""
        self._tls.send(encode_frame(FrameKind.BYE, b""))
        self._tls.close()

    def bytes_to_send(self) -> bytes:
        """Everything that waits for the wire."""
        return self._tls.bytes_to_send()

    @property
    def established(self) -> bool:
        """Whether both hellos fit."""
        return self._peer_hello is not None

    def migration_secret(self) -> bytes:
        """The secret of which every lane's keys are made (32 bytes)."""
        if self._own_hello is None or self._peer_hello is None:
            raise InternalError("internal.error", "no secret before the hellos")
        hellos = [self._own_hello, self._peer_hello] if self._role == "source" else [self._peer_hello, self._own_hello]
        return self._tls.export(_LABEL, hashlib.sha256(b"".join(hellos)).digest(), _SECRET_BYTES)

    def _judge_and_greet(self) -> None:
        fingerprint = self._tls.peer_fingerprint
        if fingerprint not in self._trusted:
            raise PeerError("peer.unknown", f"{fingerprint} is not trusted")
        self._tls.check_peer_validity(self._now)
        self._own_hello = self._hello(self._role, self._identity.fingerprint, fingerprint).encode()
        self._tls.send(encode_frame(FrameKind.HELLO, self._own_hello))

    def _hello(self, role: Role, own: str, peer: str) -> Hello:
        return Hello(PROTOCOL_VERSION, role, self._migration, own, peer, self._protection, self._cipher)

    def _take(self, kind: FrameKind, payload: bytes) -> list[Event]:
        if kind is FrameKind.REFUSE:
            return [PeerRefused(_parse_refusal(payload))]
        if kind is FrameKind.HELLO and not self.established:
            return [self._check_hello(payload)]
        if kind is FrameKind.MESSAGE and self.established:
            return [MessageReceived(payload)]
        if kind is FrameKind.BYE and self.established and not payload:
            return [PeerSaidBye()]
        raise PeerError("peer.message", f"{kind.name} came out of turn")

    def _check_hello(self, payload: bytes) -> Established:
        fingerprint = self._tls.peer_fingerprint
        peer_role: Role = "destination" if self._role == "source" else "source"
        expected = self._hello(peer_role, fingerprint, self._identity.fingerprint)
        if payload != expected.encode():
            raise _why_hello_differs(payload, asdict(expected))
        self._peer_hello = payload
        return Established(
            self._trusted[fingerprint], fingerprint, self._tls.version, self._tls.group, self._tls.cipher
        )


def _why_hello_differs(payload: bytes, expected: dict[str, Any]) -> PeerError:
    said = _parse_object(payload)
    if said.get("protocol") != expected["protocol"]:
        return PeerError("peer.version", f"the peer speaks version {str(said.get('protocol'))[:20]}")
    different = [name for name, value in expected.items() if said.get(name) != value]
    return PeerError("peer.message", f"the peer's hello differs in: {', '.join(different) or 'its encoding'}")


def _parse_refusal(payload: bytes) -> SealaneError:
    said = _parse_object(payload)
    code, detail = said.get("code"), said.get("detail")
    if not isinstance(code, str) or not isinstance(detail, str) or code not in CATALOGUE:
        raise PeerError("peer.message", "a refusal without a known code")
    printable = "".join(character if character.isprintable() else "?" for character in detail[:500])
    return make_error(code, f"the peer says: {printable}")


def _parse_object(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise PeerError("peer.message", "a message that is not JSON") from None
    if not isinstance(value, dict):
        raise PeerError("peer.message", "a message that is not an object")
    return value
