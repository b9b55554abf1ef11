"""Two ends of a channel in memory, and peers that do not behave."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from OpenSSL import SSL

from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import Identity, create_identity, load_key
from sealane.crypto.tls import Side, TlsConnection
from sealane.errors import PeerError
from sealane.session.channel import Channel, Event, FrameKind, Hello, Role, encode_frame

NOW: Final = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)
MIGRATION: Final = "0123456789abcdef" * 2
SOURCE: Final = create_identity("source", now=NOW)
DESTINATION: Final = create_identity("destination", now=NOW)
STRANGER: Final = create_identity("stranger", now=NOW)
DAY: Final = timedelta(days=1)


def channel(role: Role, **changes: Any) -> Channel:
    """One end with the usual facts, some of them changed."""
    own, peer = (SOURCE, DESTINATION) if role == "source" else (DESTINATION, SOURCE)
    identity = changes.pop("identity", own)
    facts = {
        "migration": MIGRATION,
        "trusted": {peer.fingerprint: peer.name},
        "protection": "sealed",
        "cipher": CIPHER_NAME,
        "now": NOW,
    }
    return Channel(identity, role=role, **{**facts, **changes})


@dataclass
class End:
    """One end and what it said so far."""

    channel: Channel
    events: list[Event] = field(default_factory=list)
    error: PeerError | None = None

    def take(self, data: bytes, sizes: Sequence[int] = ()) -> None:
        """Bytes from the wire; an end that failed hears no more. It says why, as the enclave does."""
        step = sizes[0] if sizes else len(data) or 1
        for at in range(0, len(data), step):
            if self.error is not None:
                return
            try:
                self.events += self.channel.receive(data[at : at + step])
            except PeerError as error:
                self.error = error
                with contextlib.suppress(PeerError):
                    self.channel.refuse(error)

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
        self.end = End(against)
        self.heard = b""
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
    facts = asdict(Hello(1, role, MIGRATION, own.fingerprint, peer.fingerprint, "sealed", CIPHER_NAME))
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
