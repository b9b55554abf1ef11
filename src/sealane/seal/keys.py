"""The keys of one lane and direction, and how they follow from one another.

    lane secret   = HKDF-Expand(migration secret, "sealane v1 lane" || lane u16 || direction u8, 32)
    identifier    = HKDF-Expand(lane secret, "identifier", 8)          public, in every record's header
    secret[0]     = HKDF-Expand(lane secret, "secret", 32)
    key[n], iv[n] = HKDF-Expand(secret[n], "key", 32), HKDF-Expand(secret[n], "iv", 12)
    secret[n+1]   = HKDF-Expand(secret[n], "next", 32)
    codec key     = HKDF-Expand(migration secret, "sealane v1 codec" || lane u16 || direction u8, 32)
    token         = HKDF-Expand(migration secret, "sealane v1 lane token" || lane u16, 16)   opens the lane's connection

The token routes a connection to its lane and opens nothing: no key can be made of it.

A key serves RECORDS_PER_KEY records (see `limits`); which generation a record belongs to follows from its sequence
number, so both ends move on by themselves. A generation's secret is forgotten once the next one is there.
"""

from enum import IntEnum
from typing import Final

from sealane.crypto.aead import KEY_BYTES, NONCE_BYTES, Aead
from sealane.crypto.kdf import expand
from sealane.limits import RECORDS_PER_KEY

IDENTIFIER_BYTES: Final = 8
SECRET_BYTES: Final = 32
TOKEN_BYTES: Final = 16


class Direction(IntEnum):
    """Which way a record goes; each has its own keys."""

    TO_DESTINATION = 0
    TO_SOURCE = 1


def lane_token(migration_secret: bytes, lane: int) -> bytes:
    """What a lane's connection shows first, once: only who holds the migration's secret can know it."""
    return expand(migration_secret, b"sealane v1 lane token" + lane.to_bytes(2, "big"), TOKEN_BYTES)


def derive_digest_key(migration_secret: bytes) -> bytes:
    """The key of the source's page digests (`seal.digests`), which nobody else needs."""
    return expand(migration_secret, b"sealane v1 page digests", SECRET_BYTES)


def codec_key(migration_secret: bytes, *, lane: int, direction: Direction) -> bytes:
    """The key of one lane's page codec: its own label, so that a codec that is broken says nothing of the lane's keys."""
    return expand(migration_secret, b"sealane v1 codec" + lane.to_bytes(2, "big") + bytes([direction]), SECRET_BYTES)


class LaneKeys:
    """The moving keys of one lane and direction, starting at sequence number 0."""

    def __init__(self, migration_secret: bytes, *, lane: int, direction: Direction) -> None:
        label = b"sealane v1 lane" + lane.to_bytes(2, "big") + bytes([direction])
        secret = expand(migration_secret, label, SECRET_BYTES)
        self.identifier = expand(secret, b"identifier", IDENTIFIER_BYTES)
        self._secret = expand(secret, b"secret", SECRET_BYTES)
        self._label = f"lane {lane} {direction.name}"
        self._generation = 0
        self._use_secret()

    def _use_secret(self) -> None:
        self._aead = Aead(expand(self._secret, b"key", KEY_BYTES))
        self._iv = int.from_bytes(expand(self._secret, b"iv", NONCE_BYTES), "big")

    def at(self, sequence: int) -> Aead:
        """The cipher for this record; moves to the next generation where the sequence number says so.

        Sequence numbers are asked for in order: a generation that was left cannot come back.
        """
        generation = sequence // RECORDS_PER_KEY
        while self._generation < generation:
            self._secret = expand(self._secret, b"next", SECRET_BYTES)
            self._generation += 1
            self._use_secret()
        return self._aead

    def covers(self, sequence: int) -> bool:
        """Whether the present generation is the one of this sequence number."""
        return sequence // RECORDS_PER_KEY == self._generation

    def nonce(self, sequence: int) -> bytes:
        """The record's nonce: the generation's IV XOR the sequence number (RFC 8446, section 5.3)."""
        return (self._iv ^ sequence).to_bytes(NONCE_BYTES, "big")

    def __repr__(self) -> str:
        return f"LaneKeys({self._label}, generation {self._generation})"
