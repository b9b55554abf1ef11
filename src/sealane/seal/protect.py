"""The protections by name, and what each leaves readable to whoever reads the wire.

    sealed      (default) every byte is encrypted
    selective   whole pages that the monitor knows not to be a user process's are authenticated only; all else is encrypted
    shift, affine, hrt, rc4
                as selective, and user pages are encoded by the seed's codec of that name instead of being encrypted

Every byte is authenticated under each of them. What goes in clear, or through a codec, are contents of whole pages that the
monitor has classified, and nothing else: what it has not classified, pages that a record's border cuts, the stream's own
structure, device state and whatever cannot be parsed are encrypted under every protection. That is safer than the seed's
model, which leaves all of it readable, and costs nothing.
"""

from collections.abc import Iterable
from typing import Final

from sealane.errors import ControlError, UsageError

SEALED: Final = "sealed"
SELECTIVE: Final = "selective"

_NOT_USER: Final = (
    "READABLE: contents of the kernel, page cache, files, pipes, sockets, typed passwords, the screen, freed memory and ended "
    "processes"
)
_ENCODED: Final = {
    "shift": "user pages too, by anybody who looks for the table (shift is Vigenère's cipher)",
    "affine": "user pages too, by trying 32 768 keys (affine)",
    "hrt": "user pages too, from known or repeated pages (hrt is no modern cipher)",
    "rc4": "user pages perhaps (rc4 is broken)",
}
_WORDS: Final = {
    SEALED: "nothing",
    SELECTIVE: _NOT_USER,
    **{name: f"{_NOT_USER}; {words}" for name, words in _ENCODED.items()},
}
PROTECTIONS: Final = tuple(_WORDS)


def readable_words(protection: str) -> str:
    """What a protection leaves readable to whoever reads the wire; "nothing" for `sealed` alone. KeyError where unknown."""
    return _WORDS[protection]


def is_weak(protection: str) -> bool:
    """Whether it leaves anything readable."""
    return protection != SEALED


def codec_name(protection: str) -> str | None:
    """The codec that encodes user pages, of `seal.codecs.CODECS`; None where they are encrypted."""
    return protection if protection in _ENCODED else None


def check_wanted(protection: str, *, is_known_weak: bool, allowed: Iterable[str]) -> None:
    """What a source asks before anything moves: raises `protection.weak`, `protection.not-allowed`."""
    if is_weak(protection) and not is_known_weak:
        raise UsageError("protection.weak", f"{protection} leaves this to whoever reads the wire: {_WORDS[protection]}")
    if protection not in allowed:
        raise ControlError("protection.not-allowed", f"this host allows {', '.join(sorted(allowed))}, not {protection}")
