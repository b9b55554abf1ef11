"""One TLS 1.3 connection without I/O: mutual, certificates pinned by fingerprint, the group read back (RFC 8446).

Bytes from the wire go in with `receive`, bytes for the wire come out with `bytes_to_send`. What OpenSSL thinks of the
peer's certificate chain is not asked: certificates are self-signed, and who the peer is follows from `peer_fingerprint`,
which the caller must check before it trusts a word. OpenSSL does check that the peer holds the certificate's key.
"""

import contextlib
from datetime import datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from OpenSSL import SSL

from sealane.crypto.identity import Identity, fingerprint, load_key
from sealane.errors import InternalError, PeerError

Side = Literal["client", "server"]

# What OpenSSL offers first by default; read back after every handshake, so that no claim rests on this line.
PREFERRED_GROUP: Final = "X25519MLKEM768"
_CIPHERS: Final = b"TLS_AES_256_GCM_SHA384"
_READ_BYTES: Final = 64 * 1024
# Certificates that a peer may show behind its own: one, and another while a fleet changes its CA.
VOUCHING_MAX: Final = 2
# Not "wrong version number": that is what OpenSSL says of bytes that are no TLS at all.
_VERSION_REASONS: Final = ("unsupported protocol", "protocol version", "version too low")


class TlsConnection:
    """One end of a channel. Every method that takes bytes raises PeerError `peer.tls` or `peer.tls-version`."""

    def __init__(self, identity: Identity, side: Side, *, vouching: bytes = b"") -> None:
        """`vouching` is a certificate (PEM) over the same key by somebody else, shown behind the identity's own."""
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_tls13_ciphersuites(_CIPHERS)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_options(SSL.OP_NO_TICKET)
        context.use_certificate(x509.load_pem_x509_certificate(identity.certificate_pem))
        context.use_privatekey(load_key(identity.key_pem))
        if vouching:
            context.add_extra_chain_cert(x509.load_pem_x509_certificate(vouching))
        # The callback accepts any chain: see the module's first paragraph.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
        self._connection = SSL.Connection(context, None)
        if side == "client":
            self._connection.set_connect_state()
        else:
            self._connection.set_accept_state()
        self.established = False
        self.closed_by_peer = False

    def start(self) -> None:
        """Let the client write its first message."""
        self._handshake()

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the wire, return the plaintext that they complete (empty during the handshake)."""
        if not data:
            return b""
        self._connection.bio_write(data)
        if not self.established:
            self._handshake()
            if not self.established:
                return b""
        return self._read()

    def send(self, plaintext: bytes) -> None:
        """Queue plaintext; take the wire's bytes with `bytes_to_send`. Raises `peer.tls` on a connection that has failed."""
        if not self.established:
            raise InternalError("internal.error", "plaintext before the handshake's end")
        try:
            self._connection.sendall(plaintext)
        except SSL.Error as error:
            raise _tls_error(error) from error

    def close(self) -> None:
        """Queue the authenticated end (close_notify); nothing on a connection that has failed."""
        if self.established:
            with contextlib.suppress(SSL.Error):
                self._connection.shutdown()

    def bytes_to_send(self) -> bytes:
        """Everything that waits for the wire."""
        parts = []
        while True:
            try:
                parts.append(self._connection.bio_read(_READ_BYTES))
            except SSL.WantReadError:
                return b"".join(parts)

    def export(self, label: bytes, context: bytes, length: int) -> bytes:
        """Keying material of this connection (RFC 8446, section 7.5)."""
        if not self.established:
            raise InternalError("internal.error", "exporter before the handshake's end")
        return self._connection.export_keying_material(label, length, context)

    @property
    def peer_fingerprint(self) -> str:
        """The fingerprint of the certificate whose key the peer has proved to hold."""
        return fingerprint(self._peer_certificate().public_bytes(serialization.Encoding.DER))

    @property
    def peer_public_key(self) -> bytes:
        """The key of that certificate, as SubjectPublicKeyInfo (DER)."""
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return self._peer_certificate().public_key().public_bytes(*form)

    @property
    def peer_vouching(self) -> list[bytes]:
        """What else the peer showed behind its own certificate (DER); nothing of it is proved but that it was shown."""
        try:
            shown = self._connection.get_peer_cert_chain(as_cryptography=True) or []
        except ValueError:
            raise PeerError("ca.malformed", "what the peer shows is no certificate") from None
        own = self.peer_certificate
        others = [one.public_bytes(serialization.Encoding.DER) for one in shown]
        return [der for der in others if der != own][:VOUCHING_MAX]

    @property
    def peer_certificate(self) -> bytes:
        """The peer's own certificate (DER)."""
        return self._peer_certificate().public_bytes(serialization.Encoding.DER)

    def check_peer_validity(self, now: datetime) -> None:
        """Raise `peer.expired`, `peer.not-yet-valid`, or `peer.tls` for a key that is not Ed25519 (RFC 5280, 4.1.2.5)."""
        certificate = self._peer_certificate()
        if now > certificate.not_valid_after_utc:
            raise PeerError(
                "peer.expired", f"the peer's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
            )
        if now < certificate.not_valid_before_utc:
            raise PeerError(
                "peer.not-yet-valid",
                f"the peer's certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}",
            )
        if not isinstance(certificate.public_key(), Ed25519PublicKey):
            raise PeerError("peer.tls", "the peer's certificate has no Ed25519 key")

    @property
    def version(self) -> str:
        """`TLSv1.3`."""
        return self._connection.get_protocol_version_name()

    @property
    def group(self) -> str:
        """The group that was negotiated, as OpenSSL names it."""
        return self._connection.get_group_name() or "unknown"

    @property
    def cipher(self) -> str:
        """The TLS cipher suite of the channel (lanes have a cipher of their own)."""
        return self._connection.get_cipher_name() or "unknown"

    def _peer_certificate(self) -> x509.Certificate:
        certificate = self._connection.get_peer_certificate(as_cryptography=True) if self.established else None
        if certificate is None:
            raise PeerError("peer.tls", "the peer showed no certificate")
        return certificate

    def _handshake(self) -> None:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            raise _tls_error(error) from error
        self.established = True

    def _read(self) -> bytes:
        parts = []
        while True:
            try:
                parts.append(self._connection.recv(_READ_BYTES))
            except SSL.WantReadError:
                return b"".join(parts)
            except SSL.ZeroReturnError:
                self.closed_by_peer = True
                return b"".join(parts)
            except SSL.Error as error:
                raise _tls_error(error) from error


def _tls_error(error: SSL.Error) -> PeerError:
    reasons = [entry[-1] for entry in error.args[0]] if error.args and isinstance(error.args[0], list) else [str(error)]
    words = ", ".join(reason for reason in reasons if reason) or "no reason given"
    if any(known in words.lower() for known in _VERSION_REASONS):
        return PeerError("peer.tls-version", f"the peer does not speak TLS 1.3 ({words})")
    return PeerError("peer.tls", f"TLS failed ({words})")


def library_version() -> str:
    """The OpenSSL that is linked in."""
    return SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()


def offered_group(identity: Identity) -> str:
    """The group that two ends with this library negotiate: a handshake with ourselves, for `doctor`."""
    client, server = TlsConnection(identity, "client"), TlsConnection(identity, "server")
    client.start()
    for _ in range(4):
        server.receive(client.bytes_to_send())
        client.receive(server.bytes_to_send())
    return client.group
