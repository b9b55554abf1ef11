"""A host's identity: an Ed25519 key and a self-signed certificate that peers pin by fingerprint (RFC 8032, RFC 5280).

There is no certificate authority and no name to match: a peer is who its fingerprint says. The fingerprint is the
SHA-256 of the certificate's DER encoding.
"""

import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sealane.errors import ControlError, HostError
from sealane.paths import Paths


@dataclass(frozen=True)
class Identity:
    """Key and certificate of one host (PEM), with what the certificate says."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    name: str
    fingerprint: str
    not_before: datetime
    not_after: datetime


def fingerprint(certificate_der: bytes) -> str:
    """The name under which a certificate is pinned: `SHA256:` and 64 hexadecimal digits."""
    return "SHA256:" + hashlib.sha256(certificate_der).hexdigest()


def create_identity(name: str, *, now: datetime, lifetime_days: int = 3650, key_pem: bytes | None = None) -> Identity:
    """A certificate from an hour before `now` (clocks differ), for a new key or for the given one."""
    key = Ed25519PrivateKey.generate() if key_pem is None else load_key(key_pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=lifetime_days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, algorithm=None)
    )
    return load_identity_pem(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def save_identity(paths: Paths, identity: Identity, *, replace: bool = False) -> None:
    """Write key (mode 0600) and certificate (0644) durably; raises `identity.exists` unless `replace`."""
    if paths.identity_key.exists() and not replace:
        raise ControlError("identity.exists", f"{paths.identity_key} is there already")
    try:
        paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(paths.identity_key, identity.key_pem, 0o600)
        _write(paths.identity_certificate, identity.certificate_pem, 0o644)
    except OSError as error:
        raise HostError("host.permission", f"{paths.state}: {error.strerror}") from error


def load_identity(paths: Paths) -> Identity:
    """The host's identity; raises `host.identity-missing`, or `host.permission` where it cannot be read."""
    try:
        return load_identity_pem(paths.identity_key.read_bytes(), paths.identity_certificate.read_bytes())
    except FileNotFoundError as error:
        raise HostError("host.identity-missing", f"{error.filename} is missing") from error
    except OSError as error:
        raise HostError("host.permission", f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise HostError("host.identity-missing", f"the identity in {paths.state} cannot be read: {error}") from error


def load_key(pem: bytes) -> Ed25519PrivateKey:
    """An identity's private key; raises ValueError where it is none, or of another kind."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    return key


def sign(key_pem: bytes, message: bytes) -> bytes:
    """An identity's signature (RFC 8032), 64 bytes; `signatures.PublicKey.verify_ed25519` is its counterpart."""
    return load_key(key_pem).sign(message)


def public_key(key_pem: bytes) -> bytes:
    """The public half of an identity's key as SubjectPublicKeyInfo (DER)."""
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return load_key(key_pem).public_key().public_bytes(*form)


def load_identity_pem(key_pem: bytes, certificate_pem: bytes) -> Identity:
    """Key and certificate (PEM) as an identity; raises ValueError where they do not belong together."""
    key = load_key(key_pem)
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    raw = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    certified = certificate.public_key().public_bytes(*raw)
    if certified != key.public_key().public_bytes(*raw):
        raise ValueError("key and certificate do not belong together")
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return Identity(
        key_pem=key_pem,
        certificate_pem=certificate_pem,
        name=name if isinstance(name, str) else name.decode(),
        fingerprint=fingerprint(certificate.public_bytes(serialization.Encoding.DER)),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
