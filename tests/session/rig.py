"""Two ends of a channel in memory, and peers that do not behave."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from OpenSSL import SSL

from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.platformlog import Measured, encode_line, manifest_digest
from sealane.attest.reference import NO_REFERENCE, Reference
from sealane.attest.software import encode_statement, signed_bytes
from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import Identity, create_identity, load_key, public_key, sign
from sealane.crypto.tls import Side, TlsConnection
from sealane.errors import ControlError, PeerError
from sealane.session.attestation import Attestation, Attested, Conversation, Send, Subject, WantEvidence
from sealane.session.channel import (
    Attestor,
    Channel,
    Event,
    EvidenceWanted,
    FrameKind,
    FrameReader,
    Hello,
    Role,
    encode_frame,
)
from sealane.session.exchange import AttestReader
from sealane.session.exchange import End as Which
from sealane.session.preface import PROTOCOL_VERSION

NOW: Final = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)
MIGRATION: Final = "0123456789abcdef" * 2
SOURCE: Final = create_identity("source", now=NOW)
DESTINATION: Final = create_identity("destination", now=NOW)
STRANGER: Final = create_identity("stranger", now=NOW)
DAY: Final = timedelta(days=1)


SUBJECT: Final = Subject("vm", 3)
CODE: Final = [Measured("enclave", f"{name}.py", "sha256:" + f"{number:02x}" * 32) for number, name in enumerate("abc")]
QEMU: Final = Measured("qemu", "/usr/bin/qemu-system-x86_64", "sha256:" + "11" * 32)


def platform_log(*entries: Measured) -> bytes:
    """A log of one line with its manifest."""
    found = list(entries or (*CODE, QEMU))
    manifest = Measured("enclave-manifest", "-", manifest_digest(found))
    return encode_line([*found, manifest]) + b"\n"


def software_evidence(identity: Identity, user_data: bytes, log: bytes | None = None) -> dict[str, bytes]:
    """What the `software` driver gives."""
    log = platform_log() if log is None else log
    digest = hashlib.sha256(log).digest()
    signature = sign(identity.key_pem, signed_bytes(user_data, digest))
    statement = encode_statement(public_key(identity.key_pem), user_data, digest, signature)
    return {"platform-log": log, "software.statement": statement}


def judge(name: str, key: str, *, reference: Reference = NO_REFERENCE, **wanted: Any) -> PeerJudge:
    """A judge with the clock of these tests."""
    return PeerJudge(name, key, lambda: NOW, Expectations(**wanted), reference)


def channel(role: Role, **changes: Any) -> Channel:
    """One end with the usual facts, some of them changed."""
    own, peer = (SOURCE, DESTINATION) if role == "source" else (DESTINATION, SOURCE)
    identity = changes.pop("identity", own)
    fleet = {name: changes.pop(name) for name in ("vouchers", "host_certificate") if name in changes}
    facts = {
        "migration": MIGRATION,
        "trusted": {peer.fingerprint: peer.name},
        "protection": "sealed",
        "cipher": CIPHER_NAME,
        "now": NOW,
        "attestor": Attestor(SUBJECT if role == "source" else None, judge, **fleet),
    }
    return Channel(identity, role=role, **{**facts, **changes})


@dataclass
class End:
    """One end and what it said so far."""

    channel: Channel
    events: list[Event] = field(default_factory=list)
    error: PeerError | ControlError | None = None
    asked: list[EvidenceWanted] = field(default_factory=list)

    def take(self, data: bytes, sizes: Sequence[int] = ()) -> None:
        """Bytes from the wire; an end that failed hears no more. It says why, as the enclave does."""
        step = sizes[0] if sizes else len(data) or 1
        for at in range(0, len(data), step):
            if self.error is not None:
                return
            try:
                self._hear(self.channel.receive(data[at : at + step]))
            except (PeerError, ControlError) as error:
                self.error = error
                with contextlib.suppress(PeerError):
                    self.channel.refuse(error)

    def _hear(self, events: Sequence[Event]) -> None:
        """Note what happened; what is to be quoted is quoted at once, with the channel's own identity."""
        for event in events:
            if isinstance(event, EvidenceWanted):
                self.asked.append(event)
                identity = self.channel._identity
                self._hear(self.channel.evidence_made(software_evidence(identity, event.report_data)))
            else:
                self.events.append(event)

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None


def converse(source: Channel, destination: Channel, sizes: Sequence[int] = ()) -> tuple[End, End]:
    """Carry bytes both ways until both are silent."""
    ends = End(source), End(destination)
    carry(*ends, sizes)
    return ends


def carry(one: End, other: End, sizes: Sequence[int] = ()) -> None:
    """Carry what waits, both ways, until both are silent."""
    while True:
        there, back = one.channel.bytes_to_send(), other.channel.bytes_to_send()
        if not there and not back:
            return
        other.take(there, sizes)
        one.take(back, sizes)


class Puppet:
    """A peer that finishes TLS with its own key and then says what it is told to say."""

    def __init__(self, against: Channel, side: Side, identity: Identity) -> None:
        self.tls = TlsConnection(identity, side)
        self.identity = identity
        self.end = End(against)
        self.heard = b""
        self.attested: Attested | None = None
        if side == "client":
            self.tls.start()
        self.carry()

    def carry(self) -> None:
        """Carry bytes both ways until both are silent."""
        while True:
            there, back = self.tls.bytes_to_send(), self.end.channel.bytes_to_send()
            if not there and not back:
                return
            self.end.take(there)
            self.heard += self.tls.receive(back)

    def attest(self) -> End:
        """After the hellos: attest as a well-behaved peer does."""
        frames, messages = FrameReader(), AttestReader()
        role = Which.SOURCE if self.identity is SOURCE else Which.DESTINATION
        hellos = hello_of("source").encode() + hello_of("destination").encode()
        peer = DESTINATION if role is Which.SOURCE else SOURCE
        conversation = Conversation(
            bytes.fromhex(MIGRATION),
            own_certificate=bytes.fromhex(self.identity.fingerprint[7:]),
            peer_certificate=bytes.fromhex(peer.fingerprint[7:]),
            exporter=self.tls.export(b"EXPORTER-sealane-attestation", hashlib.sha256(hellos).digest(), 32),
            key_pem=self.identity.key_pem,
            peer_key=self.tls.peer_public_key,
        )
        ours = judge(peer.name, hashlib.sha256(self.tls.peer_public_key).hexdigest())
        machine = Attestation(role, conversation, SUBJECT if role is Which.SOURCE else None, ours, os.urandom)
        actions = machine.start()
        while actions:
            action = actions.pop(0)
            if isinstance(action, WantEvidence):
                actions += machine.evidence_made(software_evidence(self.identity, action.report_data))
            elif isinstance(action, Attested):
                self.attested = action
            elif isinstance(action, Send):
                self.say(FrameKind.ATTEST, action.data)
            for kind, payload in frames.receive(self.heard):
                for message in messages.receive(payload) if kind is FrameKind.ATTEST else []:
                    actions += machine.receive(message)
            self.heard = b""
        return self.end

    def say(self, kind: FrameKind, payload: bytes) -> End:
        """Send one frame; returns the other end."""
        return self.say_raw(encode_frame(kind, payload))

    def say_raw(self, plaintext: bytes) -> End:
        """Send plaintext that need not be a frame."""
        self.tls.send(plaintext)
        self.carry()
        return self.end


def hello_of(role: Role, /, **changes: Any) -> Hello:
    """What a well-behaved peer of that role says, some fields changed."""
    own, peer = (SOURCE, DESTINATION) if role == "source" else (DESTINATION, SOURCE)
    facts = asdict(Hello(PROTOCOL_VERSION, role, MIGRATION, own.fingerprint, peer.fingerprint, "sealed", CIPHER_NAME))
    return Hello(**{**facts, **changes})


def old_peer(side: Side, identity: Identity) -> SSL.Connection:
    """A TLS implementation that has never heard of version 1.3."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate(x509.load_pem_x509_certificate(identity.certificate_pem))
    context.use_privatekey(load_key(identity.key_pem))
    connection = SSL.Connection(context, None)
    if side == "client":
        connection.set_connect_state()
    else:
        connection.set_accept_state()
    return connection
