"""`affine` (线性变换): y = a·x + b modulo 256, a odd. 2^15 keys, exhausted at once; letter frequencies survive."""

from typing import Self

import numpy as np

from sealane.seal.codecs.codec import PageCodec, Pages, odd_multiplier, uniform_bytes


class Affine(PageCodec):
    """The paper's linear transformation."""

    name = "affine"

    def __init__(self, key: bytes) -> None:
        a, b = uniform_bytes(key, self.name, "a b", 2)
        self._set(odd_multiplier(a), b)

    @classmethod
    def with_parameters(cls, a: int, b: int) -> Self:
        """The codec with the paper's own key; `a` must be odd."""
        if not a % 2:
            raise ValueError(f"{a} has no inverse modulo 256")
        codec = cls.__new__(cls)
        codec._set(a, b)
        return codec

    def _set(self, a: int, b: int) -> None:
        self._a, self._b = np.uint8(a), np.uint8(b)
        self._inverse = np.uint8(pow(a, -1, 256))
        self._back = np.uint8(-pow(a, -1, 256) * b % 256)

    def encode_into(self, pages: Pages, out: Pages) -> None:
        """y = a·x + b."""
        np.multiply(pages, self._a, out=out)
        np.add(out, self._b, out=out)

    def decode_into(self, pages: Pages, out: Pages) -> None:
        """x = a⁻¹·y - a⁻¹·b."""
        np.multiply(pages, self._inverse, out=out)
        np.add(out, self._back, out=out)
