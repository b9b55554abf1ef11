"""Linux's runtime measurement log (IMA): the ASCII and the binary form, templates ima, ima-ng, ima-sig, ima-buf, and of the first
two of the latter the second version, which also says whether a digest is the file's or fs-verity's.

A line is `PCR template-digest template fields…`. The template digest is over the encoded fields; every bank of the TPM is
extended with that bank's digest over the same fields (kernels from 5.8 on), or with the SHA-1 digest padded with zeros.
A digest of zeros stands for a violation: the file was open for writing while it was measured, and ones are extended.
"""

import hashlib
import re
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from sealane.attest.reading import Reader, decode_text, parse_hex
from sealane.errors import EvidenceError

ENTRIES_MAX: Final = 2_000_000
NAME_BYTES_MAX: Final = 4096 + 256  # PATH_MAX, and what the kernel puts around it
FIELD_BYTES_MAX: Final = 1024 * 1024
TEMPLATES: Final = {"ima": 2, "ima-ng": 2, "ima-sig": 3, "ima-buf": 3, "ima-ngv2": 2, "ima-sigv2": 3}
_OF_THE_FILE: Final = "ima:"  # in front of the algorithm, in the second version
_DIGESTS: Final = {20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}
_PCRS: Final = range(8, 15)  # CONFIG_IMA_MEASURE_PCR_IDX; those below are the firmware's
_IMA_NAME_BYTES: Final = 256  # IMA_EVENT_NAME_LEN_MAX and its NUL, in the template `ima`
_LINE: Final = re.compile(rb"^\s*\d{1,2} [0-9a-f]{40,128} (ima|ima-ng|ima-sig|ima-buf|ima-ngv2|ima-sigv2) ")
_NAME_STARTS: Final = tuple(4 + size + 4 for size in _DIGESTS)  # where a binary log has the first template's name


@dataclass(frozen=True, slots=True)
class ImaEntry:
    """One measurement. `encoded` is what the template digest covers."""

    pcr: int
    template: str
    template_digest: bytes
    algorithm: str
    file_digest: bytes
    name: str
    encoded: bytes = field(repr=False)

    @property
    def violation(self) -> bool:
        """Whether the kernel recorded that it could not measure."""
        return not any(self.template_digest)

    @property
    def consistent(self) -> bool:
        """Whether the template digest is that of the fields (a violation has none)."""
        if self.violation:
            return True
        return hashlib.new(_DIGESTS[len(self.template_digest)], self.encoded).digest() == self.template_digest

    @property
    def label(self) -> str:
        """The file's digest as reference values have it: `sha256:…`, or `verity:sha256:…`."""
        return f"{self.algorithm.removeprefix(_OF_THE_FILE)}:{self.file_digest.hex()}"

    @property
    def hash_name(self) -> str:
        """The hash alone."""
        return self.algorithm.rpartition(":")[2]

    def extended(self, algorithm: str, *, padded: bool) -> bytes:
        """What this entry extends the bank `algorithm` with."""
        size = hashlib.new(algorithm).digest_size
        if self.violation:
            return b"\xff" * size
        if padded:
            return hashlib.sha1(self.encoded, usedforsecurity=False).digest().ljust(size, b"\0")[:size]
        return hashlib.new(algorithm, self.encoded).digest()


@dataclass(frozen=True)
class ImaLog:
    """A parsed log."""

    entries: tuple[ImaEntry, ...] = field(repr=False)

    @cached_property
    def boot_aggregate(self) -> ImaEntry | None:
        """The first entry, where it is the digest over PCRs 0 to 7 or 0 to 9."""
        first = self.entries[0] if self.entries else None
        return first if first is not None and first.name == "boot_aggregate" else None

    def replay(self, algorithm: str, *, padded: bool = False) -> list[bytes]:
        """The PCR's value before the first entry and after each one."""
        size = hashlib.new(algorithm).digest_size
        values = [bytes(size)]
        for entry in self.entries:
            step = entry.extended(algorithm, padded=padded)
            values.append(hashlib.new(algorithm, values[-1] + step).digest())
        return values


def looks_like_ima(data: bytes) -> bool:
    """Whether the beginning is that of an IMA log in one of its two forms."""
    return bool(_LINE.match(data[:512])) or _looks_binary(data)


def parse_ima_log(data: bytes) -> ImaLog:
    """Read untrusted bytes, either form; raises EvidenceError `attest.malformed`."""
    entries = _parse_binary(data) if _looks_binary(data) else _parse_ascii(data)
    if len({entry.pcr for entry in entries}) > 1:
        raise EvidenceError("attest.malformed", "IMA log: entries of several PCRs")
    return ImaLog(tuple(entries))


def _looks_binary(data: bytes) -> bool:
    return int.from_bytes(data[:4], "little") < 24 and _digest_size(data) is not None


def _digest_size(data: bytes) -> int | None:
    """How long the template digests of a binary log are: SHA-1, or those of the bank whose log it is (Linux 6.10)."""
    names = {name.encode() for name in TEMPLATES}
    for start in _NAME_STARTS:
        size = int.from_bytes(data[start - 4 : start], "little")
        if 3 <= size <= 9 and data[start : start + size] in names:
            return start - 8
    return None


def _parse_ascii(data: bytes) -> list[ImaEntry]:
    entries = []
    lines = decode_text(data, "IMA log").split("\n")
    if len(lines) > ENTRIES_MAX:
        raise EvidenceError("attest.too-large", f"IMA log: {len(lines)} lines")
    for number, line in enumerate(lines, 1):
        if line:
            entries.append(_parse_line(line, f"IMA log, line {number}"))
    return entries


def _parse_line(line: str, what: str) -> ImaEntry:
    parts = line.split(" ")
    if len(parts) < 5 or parts[2] not in TEMPLATES or not parts[0].isascii() or not parts[0].isdigit():
        raise EvidenceError("attest.malformed", f"{what}: not a measurement of a template that is known")
    pcr, template = int(parts[0][:4]), parts[2]
    digest = parse_hex(parts[1], what)
    if template == "ima":
        return _entry(pcr, template, digest, ("sha1", parse_hex(parts[3], what, 20)), " ".join(parts[4:]), None, what)
    algorithm, colon, value = parts[3].rpartition(":")
    if not colon:
        raise EvidenceError("attest.malformed", f"{what}: a file digest without its algorithm")
    third = None
    if TEMPLATES[template] == 3:
        third = parse_hex(parts[5] if len(parts) > 5 else "", what)
        if len(parts) > 6 and any(parts[6:]):
            raise EvidenceError("attest.malformed", f"{what}: more fields than the template has")
    elif len(parts) > 5:
        raise EvidenceError("attest.malformed", f"{what}: more fields than the template has")
    return _entry(pcr, template, digest, (algorithm, parse_hex(value, what)), parts[4], third, what)


def _entry(
    pcr: int,
    template: str,
    digest: bytes,
    measured: tuple[str, bytes],
    name: str,
    third: bytes | None,
    what: str,
) -> ImaEntry:
    algorithm, file_digest = measured
    raw_name = name.encode()
    if pcr not in _PCRS or len(digest) not in _DIGESTS or len(raw_name) > NAME_BYTES_MAX or len(algorithm) > 32:
        raise EvidenceError("attest.malformed", f"{what}: PCR, digest or name cannot be")
    if template == "ima":
        if len(raw_name) >= _IMA_NAME_BYTES:
            raise EvidenceError("attest.malformed", f"{what}: a name of {len(raw_name)} bytes")
        encoded = file_digest + raw_name.ljust(_IMA_NAME_BYTES, b"\0")
    else:
        fields = [algorithm.encode() + b":\0" + file_digest, raw_name + b"\0"]
        if third is not None:
            fields.append(third)
        encoded = b"".join(struct.pack("<I", len(one)) + one for one in fields)
    return ImaEntry(pcr, template, digest, algorithm, file_digest, name, encoded)


def _parse_binary(data: bytes) -> list[ImaEntry]:
    reader = Reader(data, "IMA log")
    digest_size = _digest_size(data) or 20
    entries: list[ImaEntry] = []
    while reader.left:
        if len(entries) >= ENTRIES_MAX:
            raise EvidenceError("attest.too-large", f"IMA log: more than {ENTRIES_MAX} entries")
        entries.append(_binary_entry(reader, digest_size))
    return entries


def _binary_entry(reader: Reader, digest_size: int) -> ImaEntry:
    pcr, digest = reader.number(4), reader.take(digest_size)
    template = reader.counted(4, 16).decode("ascii", "replace")
    if template not in TEMPLATES:
        raise reader.malformed("a template that is not known")
    what = f"IMA log, at byte {reader.offset}"
    if template == "ima":
        file_digest = reader.take(20)
        raw = reader.counted(4, _IMA_NAME_BYTES)
        return _entry(pcr, template, digest, ("sha1", file_digest), _name(raw, reader), None, what)
    fields = Reader(reader.counted(4, FIELD_BYTES_MAX), "IMA template data")
    measured, raw = fields.counted(4, 256), fields.counted(4, NAME_BYTES_MAX + 1)
    third = fields.counted(4, FIELD_BYTES_MAX) if TEMPLATES[template] == 3 else None
    algorithm, colon, file_digest = measured.partition(b":\0")
    if fields.left or not colon or not raw.endswith(b"\0"):
        raise reader.malformed("template data that does not fit its template")
    names = (algorithm.decode("ascii", "replace"), file_digest)
    return _entry(pcr, template, digest, names, _name(raw[:-1], reader), third, what)


def _name(raw: bytes, reader: Reader) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise reader.malformed("a name that is not UTF-8") from error
