"""AES-256-GCM into buffers that the caller owns (NIST SP 800-38D; pyca's `encrypt_into` and `decrypt_into`)."""

from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
CIPHER_NAME: Final = "AES-256-GCM"

Bytes: TypeAlias = bytes | bytearray | memoryview


class OpenFailed(Exception):
    """The tag does not fit: key, nonce, associated data or ciphertext differ from what was sealed."""


class Aead:
    """AES-256-GCM under one key. Nonces are the caller's duty: never the same twice under one key.

    Input and output may be the same memory (`out` starting where the input starts), which keeps a record in cache.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"an AES-256 key has {KEY_BYTES} bytes, not {len(key)}")
        self._gcm = AESGCM(key)

    def seal_into(self, nonce: bytes, plaintext: Bytes, associated_data: Bytes, out: bytearray | memoryview) -> int:
        """Write ciphertext and tag to `out`, which has exactly TAG_BYTES more than `plaintext`; returns its length."""
        return self._gcm.encrypt_into(nonce, plaintext, associated_data, out)

    def open_into(self, nonce: bytes, sealed: Bytes, associated_data: Bytes, out: bytearray | memoryview) -> int:
        """Write the plaintext to `out`, which is exactly TAG_BYTES shorter than `sealed`; raises OpenFailed."""
        try:
            return self._gcm.decrypt_into(nonce, sealed, associated_data, out)
        except InvalidTag:
            raise OpenFailed from None

    def __repr__(self) -> str:
        return "Aead(AES-256-GCM)"
