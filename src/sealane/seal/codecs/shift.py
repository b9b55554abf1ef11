"""`shift` (移位代换): y[i] = x[i] + K[i mod m] modulo 256, counted from the page's beginning.

It is Vigenère's cipher: Kasiski's test or the index of coincidence finds m, and frequencies find K; zero pages show K itself.
The paper allows m from 1 to 4096; m = 256 here, so that a page holds each entry of the table 16 times.
"""

from typing import Final, Self

import numpy as np

from sealane.seal.codecs.codec import PAGE_BYTES, PageCodec, Pages, uniform_bytes

PERIOD_BYTES: Final = 256


class Shift(PageCodec):
    """The paper's shift substitution."""

    name = "shift"

    def __init__(self, key: bytes) -> None:
        self._set(uniform_bytes(key, self.name, "table", PERIOD_BYTES))

    @classmethod
    def with_parameters(cls, table: bytes) -> Self:
        """The codec with a table of 1 to 4096 bytes."""
        if not 1 <= len(table) <= PAGE_BYTES:
            raise ValueError(f"a table of {len(table)} bytes")
        codec = cls.__new__(cls)
        codec._set(table)
        return codec

    def _set(self, table: bytes) -> None:
        self._table = np.resize(np.frombuffer(table, np.uint8), PAGE_BYTES)

    def encode_into(self, pages: Pages, out: Pages) -> None:
        """y = x + K."""
        np.add(pages, self._table, out=out)

    def decode_into(self, pages: Pages, out: Pages) -> None:
        """x = y - K."""
        np.subtract(pages, self._table, out=out)
