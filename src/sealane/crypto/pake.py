"""SPAKE2 over Ed25519 (the `spake2` package): two ends that know one short code agree on a key; a guess costs one attempt.

The package's arithmetic is plain Python and not constant in time; a code lives for minutes and three tries.
"""

import hmac
import os
from collections.abc import Callable
from typing import Any, Literal

import spake2

from sealane.crypto.kdf import expand

Side = Literal["inviter", "joiner"]
MESSAGE_BYTES = 33


class PakeFailed(Exception):
    """The other end's message is no element of the group, is ours sent back, or came from the same side."""


class Pake:
    """One attempt. `message` goes to the other end; `finish` takes its message and gives the shared key, once."""

    def __init__(self, code: bytes, side: Side, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        make: Any = spake2.SPAKE2_A if side == "joiner" else spake2.SPAKE2_B
        self._exchange = make(code, idA=b"sealane joiner", idB=b"sealane inviter", entropy_f=entropy)
        self.message: bytes = self._exchange.start()

    def finish(self, theirs: bytes) -> bytes:
        """32 bytes, the same at both ends only where both have the same code; raises PakeFailed."""
        if len(theirs) != MESSAGE_BYTES:
            raise PakeFailed
        try:
            key: bytes = self._exchange.finish(theirs)
        except Exception as error:  # the package raises ValueError, AssertionError and its own, by what is wrong
            raise PakeFailed from error
        return key

    def __repr__(self) -> str:
        return "Pake()"


def proof(key: bytes, label: bytes, transcript: bytes) -> bytes:
    """What only an end with the key can say of this transcript (HMAC-SHA-256 under a key of its own)."""
    return hmac.digest(expand(key, label, 32), transcript, "sha256")


def check_proof(key: bytes, label: bytes, transcript: bytes, theirs: bytes) -> bool:
    """Whether the other end has the key."""
    return hmac.compare_digest(proof(key, label, transcript), theirs)
