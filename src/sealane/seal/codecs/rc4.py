"""`rc4`: one RC4 keystream over all pages of a lane and direction; the paper's comparison.

The keystream goes on from page to page and never begins again, so no part of it is used twice. Encoder and decoder are
therefore two objects, and an object does one of both. RC4's biases remain, in the first bytes above all.
"""

from sealane.crypto.rc4 import Rc4
from sealane.seal.codecs.codec import PageCodec, Pages, uniform_bytes


class Rc4Codec(PageCodec):
    """RC4 with a key of 16 bytes."""

    name = "rc4"

    def __init__(self, key: bytes) -> None:
        self._stream = Rc4(uniform_bytes(key, self.name, "key", 16))

    def encode_into(self, pages: Pages, out: Pages) -> None:
        """XOR with the keystream's next bytes."""
        if pages.flags.c_contiguous and out.flags.c_contiguous:
            self._stream.apply_into(pages.data.cast("B"), out.data.cast("B"))
        else:
            gathered = pages.copy(order="C")
            view = gathered.data.cast("B")
            self._stream.apply_into(view, view)
            out[:] = gathered

    def decode_into(self, pages: Pages, out: Pages) -> None:
        """The same as `encode_into`."""
        self.encode_into(pages, out)
