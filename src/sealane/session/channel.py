"""The channel between two enclaves, without I/O: TLS 1.3, frames inside it, the hellos, and the migration's secret.

A frame is `length u32 | kind u8 | payload`, length counting kind and payload. Kinds:

    HELLO    first frame of either side: JSON, checked field by field against what this side expects
    REFUSE   instead of a hello, or at any time after it: JSON {"code", "detail"}; the migration ends for that reason
    MESSAGE  between the agents; opaque here
    BYE      everything is said
    ATTEST   a piece of the attested handshake (`exchange`, `attestation`)

Order: the TLS handshake, then one HELLO from each side, then ATTEST until both ends are attested, then MESSAGEs in either
direction, and ATTEST again where a long copy attests anew. The peer's certificate is judged after TLS and before its HELLO
is read. A side that does not accept says so by REFUSE.

    context          = SHA-256(source's hello || destination's hello)
    exporter         = TLS-Exporter("EXPORTER-sealane-attestation", context, 32)      what evidence is bound to
    migration secret = HKDF-Expand(HKDF-Extract(exporter, both seeds), "sealane v1 migration" || T5, 32), T5: `attestation`

The hellos name both certificates, the migration, the protection and the versions, so lanes open only where both ends
saw the same ones, and each accepted the other's evidence.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

from sealane.crypto.identity import Identity
from sealane.crypto.tls import TlsConnection
from sealane.errors import CATALOGUE, ControlError, InternalError, PeerError, SealaneError, make_error, printable
from sealane.limits import CHANNEL_MESSAGE_MAX
from sealane.session.attestation import (
    Action,
    Attestation,
    Attested,
    Conversation,
    Judge,
    Known,
    Random,
    Send,
    Subject,
    WantEvidence,
)
from sealane.session.exchange import AttestReader, End
from sealane.session.preface import PROTOCOL_VERSION
from sealane.session.vouching import NO_VOUCHERS, Notary, Vouched, Vouchers

_FRAME: Final = struct.Struct(">IB")
_LABEL: Final = b"EXPORTER-sealane-attestation"
_EXPORTED_BYTES: Final = 32

Role: TypeAlias = Literal["source", "destination"]


class FrameKind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    REFUSE = 2
    MESSAGE = 3
    BYE = 4
    ATTEST = 5


@dataclass(frozen=True)
class Hello:
    """What each side says of itself and expects of the other; all of it goes into the migration's secret.

    `protection` is the source's choice, and at a destination what it allows: names in order, a space between them.
    """

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
    """Both sides accepted each other; the lanes' secret can be taken with `Channel.migration_secret`.

    `attested` has the verdict on the peer, and which VM and epoch both ends spoke of; `vouched` what a CA says of it, where the
    peer is trusted by that alone.
    """

    peer_name: str
    peer_fingerprint: str
    tls_version: str
    group: str
    cipher: str
    attested: Attested
    vouched: Vouched | None = None


@dataclass(frozen=True)
class Met:
    """A peer whose certificate is trusted and whose hello fits, attested or not."""

    peer_name: str
    peer_fingerprint: str
    tls_version: str
    group: str
    cipher: str
    known: Known
    vouched: Vouched | None = None


@dataclass(frozen=True)
class EvidenceWanted:
    """Have this quoted for this VM, and give the pieces to `Channel.evidence_made`."""

    report_data: bytes
    vm: str


@dataclass(frozen=True)
class Reattested:
    """A later round is over; the peer is still what it was."""

    attested: Attested


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


Event: TypeAlias = Established | EvidenceWanted | Reattested | MessageReceived | PeerRefused | PeerSaidBye


@dataclass(frozen=True)
class Attestor:
    """What the attested handshake needs of this end. `subject` is what is migrated; None at a destination, which hears it.

    `make_judge` gets the peer's name and the SHA-256 of its public key, and gives who appraises its evidence. `vouchers` are the
    CAs whose word is enough for a peer that is not trusted by itself, `host_certificate` what a CA has issued for this host.
    """

    subject: Subject | None
    make_judge: Callable[[str, str], Judge]
    random: Random = os.urandom
    vouchers: Vouchers = NO_VOUCHERS
    host_certificate: bytes = b""


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
        attestor: Attestor,
    ) -> None:
        """`trusted` maps fingerprints to names: the destination's alone at a source, all that are known at a destination.

        `protection` is the one that a source wants; at a destination all that it allows, as `Hello` has them.
        """
        self._tls = TlsConnection(
            identity, "client" if role == "source" else "server", vouching=attestor.host_certificate
        )
        self._notary = Notary(attestor.vouchers)
        self._peer_name = ""
        self._vouched: Vouched | None = None
        self._identity, self._role, self._migration = identity, role, migration
        self._trusted, self._protection, self._cipher, self._now = trusted, protection, cipher, now
        self._frames = FrameReader()
        self._own_hello: bytes | None = None
        self._peer_hello: bytes | None = None
        self._attestor = attestor
        self._attested_enough = False
        self._attestation: Attestation | None = None
        self._messages = AttestReader()
        self.protection = ""  # of this migration, once the hellos fit
        if role == "source":
            self._tls.start()

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the wire; raises PeerError, ControlError. Send `bytes_to_send()` afterwards, also after an error."""
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
            raise InternalError("internal.error", "a message before both ends are attested")
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

    def evidence_made(self, pieces: Mapping[str, bytes]) -> list[Event]:
        """What EvidenceWanted asked for; send `bytes_to_send()` afterwards."""
        return [] if self._attested_enough else self._act(self._need_attestation().evidence_made(pieces))

    def attest_again(self) -> list[Event]:
        """Begin another round (source only); nothing while one is under way, or after `attest_no_more`."""
        attestation = self._need_attestation()
        return [] if attestation.busy or self._attested_enough else self._act(attestation.again())

    def attest_no_more(self) -> None:
        """The VM is about to be handed over: a round that is under way counts no more, and none begins."""
        self._attested_enough = self.established

    @property
    def established(self) -> bool:
        """Whether both hellos fit and both ends accepted the other's evidence."""
        return self._attestation is not None and self._attestation.attested

    @property
    def met(self) -> "Met | None":
        """Who is there by its certificate, and what its evidence said so far; None before both hellos fit."""
        if self._attestation is None:
            return None
        tls, fingerprint = self._tls, self._tls.peer_fingerprint
        facts = (tls.version, tls.group, tls.cipher)
        return Met(self._peer_name, fingerprint, *facts, self._attestation.known, self._vouched)

    def migration_secret(self) -> bytes:
        """The secret of which every lane's keys are made (32 bytes)."""
        if self._attestation is None or self._attestation.first is None:
            raise InternalError("internal.error", "no secret before both ends are attested")
        return self._attestation.first.secret

    def _judge_and_greet(self) -> None:
        fingerprint = self._tls.peer_fingerprint
        if fingerprint not in self._trusted and not self._notary.is_there:
            raise PeerError("peer.unknown", f"{fingerprint} is not trusted")
        self._tls.check_peer_validity(self._now)
        self._peer_name = self._trusted.get(fingerprint) or self._vouch()
        self._own_hello = self._hello(self._role, self._identity.fingerprint, fingerprint, self._protection).encode()
        self._tls.send(encode_frame(FrameKind.HELLO, self._own_hello))

    def _vouch(self) -> str:
        """The name under which a CA vouches for the peer."""
        self._vouched = self._notary.judge(
            self._tls.peer_certificate,
            self._tls.peer_vouching,
            peer_key=self._tls.peer_public_key,
            taken=self._trusted.values(),
            now=self._now,
        )
        return self._vouched.name

    def _hello(self, role: Role, own: str, peer: str, protection: str) -> Hello:
        return Hello(PROTOCOL_VERSION, role, self._migration, own, peer, protection, self._cipher)

    def _agree(self, said: str) -> str:
        """The migration's protection, which the destination must allow; raises `check.protection`."""
        wanted, allowed = (self._protection, said) if self._role == "source" else (said, self._protection)
        if wanted not in allowed.split():
            detail = f"the source wants {printable(wanted, 20)}, the destination allows {printable(allowed, 100)}"
            raise ControlError("check.protection", detail)
        return wanted

    def _take(self, kind: FrameKind, payload: bytes) -> list[Event]:
        if kind is FrameKind.REFUSE:
            return [PeerRefused(_parse_refusal(payload))]
        if kind is FrameKind.HELLO and self._peer_hello is None:
            return self._check_hello(payload)
        if kind is FrameKind.ATTEST and self._attestation is not None:
            return (
                []
                if self._attested_enough
                else [
                    event
                    for message in self._messages.receive(payload)
                    for event in self._act(self._attestation.receive(message))
                ]
            )
        if kind is FrameKind.MESSAGE and self.established:
            return [MessageReceived(payload)]
        if kind is FrameKind.BYE and self.established and not payload:
            return [PeerSaidBye()]
        raise PeerError("peer.message", f"{kind.name} came out of turn")

    def _check_hello(self, payload: bytes) -> list[Event]:
        fingerprint = self._tls.peer_fingerprint
        peer_role: Role = "destination" if self._role == "source" else "source"
        protection = _protection_said(payload)
        expected = self._hello(peer_role, fingerprint, self._identity.fingerprint, protection)
        if payload != expected.encode():
            raise _why_hello_differs(payload, asdict(expected))
        self.protection = self._agree(protection)
        self._peer_hello = payload
        self._attestation = self._prepare_attestation(fingerprint)
        return self._act(self._attestation.start())

    def _prepare_attestation(self, fingerprint: str) -> Attestation:
        role, peer_key = End(self._role), self._tls.peer_public_key
        hellos = [self._own_hello or b"", self._peer_hello or b""]
        context = hashlib.sha256(b"".join(hellos if role is End.SOURCE else hellos[::-1])).digest()
        conversation = Conversation(
            bytes.fromhex(self._migration),
            own_certificate=_digest_of(self._identity.fingerprint),
            peer_certificate=_digest_of(fingerprint),
            exporter=self._tls.export(_LABEL, context, _EXPORTED_BYTES),
            key_pem=self._identity.key_pem,
            peer_key=peer_key,
        )
        judge = self._attestor.make_judge(self._peer_name, hashlib.sha256(peer_key).hexdigest())
        return Attestation(role, conversation, self._attestor.subject, judge, self._attestor.random)

    def _act(self, actions: Sequence[Action]) -> list[Event]:
        events: list[Event] = []
        for action in actions:
            match action:
                case Send(data):
                    for at in range(0, len(data), CHANNEL_MESSAGE_MAX):
                        self._tls.send(encode_frame(FrameKind.ATTEST, data[at : at + CHANNEL_MESSAGE_MAX]))
                case WantEvidence():
                    events.append(EvidenceWanted(action.report_data, action.vm))
                case Attested():
                    events.append(self._established(action) if action.round == 0 else Reattested(action))
        return events

    def _established(self, attested: Attested) -> Established:
        fingerprint = self._tls.peer_fingerprint
        facts = (self._tls.version, self._tls.group, self._tls.cipher)
        return Established(self._peer_name, fingerprint, *facts, attested, self._vouched)

    def _need_attestation(self) -> Attestation:
        if self._attestation is None:
            raise InternalError("internal.error", "no attestation before the hellos")
        return self._attestation


def _digest_of(fingerprint: str) -> bytes:
    return bytes.fromhex(fingerprint.removeprefix("SHA256:"))


def _protection_said(payload: bytes) -> str:
    """What the peer's hello says of protections; nothing where it is not a text."""
    try:
        said = _parse_object(payload).get("protection")
    except PeerError:
        return ""
    return said if isinstance(said, str) else ""


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
    return make_error(code, f"the peer says: {printable(detail)}")


def _parse_object(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise PeerError("peer.message", "a message that is not JSON") from None
    if not isinstance(value, dict):
        raise PeerError("peer.message", "a message that is not an object")
    return value
