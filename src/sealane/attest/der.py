"""Just enough DER (X.690) to read Intel's certificate extension: definite lengths, one-byte tags, bounded depth."""

from typing import Final

from sealane.errors import EvidenceError

INTEGER: Final = 0x02
OCTET_STRING: Final = 0x04
OBJECT_IDENTIFIER: Final = 0x06
ENUMERATED: Final = 0x0A
IA5_STRING: Final = 0x16
SEQUENCE: Final = 0x30


def read_elements(data: bytes, what: str) -> list[tuple[int, bytes]]:
    """All elements of `data` as (tag, content); raises EvidenceError `attest.malformed`."""
    elements, offset = [], 0
    while offset < len(data):
        tag, content, offset = _element(data, offset, what)
        elements.append((tag, content))
    return elements


def read_one(data: bytes, tag: int, what: str) -> bytes:
    """The content of the only element, which has to have `tag`."""
    elements = read_elements(data, what)
    if len(elements) != 1 or elements[0][0] != tag:
        raise EvidenceError("attest.malformed", f"{what}: not one element of the tag {tag:#04x}")
    return elements[0][1]


def read_integer(content: bytes, what: str) -> int:
    """A non-negative INTEGER's content."""
    if not content or content[0] & 0x80 or len(content) > 8:
        raise EvidenceError("attest.malformed", f"{what}: not a small non-negative integer")
    return int.from_bytes(content, "big")


def _element(data: bytes, offset: int, what: str) -> tuple[int, bytes, int]:
    if offset + 2 > len(data):
        raise EvidenceError("attest.malformed", f"{what}: DER ends in a header")
    tag, length, offset = data[offset], data[offset + 1], offset + 2
    if length & 0x80:
        count = length & 0x7F
        if not 1 <= count <= 3 or offset + count > len(data):
            raise EvidenceError("attest.malformed", f"{what}: a length that DER does not have")
        length, offset = int.from_bytes(data[offset : offset + count], "big"), offset + count
    if offset + length > len(data):
        raise EvidenceError("attest.malformed", f"{what}: DER ends in a value")
    return tag, data[offset : offset + length], offset + length
