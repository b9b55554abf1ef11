"""`hrt` (混合随机变换, hybrid random transformation): the paper's choice. It falls to known plaintext and to repeated pages.

Positions i are counted from 1 at the page's beginning, p is the plain byte, q a buffer of one byte, a odd, Q a permutation:

    odd  i:   y = a·(p XOR Q[(i-1) mod 256]) + b,  q = y         decode:  q = y,  p = (a⁻¹·(y - b)) XOR Q[(i-1) mod 256]
    even i:   y = a·(p + q) + b                                  decode:  p = a⁻¹·(y - b) - q

The paper says only that the table is "indexed by position"; (i-1) mod 256 is this implementation's choice. A page begins at
an odd position and so needs no initial q. Formula (2) of the paper lost a subscript: all its numbers come from XOR with Q.

An even byte depends on the odd byte before it alone, so both are the halves of one 16-bit word w (little-endian: the odd one is
low), and a page is 2048 words computed at once, modulo 2^16:

    low  = (a·(w XOR Q) + b) AND 0xff            what w has above its low byte never comes down
    y    = a·(w AND 0xff00) + (256·a + 1)·low + 256·b
"""

import sys
from typing import Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane.seal.codecs.codec import (
    PAGE_BYTES,
    PageCodec,
    Pages,
    odd_multiplier,
    permutation_of_256,
    uniform_bytes,
)

Words: TypeAlias = NDArray[np.uint16]

# 128 KiB of pages and two buffers of that size stay in a core's second-level cache.
_BATCH_PAGES: Final = 32
_LOW: Final = np.uint16(0x00FF)
_HIGH: Final = np.uint16(0xFF00)

if sys.byteorder != "little":  # pragma: no cover - x86-64 only, as all of page classes
    raise ImportError("hrt takes 16-bit words as little-endian")


class Hrt(PageCodec):
    """The paper's hybrid random transformation, on whole pages."""

    name = "hrt"

    def __init__(self, key: bytes) -> None:
        a, b = uniform_bytes(key, self.name, "a b", 2)
        self._set(odd_multiplier(a), b, permutation_of_256(uniform_bytes(key, self.name, "table", 2048)))

    @classmethod
    def with_parameters(cls, a: int, b: int, table: NDArray[np.uint8]) -> Self:
        """The codec with a key of one's own: `a` odd, `table` a permutation of 0…255."""
        if not a % 2 or sorted(table.tolist()) != list(range(256)):
            raise ValueError("a must be odd and the table a permutation")
        codec = cls.__new__(cls)
        codec._set(a, b, table)
        return codec

    def _set(self, a: int, b: int, table: NDArray[np.uint8]) -> None:
        inverse = pow(a, -1, 256)
        self._a, self._b = np.uint16(a), np.uint16(b)
        self._inverse = np.uint16(inverse)
        self._carry = np.uint16((a << 8) + 1)
        self._high_b = np.uint16(b << 8)
        self._high_back = np.uint16(-(inverse * b << 8) % 65536)
        # word j of a page holds position 2j + 1, which takes Q[2j mod 256]
        self._table = np.resize(table[::2].astype(np.uint16), PAGE_BYTES // 2)
        self._low: Words = np.empty((_BATCH_PAGES, PAGE_BYTES // 2), np.uint16)
        self._high: Words = np.empty_like(self._low)

    def encode_into(self, pages: Pages, out: Pages) -> None:
        """See the module's formulas."""
        words, encoded = pages.view(np.uint16), out.view(np.uint16)
        for first in range(0, len(words), _BATCH_PAGES):
            plain = words[first : first + _BATCH_PAGES]
            low, high = self._low[: len(plain)], self._high[: len(plain)]
            np.bitwise_xor(plain, self._table, out=low)
            np.multiply(low, self._a, out=low)
            np.add(low, self._b, out=low)
            np.bitwise_and(low, _LOW, out=low)
            np.bitwise_and(plain, _HIGH, out=high)
            np.multiply(high, self._a, out=high)
            np.multiply(low, self._carry, out=low)
            np.add(high, low, out=high)
            np.add(high, self._high_b, out=encoded[first : first + _BATCH_PAGES])

    def decode_into(self, pages: Pages, out: Pages) -> None:
        """The inverse, in the same words: high byte a⁻¹·y - a⁻¹·b - low, low byte (a⁻¹·(y - b)) XOR Q."""
        words, decoded = pages.view(np.uint16), out.view(np.uint16)
        for first in range(0, len(words), _BATCH_PAGES):
            coded = words[first : first + _BATCH_PAGES]
            low, high = self._low[: len(coded)], self._high[: len(coded)]
            np.bitwise_and(coded, _HIGH, out=high)
            np.multiply(high, self._inverse, out=high)
            np.add(high, self._high_back, out=high)
            np.left_shift(coded, 8, out=low)
            np.subtract(high, low, out=high)
            np.subtract(coded, self._b, out=low)
            np.multiply(low, self._inverse, out=low)
            np.bitwise_xor(low, self._table, out=low)
            np.bitwise_and(low, _LOW, out=low)
            np.bitwise_or(high, low, out=decoded[first : first + _BATCH_PAGES])
