"""The seeds' page codecs: what Fan et al. (2016), section 3.2, do to pages of guest user space. None of them is secure.

They exist because the paper describes them, and are measured and attacked here. A codec is one file with one class, and one
line in CODECS. Errors of the paper, found by recomputing its examples, are told in `docs/codecs.md`.
"""

from typing import Final

from sealane.seal.codecs.affine import Affine
from sealane.seal.codecs.codec import PAGE_BYTES, PageCodec, Pages
from sealane.seal.codecs.hrt import Hrt
from sealane.seal.codecs.rc4 import Rc4Codec
from sealane.seal.codecs.shift import Shift

CODECS: Final[dict[str, type[PageCodec]]] = {
    "affine": Affine,
    "hrt": Hrt,
    "rc4": Rc4Codec,
    "shift": Shift,
}

__all__ = ["CODECS", "PAGE_BYTES", "Affine", "Hrt", "PageCodec", "Pages", "Rc4Codec", "Shift"]
