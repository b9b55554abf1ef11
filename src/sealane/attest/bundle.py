"""A bundle: named pieces of evidence as they travel between a host's quoting process, its enclaves, and their peers.

     0        1        2                    6
    +--------+--------+--------------------+--------- - - -+----------------- - - -+
    | count  | length | size               | name (length) | content (size)        |   the last four, count times
    +--------+--------+--------------------+--------- - - -+----------------- - - -+
       u8       u8       u32 (big-endian)

A name says where a piece comes from, for people; what it is, its content says (see `appraise`). Names in LOGS are
measurement logs, which travel apart from what is quoted.
"""

import re
import struct
from collections.abc import Mapping
from typing import Final

from sealane.attest.reading import Reader
from sealane.errors import EvidenceError, InternalError
from sealane.limits import EVIDENCE_MAX

PIECES_MAX: Final = 32
LOGS: Final = frozenset({"boot-log", "runtime-log", "platform-log"})
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")


def encode_bundle(pieces: Mapping[str, bytes]) -> bytes:
    """The pieces as bytes, in the order of their names; raises InternalError where they are too many or too large."""
    size = sum(map(len, pieces.values()))
    if len(pieces) > PIECES_MAX or size > EVIDENCE_MAX or not all(_NAME.fullmatch(name) for name in pieces):
        raise InternalError("internal.error", f"{len(pieces)} pieces of evidence, {size} bytes")
    parts = [bytes([len(pieces)])]
    for name, content in sorted(pieces.items()):
        parts += [struct.pack(">BI", len(name), len(content)), name.encode(), content]
    return b"".join(parts)


def parse_bundle(data: bytes) -> dict[str, bytes]:
    """Read untrusted bytes; raises EvidenceError `attest.malformed` or `attest.too-large`."""
    if len(data) > EVIDENCE_MAX:
        raise EvidenceError("attest.too-large", f"a bundle of {len(data)} bytes")
    reader = Reader(data, "bundle", "big")
    pieces: dict[str, bytes] = {}
    count = reader.number(1)
    if count > PIECES_MAX:
        raise reader.malformed(f"{count} pieces")
    for _ in range(count):
        name_length, size = reader.number(1), reader.number(4)
        name = reader.take(name_length).decode("ascii", "replace")
        if not _NAME.fullmatch(name) or name in pieces:
            raise reader.malformed("a name that no piece has, or one twice")
        pieces[name] = reader.take(size)
    if reader.left:
        raise reader.malformed("bytes follow the last piece")
    return pieces
