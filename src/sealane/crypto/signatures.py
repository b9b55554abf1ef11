"""Public keys of attesters and what they signed: ECDSA in the raw forms of quotes, RSA, Ed25519.

`verify_*` raises SignatureInvalid and gives nothing back, so that a forgotten result cannot pass for a good signature.
"""

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

# FIPS 186-5 and NIST SP 800-131A: nothing below 112 bits of strength; SHA-1 signatures are not listed on purpose.
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_CURVES: Final[dict[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}
RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 8192  # verification time grows with the square; no TPM or vendor uses more than 4096


class SignatureInvalid(Exception):
    """The signature does not fit the message and the key, or key and scheme do not fit each other."""


class KeyMalformed(ValueError):
    """The bytes are no public key of a kind that attesters use."""


class PublicKey:
    """A public key; `digest` (SHA-256 of its SubjectPublicKeyInfo, hex) is the name under which it is pinned."""

    def __init__(self, key: object) -> None:
        if isinstance(key, rsa.RSAPublicKey):
            if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
                raise KeyMalformed(f"an RSA key of {key.key_size} bits")
            self.kind = f"RSA-{key.key_size}"
        elif isinstance(key, ec.EllipticCurvePublicKey):
            names = [name for name, curve in _CURVES.items() if curve.name == key.curve.name]
            if not names:
                raise KeyMalformed(f"an EC key on {key.curve.name}")
            self.kind = names[0]
        elif isinstance(key, ed25519.Ed25519PublicKey):
            self.kind = "Ed25519"
        else:
            raise KeyMalformed("a key of a kind that is not used for attestation")
        self._key = key
        self.spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.digest = hashlib.sha256(self.spki).hexdigest()

    def verify_ecdsa(self, signature: bytes, message: bytes, *, hash_name: str) -> None:
        """`signature` is r || s, each big-endian and as long as the curve's field; raises SignatureInvalid."""
        if not isinstance(self._key, ec.EllipticCurvePublicKey):
            raise SignatureInvalid
        size = (self._key.curve.key_size + 7) // 8
        if len(signature) != 2 * size:
            raise SignatureInvalid
        r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
        try:
            self._key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(_HASHES[hash_name]))
        except (InvalidSignature, ValueError, KeyError, UnsupportedAlgorithm) as error:
            raise SignatureInvalid from error

    def verify_rsa(self, signature: bytes, message: bytes, *, hash_name: str, pss: bool) -> None:
        """PKCS #1 v1.5, or PSS with a salt of any length (TPMs use the longest); raises SignatureInvalid."""
        if not isinstance(self._key, rsa.RSAPublicKey) or hash_name not in _HASHES:
            raise SignatureInvalid
        algorithm = _HASHES[hash_name]
        form: padding.AsymmetricPadding = padding.PKCS1v15()
        if pss:
            form = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=padding.PSS.AUTO)
        try:
            self._key.verify(signature, message, form, algorithm)
        except (InvalidSignature, ValueError) as error:
            raise SignatureInvalid from error

    def verify_ed25519(self, signature: bytes, message: bytes) -> None:
        """RFC 8032; raises SignatureInvalid."""
        if not isinstance(self._key, ed25519.Ed25519PublicKey):
            raise SignatureInvalid
        try:
            self._key.verify(signature, message)
        except InvalidSignature as error:
            raise SignatureInvalid from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.spki == self.spki

    def __hash__(self) -> int:
        return hash(self.spki)

    def __repr__(self) -> str:
        return f"PublicKey({self.kind}, {self.digest[:16]})"


def sign_p256(key_pem: bytes, message: bytes) -> tuple[bytes, bytes]:
    """(r || s, x || y) by a P-256 key in a PEM file, with SHA-256; for simulated platforms. Raises KeyMalformed."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyMalformed("not a private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVES["P-256"].name:
        raise KeyMalformed("not a key on P-256")
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    numbers = key.public_key().public_numbers()
    return r.to_bytes(32, "big") + s.to_bytes(32, "big"), numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def key_from_point(curve: str, x: bytes, y: bytes) -> PublicKey:
    """An EC key (`P-256` or `P-384`) from big-endian coordinates; raises KeyMalformed off the curve."""
    if curve not in _CURVES:
        raise KeyMalformed(f"no curve {curve}")
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), _CURVES[curve])
    try:
        return PublicKey(numbers.public_key())
    except ValueError as error:
        raise KeyMalformed("the point is not on the curve") from error


def key_from_modulus(modulus: bytes, exponent: int) -> PublicKey:
    """An RSA key; raises KeyMalformed."""
    if not RSA_BITS_MIN <= 8 * len(modulus) <= RSA_BITS_MAX:
        raise KeyMalformed(f"an RSA modulus of {8 * len(modulus)} bits")
    try:
        return PublicKey(rsa.RSAPublicNumbers(exponent, int.from_bytes(modulus, "big")).public_key())
    except ValueError as error:
        raise KeyMalformed("the numbers are no RSA key") from error


def parse_public_key(data: bytes) -> PublicKey:
    """A SubjectPublicKeyInfo, PEM or DER; raises KeyMalformed."""
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return PublicKey(serialization.load_pem_public_key(data))
        return PublicKey(serialization.load_der_public_key(data))
    except KeyMalformed:
        raise
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyMalformed("not a public key") from error
