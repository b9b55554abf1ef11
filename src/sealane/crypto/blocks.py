"""AES on many independent blocks at once, as a keyed permutation inside other constructions; never a mode for secrecy."""

from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK_BYTES: Final = 16
KEY_BYTES: Final = 32
# pyca's update_into wants room for an unfinished block behind the output.
SLACK_BYTES: Final = BLOCK_BYTES - 1


class BlockPermutation:
    """AES-256 (FIPS 197) under one key, applied to each block of 16 bytes by itself.

    Equal blocks give equal outputs: the caller must not let anybody see them.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"an AES-256 key has {KEY_BYTES} bytes, not {len(key)}")
        self._aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - a permutation, not a cipher mode

    def apply_into(self, blocks: memoryview, out: bytearray | memoryview) -> None:
        """Permute whole blocks; `out` is SLACK_BYTES longer than `blocks`."""
        if len(blocks) % BLOCK_BYTES:
            raise ValueError(f"{len(blocks)} bytes are not whole blocks")
        self._aes.update_into(blocks, out)

    def __repr__(self) -> str:
        return "BlockPermutation(AES-256)"
