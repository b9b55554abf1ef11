"""DSSE envelopes, signed by a host's identity (Dead Simple Signing Envelope, protocol 1.0.2; Ed25519, RFC 8032).

An envelope here has one signature and one spelling: JSON with sorted keys, no spaces, padded standard base64. Another
spelling of the same content is refused, so that no byte of a stored envelope can change unnoticed.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from sealane.crypto.identity import Identity, fingerprint, sign
from sealane.crypto.signatures import SignatureInvalid

# Far beyond any receipt; what is larger is not read at all.
ENVELOPE_BYTES_MAX: Final = 256 * 1024
CERTIFICATE_BYTES_MAX: Final = 16 * 1024


class EnvelopeMalformed(ValueError):
    """The bytes are no envelope in the one spelling that is accepted; the message says why."""


@dataclass(frozen=True)
class Certificate:
    """What a host's certificate says, and its key. The fingerprint is what to compare with what is trusted."""

    pem: bytes
    fingerprint: str
    name: str
    key: Ed25519PublicKey

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raises SignatureInvalid."""
        try:
            self.key.verify(signature, message)
        except InvalidSignature as error:
            raise SignatureInvalid from error

    @property
    def public_key(self) -> bytes:
        """The key as SubjectPublicKeyInfo (DER)."""
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return self.key.public_bytes(*form)

    def __repr__(self) -> str:
        return f"Certificate({self.name}, {self.fingerprint[:23]})"


def parse_certificate(pem: bytes) -> Certificate:
    """One PEM certificate with an Ed25519 key; raises ValueError."""
    if len(pem) > CERTIFICATE_BYTES_MAX:
        raise ValueError("too large for a certificate")
    certificate = x509.load_pem_x509_certificate(pem)
    key = certificate.public_key()
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not isinstance(key, Ed25519PublicKey) or not names:
        raise ValueError("no Ed25519 key, or no name")
    name = names[0].value
    der = certificate.public_bytes(serialization.Encoding.DER)
    text = name if isinstance(name, str) else name.decode("utf-8", "replace")
    return Certificate(pem, fingerprint(der), text, key)


@dataclass(frozen=True)
class Envelope:
    """A payload, its type, and one signature over both; `keyid` is a hint and proves nothing."""

    payload_type: str
    payload: bytes
    keyid: str
    signature: bytes

    def encode(self) -> bytes:
        """The one spelling."""
        value = {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": self.payload_type,
            "signatures": [{"keyid": self.keyid, "sig": base64.b64encode(self.signature).decode()}],
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def verify(self, certificate: Certificate) -> None:
        """Raises SignatureInvalid where the certificate's key did not sign this payload under this type."""
        certificate.verify(self.signature, pre_authentication_encoding(self.payload_type, self.payload))

    def __repr__(self) -> str:
        return f"Envelope({self.payload_type}, {len(self.payload)} bytes, {self.keyid})"


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What a DSSE signature covers (protocol.md, "PAE")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_envelope(identity: Identity, payload_type: str, payload: bytes) -> Envelope:
    """An envelope that the identity signs; the key id is its fingerprint."""
    signature = sign(identity.key_pem, pre_authentication_encoding(payload_type, payload))
    return Envelope(payload_type, payload, identity.fingerprint, signature)


def parse_envelope(data: bytes) -> Envelope:
    """Read untrusted bytes; raises EnvelopeMalformed. The signature is not checked here."""
    if len(data) > ENVELOPE_BYTES_MAX:
        raise EnvelopeMalformed("too large for an envelope")
    try:
        value: Any = json.loads(data)
        (signature,) = value["signatures"]
        envelope = Envelope(
            payload_type=_text(value["payloadType"]),
            payload=base64.b64decode(_text(value["payload"]), validate=True),
            keyid=_text(signature["keyid"]),
            signature=base64.b64decode(_text(signature["sig"]), validate=True),
        )
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise EnvelopeMalformed(f"no DSSE envelope with one signature ({type(error).__name__})") from None
    if envelope.encode() != data:
        raise EnvelopeMalformed("the envelope is not spelled as it was written")
    return envelope


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate is no text
    return value
