"""Reading untrusted bytes: bounded, without copies that grow, and with one error."""

import hashlib
import json
from collections import Counter
from typing import Any, Final, Literal, TypeAlias

from sealane.errors import EvidenceError
from sealane.limits import MIB

# A boot log is some 50 KiB and at most 64 KiB by most firmware's own bound; an IMA log of a busy host with every file of
# a distribution measured is some 10 MiB. Quotes and reports have at most 16 KiB.
EVIDENCE_BYTES_MAX: Final = 64 * MIB
JSON_BYTES_MAX: Final = 4 * MIB

ByteOrder: TypeAlias = Literal["little", "big"]


class Reader:
    """Takes fields from the front of `data`; raises EvidenceError `attest.malformed` past its end."""

    def __init__(self, data: bytes, what: str, order: ByteOrder = "little") -> None:
        if len(data) > EVIDENCE_BYTES_MAX:
            raise EvidenceError("attest.too-large", f"{what}: {len(data)} bytes")
        self.data = data
        self.what = what
        self.order: ByteOrder = order
        self.offset = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self.data) - self.offset

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise self.malformed(f"{count} bytes are wanted and {self.left} are left")
        part = self.data[self.offset : self.offset + count]
        self.offset += count
        return part

    def number(self, size: int) -> int:
        """The next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), self.order)

    def counted(self, size: int, maximum: int) -> bytes:
        """Bytes with their count of `size` bytes in front, at most `maximum`."""
        count = self.number(size)
        if count > maximum:
            raise self.malformed(f"a count of {count} where at most {maximum} can be")
        return self.take(count)

    def malformed(self, why: str) -> EvidenceError:
        """The error that says where and why."""
        return EvidenceError("attest.malformed", f"{self.what}, at byte {self.offset}: {why}")


def parse_json(text: str, what: str) -> Any:
    """Strict JSON: no key twice, no NaN, bounded; raises EvidenceError `attest.malformed`."""
    if len(text) > JSON_BYTES_MAX:
        raise EvidenceError("attest.too-large", f"{what}: {len(text)} characters")
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        if "\\u" in text:  # half a character, which no other text can hold (RFC 8259, 8.2)
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise EvidenceError("attest.malformed", f"{what}: {error}") from error
    return value


def decode_text(data: bytes, what: str) -> str:
    """UTF-8; raises EvidenceError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise EvidenceError("attest.malformed", f"{what}: not UTF-8 at byte {error.start}, line {line}") from error


def parse_hex(text: object, what: str, size: int | None = None) -> bytes:
    """Hexadecimal digits, of `size` bytes; raises EvidenceError."""
    if not isinstance(text, str):
        raise EvidenceError("attest.malformed", f"{what}: not a text")
    try:
        value = bytes.fromhex(text)
    except ValueError as error:
        raise EvidenceError("attest.malformed", f"{what}: not hexadecimal") from error
    if size is not None and len(value) != size:
        raise EvidenceError("attest.malformed", f"{what}: {len(value)} bytes, not {size}")
    return value


def describe(data: bytes) -> str:
    """Length and digest prefix, for a `repr` that shows no content."""
    return f"<{len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}>"


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {max(counts, key=counts.__getitem__)[:100]!r} stands twice in an object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
