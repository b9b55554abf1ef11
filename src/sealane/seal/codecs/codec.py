"""What every page codec is."""

from abc import ABC, abstractmethod
from typing import ClassVar, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane.crypto.kdf import expand

PAGE_BYTES: Final = 4096
Pages: TypeAlias = NDArray[np.uint8]


class PageCodec(ABC):
    """Encodes pages for one lane and direction; the other end decodes them in the order in which they were encoded.

    `pages` and `out` are uint8, n x 4096, each row contiguous, and may be the same memory. Any bytes can be decoded: a
    codec notices no change (integrity is the lane's).
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, key: bytes) -> None:
        """Expand the session's 32 bytes to this codec's key."""

    @abstractmethod
    def encode_into(self, pages: Pages, out: Pages) -> None:
        """Encode every page."""

    @abstractmethod
    def decode_into(self, pages: Pages, out: Pages) -> None:
        """Undo `encode_into`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def uniform_bytes(key: bytes, codec: str, what: str, length: int) -> bytes:
    """`length` bytes of the session's key for one part of a codec's key (HKDF-Expand)."""
    return expand(key, f"sealane v1 codec {codec} {what}".encode(), length)


def odd_multiplier(byte: int) -> int:
    """One of the 128 numbers that have an inverse modulo 256."""
    return byte | 1


def permutation_of_256(seed: bytes) -> NDArray[np.uint8]:
    """A permutation of 0…255: the order of 256 random words of 64 bits, from 2048 bytes."""
    order: NDArray[np.uint8] = np.argsort(np.frombuffer(seed, "<u8", 256), kind="stable").astype(np.uint8)
    return order
