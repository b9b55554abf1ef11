"""HKDF-Expand with SHA-256 (RFC 5869, section 2.3)."""

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand


def expand(secret: bytes, info: bytes, length: int) -> bytes:
    """`length` bytes from a uniform `secret` of 32 bytes, bound to `info`."""
    return HKDFExpand(algorithm=SHA256(), length=length, info=info).derive(secret)
