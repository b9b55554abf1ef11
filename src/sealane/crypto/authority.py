"""A fleet's certificate authority: makes its key, issues host certificates and revocation lists (RFC 5280).

    CA certificate      self-signed, Ed25519, cA TRUE, pathlen 0, keyCertSign and cRLSign
    host certificate    the key of a host's identity, cA FALSE, digitalSignature; the host's name as common name; what the
                        CA found of the host in the extension CLAIMS (`session.vouching` draws it)
    revocation list     with a number that only grows and a time by which the next one comes

What is good is judged in `session.vouching`; nothing here decides about a peer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sealane.crypto.identity import fingerprint
from sealane.crypto.signatures import KeyMalformed

# An arc that needs no registration: 2.25 and a random UUID as a number (ITU-T X.667).
CLAIMS: Final = "2.25.106399698887488349735593130273513264315"
# Clocks differ: what is issued counts from a little earlier on.
BACKDATED: Final = timedelta(minutes=5)
PASSPHRASE_BYTES_MIN: Final = 8


class AuthorityLocked(ValueError):
    """The CA's key is encrypted and no passphrase was given, or another one, or the bytes are no such key."""


@dataclass(frozen=True)
class Authority:
    """A CA that can sign. `key` stays in memory."""

    certificate_pem: bytes
    name: str
    fingerprint: str
    not_after: datetime
    key: Ed25519PrivateKey = field(repr=False)

    def key_pem(self, passphrase: bytes | None) -> bytes:
        """The key for a file: PKCS#8, encrypted (PBES2: scrypt or PBKDF2, AES-256) where there is a passphrase."""
        protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase:
            protection = serialization.BestAvailableEncryption(passphrase)
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


@dataclass(frozen=True)
class Issued:
    """A certificate that was just made."""

    pem: bytes
    serial: int
    not_after: datetime


def create_authority(name: str, *, now: datetime, lifetime: timedelta) -> Authority:
    """A new CA with a new key."""
    key = Ed25519PrivateKey.generate()
    subject = _name(name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, algorithm=None)
    )
    return _authority(certificate, key)


def load_authority(certificate_pem: bytes, key_pem: bytes, passphrase: bytes | None) -> Authority:
    """A CA from its two files; raises AuthorityLocked, or ValueError where they do not belong together."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthorityLocked("the passphrase is missing or wrong, or this is no key") from error
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    if not isinstance(key, Ed25519PrivateKey) or certificate.public_key() != key.public_key():
        raise ValueError("key and certificate do not belong together")
    return _authority(certificate, key)


def is_encrypted(key_pem: bytes) -> bool:
    """Whether a passphrase is needed for this file."""
    return b"ENCRYPTED PRIVATE KEY" in key_pem


def issue_host_certificate(
    authority: Authority, name: str, public_key: bytes, claims: bytes, *, now: datetime, lifetime: timedelta
) -> Issued:
    """A certificate over a host's key (SubjectPublicKeyInfo, DER); it never outlives the CA's. Raises KeyMalformed."""
    try:
        key = serialization.load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyMalformed("not a public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyMalformed("a host's key is an Ed25519 key")
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(authority.name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(now + lifetime, authority.not_after))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(usages, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(CLAIMS), claims), critical=False)
        .sign(authority.key, algorithm=None)
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return Issued(pem, certificate.serial_number, certificate.not_valid_after_utc)


def issue_revocation_list(
    authority: Authority, revoked: Iterable[tuple[int, datetime]], *, number: int, now: datetime, lifetime: timedelta
) -> bytes:
    """A list (PEM) of these serial numbers, each with the moment of its revocation."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(authority.name))
        .last_update(now - BACKDATED)
        .next_update(now + lifetime)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    for serial, moment in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, algorithm=None).public_bytes(serialization.Encoding.PEM)


def _authority(certificate: x509.Certificate, key: Ed25519PrivateKey) -> Authority:
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    der = certificate.public_bytes(serialization.Encoding.DER)
    return Authority(
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
        name=name if isinstance(name, str) else name.decode(),
        fingerprint=fingerprint(der),
        not_after=certificate.not_valid_after_utc,
        key=key,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
