"""X.509 certificates and revocation lists of attesters (RFC 5280): parsed, and verified one link at a time.

Time, trust anchors and revocation are the caller's: this module says whether one certificate or list was signed by
another, and what each one says of itself.
"""

import re
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from sealane.crypto.signatures import KeyMalformed, PublicKey, SignatureInvalid

# What pyca raises over bytes that are no certificate, list or key that it knows; not all of it is a ValueError.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
CERTIFICATES_MAX: Final = 16  # the longest real chain has four
_PEM_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----.{1,65536}?-----END (?:X509 |TRUSTED )?CERTIFICATE-----", re.DOTALL
)


class CertificateMalformed(ValueError):
    """The bytes are no certificate or revocation list that can be read."""


class LinkBroken(Exception):
    """The issuer did not sign this, or may not sign such things; the text says which."""


@dataclass(frozen=True)
class Certificate:
    """What a verifier needs of a certificate."""

    der: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    issuer: bytes = field(repr=False)
    name: str
    serial: int
    not_before: datetime
    not_after: datetime
    is_authority: bool
    may_sign_certificates: bool
    may_sign_lists: bool
    path_length: int | None
    public_key: PublicKey
    unknown_critical: tuple[str, ...]
    _extensions: dict[str, bytes] = field(repr=False)

    def extension(self, oid: str) -> bytes | None:
        """The extension's value as it stands in the certificate (the content of its OCTET STRING); None without."""
        return self._extensions.get(oid)

    @property
    def self_issued(self) -> bool:
        """Whether subject and issuer are the same name."""
        return self.subject == self.issuer

    def verify_issued_by(self, issuer: "Certificate") -> None:
        """Name, basic constraints, key usage, and signature (RFC 5280, 6.1.3 and 6.1.4); raises LinkBroken."""
        if self.issuer != issuer.subject:
            raise LinkBroken(f"{self.name} names another issuer than {issuer.name}")
        if not issuer.is_authority or not issuer.may_sign_certificates:
            raise LinkBroken(f"{issuer.name} may not issue certificates")
        try:
            _load(self.der).verify_directly_issued_by(_load(issuer.der))
        except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise LinkBroken(f"{self.name} was not signed by {issuer.name}") from error


@dataclass(frozen=True)
class RevocationList:
    """A certificate revocation list."""

    der: bytes = field(repr=False)
    issuer: bytes = field(repr=False)
    name: str
    this_update: datetime
    next_update: datetime | None
    serials: frozenset[int] = field(repr=False)
    indirect_or_partial: bool
    number: int | None = None

    def verify_issued_by(self, issuer: Certificate) -> None:
        """Name, key usage and signature (RFC 5280, 6.3.3); raises LinkBroken."""
        if self.issuer != issuer.subject:
            raise LinkBroken(f"the list of {self.name} names another issuer than {issuer.name}")
        if not issuer.may_sign_lists:
            raise LinkBroken(f"{issuer.name} may not sign revocation lists")
        revocations = x509.load_der_x509_crl(self.der)
        try:
            good = revocations.is_signature_valid(_load(issuer.der).public_key())  # type: ignore[arg-type]
        except (TypeError, ValueError, UnsupportedAlgorithm):
            good = _pss_signature_is_valid(revocations, issuer)
        if not good:
            raise LinkBroken(f"the list of {self.name} was not signed by {issuer.name}")


def parse_certificates(data: bytes) -> tuple[Certificate, ...]:
    """One DER certificate, or PEM ones in their order; raises CertificateMalformed. Text around PEM is ignored."""
    if b"-----BEGIN" not in data:
        return (_certificate(data),)
    blocks = _PEM_CERTIFICATE.findall(data)
    if not blocks or len(blocks) > CERTIFICATES_MAX:
        raise CertificateMalformed(f"{len(blocks)} certificates")
    return tuple(_certificate(_from_pem(block)) for block in blocks)


def parse_revocation_list(data: bytes) -> RevocationList:
    """DER or PEM; raises CertificateMalformed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd names in hostile bytes are no news for standard error
        return _read_revocation_list(data)


def _read_revocation_list(data: bytes) -> RevocationList:
    try:
        revocations = x509.load_pem_x509_crl(data) if b"-----BEGIN" in data else x509.load_der_x509_crl(data)
        partial = any(extension.critical for extension in revocations.extensions)
        numbers = [one.value.crl_number for one in revocations.extensions if isinstance(one.value, x509.CRLNumber)]
        return RevocationList(
            der=revocations.public_bytes(serialization.Encoding.DER),
            issuer=revocations.issuer.public_bytes(),
            name=_short_name(revocations.issuer),
            this_update=revocations.last_update_utc,
            next_update=revocations.next_update_utc,
            serials=frozenset(one.serial_number for one in revocations),
            indirect_or_partial=partial,
            number=numbers[0] if numbers else None,
        )
    except _UNREADABLE as error:
        raise CertificateMalformed("not a revocation list") from error


def _pss_signature_is_valid(revocations: x509.CertificateRevocationList, issuer: Certificate) -> bool:
    """AMD signs with RSA-PSS, SHA-384 throughout (57230, 3.2), which `is_signature_valid` may not know for lists."""
    try:
        algorithm = revocations.signature_hash_algorithm
        name = "sha384" if algorithm is None else algorithm.name
        issuer.public_key.verify_rsa(revocations.signature, revocations.tbs_certlist_bytes, hash_name=name, pss=True)
    except (SignatureInvalid, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _from_pem(block: bytes) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return x509.load_pem_x509_certificate(block).public_bytes(serialization.Encoding.DER)
    except _UNREADABLE as error:
        raise CertificateMalformed("not a certificate") from error


def _load(der: bytes) -> x509.Certificate:
    with warnings.catch_warnings():
        # AMD's chip certificates all have the serial number 0, which RFC 5280 does not allow.
        warnings.simplefilter("ignore", UserWarning)
        return x509.load_der_x509_certificate(der)


_KNOWN: Final = (
    x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName,
)  # fmt: skip


def _certificate(der: bytes) -> Certificate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _read_certificate(der)


def _read_certificate(der: bytes) -> Certificate:
    try:
        certificate = _load(der)
        basic = usage = None
        values, unknown = {}, []
        for extension in certificate.extensions:
            oid = extension.oid.dotted_string
            if isinstance(extension.value, x509.BasicConstraints):
                basic = extension.value
            elif isinstance(extension.value, x509.KeyUsage):
                usage = extension.value
            elif isinstance(extension.value, x509.UnrecognizedExtension):
                values[oid] = extension.value.value
            if extension.critical and not isinstance(extension.value, _KNOWN):
                unknown.append(oid)
        return Certificate(
            der=der,
            subject=certificate.subject.public_bytes(),
            issuer=certificate.issuer.public_bytes(),
            name=_short_name(certificate.subject),
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            is_authority=basic is not None and basic.ca,
            may_sign_certificates=usage is None or usage.key_cert_sign,
            may_sign_lists=usage is None or usage.crl_sign,
            path_length=basic.path_length if basic is not None else None,
            public_key=PublicKey(certificate.public_key()),
            unknown_critical=tuple(unknown),
            _extensions=values,
        )
    except KeyMalformed as error:
        raise CertificateMalformed(f"a certificate with {error}") from error
    except _UNREADABLE as error:
        raise CertificateMalformed("not a certificate") from error


def _short_name(name: x509.Name) -> str:
    """The common name, or else the whole name."""
    common = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    text = str(common[0].value) if common else name.rfc4514_string()
    return text[:100] or "(no name)"
