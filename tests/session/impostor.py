"""A TLS 1.3 server of a hundred lines that may show a certificate whose key it does not have.

No honest library signs with a key that does not fit the certificate, so the server's first flight (RFC 8446, 2) is
written out here: X25519, TLS_AES_256_GCM_SHA384, Ed25519.
"""

import hashlib
import hmac
import struct
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealane.crypto.identity import Identity

_X25519: Final = 0x001D
_ED25519: Final = 0x0807
_HASH_BYTES: Final = 48


def _expand_label(secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """HKDF-Expand-Label (7.1); one block of SHA-384 is enough here."""
    label = b"tls13 " + label
    info = struct.pack(">HB", length, len(label)) + label + bytes([len(context)]) + context
    return hmac.new(secret, info + b"\x01", hashlib.sha384).digest()[:length]


def _message(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def _extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


class _Hello:
    """What of a ClientHello (4.1.2) the server needs."""

    def __init__(self, record: bytes) -> None:
        self.message = record[5 : 5 + int.from_bytes(record[3:5], "big")]
        at = 4 + 2 + 32
        self.session = self.message[at + 1 : at + 1 + self.message[at]]
        at += 1 + len(self.session)
        at += 2 + int.from_bytes(self.message[at : at + 2], "big")
        at += 1 + self.message[at]
        self.share = self._find_share(self.message[at + 2 :])

    @staticmethod
    def _find_share(extensions: bytes) -> bytes:
        while extensions:
            kind, length = struct.unpack_from(">HH", extensions)
            body, extensions = extensions[4 : 4 + length], extensions[4 + length :]
            shares = body[2:] if kind == 0x0033 else b""
            while shares:
                group, size = struct.unpack_from(">HH", shares)
                if group == _X25519:
                    return shares[4 : 4 + size]
                shares = shares[4 + size :]
        raise AssertionError("the client offers no X25519 share")


def first_flight(client_hello: bytes, *, shown: Identity, signing: Identity | None) -> bytes:
    """All that a server says up to its Finished: `shown`'s certificate, `signing`'s signature (None: no signature)."""
    hello = _Hello(client_hello)
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    extensions = _extension(0x002B, b"\x03\x04") + _extension(0x0033, struct.pack(">HH", _X25519, 32) + public)
    server_hello = _message(
        2,
        b"\x03\x03" + bytes(32) + bytes([len(hello.session)]) + hello.session + b"\x13\x02\x00"
        + len(extensions).to_bytes(2, "big") + extensions,
    )  # fmt: skip
    transcript = hello.message + server_hello

    early = hmac.new(bytes(_HASH_BYTES), bytes(_HASH_BYTES), hashlib.sha384).digest()
    derived = _expand_label(early, b"derived", hashlib.sha384().digest(), _HASH_BYTES)
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(hello.share))
    handshake = hmac.new(derived, shared, hashlib.sha384).digest()
    secret = _expand_label(handshake, b"s hs traffic", hashlib.sha384(transcript).digest(), _HASH_BYTES)

    flight = [
        _message(8, b"\x00\x00"),  # EncryptedExtensions
        _message(13, b"\x00\x00\x08" + _extension(0x000D, struct.pack(">HH", 2, _ED25519))),  # CertificateRequest
        _message(11, _certificate_list(shown)),
    ]
    if signing is not None:
        flight.append(_message(15, _signature(signing, transcript + b"".join(flight))))
    finished_key = _expand_label(secret, b"finished", b"", _HASH_BYTES)
    digest = hashlib.sha384(transcript + b"".join(flight)).digest()
    flight.append(_message(20, hmac.new(finished_key, digest, hashlib.sha384).digest()))
    return b"\x16\x03\x03" + struct.pack(">H", len(server_hello)) + server_hello + _encrypted(secret, flight)


def _certificate_list(shown: Identity) -> bytes:
    der = x509.load_pem_x509_certificate(shown.certificate_pem).public_bytes(serialization.Encoding.DER)
    entry = len(der).to_bytes(3, "big") + der + b"\x00\x00"
    return b"\x00" + len(entry).to_bytes(3, "big") + entry


def _signature(signing: Identity, transcript: bytes) -> bytes:
    key = serialization.load_pem_private_key(signing.key_pem, password=None)
    assert isinstance(key, Ed25519PrivateKey)
    content = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00" + hashlib.sha384(transcript).digest()
    return struct.pack(">HH", _ED25519, 64) + key.sign(content)


def _encrypted(secret: bytes, messages: list[bytes]) -> bytes:
    """One record a message (5.2)."""
    cipher = AESGCM(_expand_label(secret, b"key", b"", 32))
    iv = int.from_bytes(_expand_label(secret, b"iv", b"", 12), "big")
    wire = b""
    for sequence, message in enumerate(messages):
        header = b"\x17\x03\x03" + struct.pack(">H", len(message) + 1 + 16)
        wire += header + cipher.encrypt((iv ^ sequence).to_bytes(12, "big"), message + b"\x16", header)
    return wire
