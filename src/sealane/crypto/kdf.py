"""HKDF with SHA-256 (RFC 5869), and HMAC under the keys that it gives (RFC 2104)."""

import hashlib
import hmac

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand


def extract(salt: bytes, secret: bytes) -> bytes:
    """A uniform secret of 32 bytes from `secret`, which need not be uniform (section 2.2)."""
    return hmac.digest(salt, secret, hashlib.sha256)


def expand(secret: bytes, info: bytes, length: int) -> bytes:
    """`length` bytes from a uniform `secret` of 32 bytes, bound to `info` (section 2.3)."""
    return HKDFExpand(algorithm=SHA256(), length=length, info=info).derive(secret)


def authenticate(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256 of the message, 32 bytes."""
    return hmac.digest(key, message, hashlib.sha256)


def same(one: bytes, other: bytes) -> bool:
    """Whether two values are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)
