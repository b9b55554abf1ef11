"""Sealane's own measurement log: what takes part in a migration, as the quoting process measured it, and its replay.

One line a batch, each a JSON array of entries; a PCR is extended with SHA-256 over the line, without its line feed:

    [{"digest":"sha256:…","name":"/usr/bin/qemu-system-x86_64","what":"qemu"}, …]

| what | name | digest |
| --- | --- | --- |
| enclave | a file that enclaves load, relative to where its library lies | of the file |
| enclave-manifest | - | over all `enclave` entries of the same line, see `manifest_digest` |
| qemu, libvirt | the path | of the file |
| module | a kernel module in use | of its build id, where the kernel tells it |
| kernel, command-line, iommu, smt | the text itself | of the text |

Digests are believed only as far as the replay gives the quoted PCR; a text only as far as it hashes to its digest.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sealane.attest.reading import decode_text, parse_json
from sealane.errors import EvidenceError

WHATS: Final = (
    "enclave", "enclave-manifest", "qemu", "libvirt", "module", "kernel", "command-line", "iommu", "smt",
)  # fmt: skip
TEXTS: Final = frozenset({"kernel", "command-line", "iommu", "smt"})
_LINES_MAX: Final = 4096
_ENTRIES_MAX: Final = 65536
_NAME_MAX: Final = 4096
_PREFIX: Final = "sha256:"
_START: Final = b'[{"digest":"sha256:'


@dataclass(frozen=True)
class Measured:
    """One thing that was measured. `digest` is `sha256:` and 64 hexadecimal digits."""

    what: str
    name: str
    digest: str

    def as_dict(self) -> dict[str, str]:
        """As the log has it."""
        return {"digest": self.digest, "name": self.name, "what": self.what}


@dataclass(frozen=True)
class PlatformLog:
    """A parsed log: its lines as they were extended, and the entries of each."""

    lines: tuple[bytes, ...] = field(repr=False)
    batches: tuple[tuple[Measured, ...], ...] = field(repr=False)

    @property
    def entries(self) -> tuple[Measured, ...]:
        """All entries."""
        return tuple(one for batch in self.batches for one in batch)

    def replay(self, algorithm: str) -> bytes:
        """The PCR after all lines, from zeros; the bank `algorithm` is extended with its own digest of each line."""
        value = bytes(hashlib.new(algorithm).digest_size)
        for line in self.lines:
            value = hashlib.new(algorithm, value + hashlib.new(algorithm, line).digest()).digest()
        return value

    def digests(self, what: str) -> set[str]:
        """All digests of this kind."""
        return {entry.digest for entry in self.entries if entry.what == what}

    def false_entries(self) -> list[Measured]:
        """Texts that do not hash to their digest, and manifests that are not over the entries beside them."""
        false = [one for one in self.entries if one.what in TEXTS and one.digest != digest_of(one.name.encode())]
        for batch in self.batches:
            digest = manifest_digest(batch)
            false += [one for one in batch if one.what == "enclave-manifest" and one.digest != digest]
        return false


def digest_of(content: bytes) -> str:
    """`sha256:` and the digest."""
    return _PREFIX + hashlib.sha256(content).hexdigest()


def manifest_digest(entries: Iterable[Measured]) -> str:
    """One digest for all that enclaves load: over lines `digest name`, in the order of their bytes."""
    lines = sorted({f"{one.digest} {one.name}\n" for one in entries if one.what == "enclave"})
    return digest_of("".join(lines).encode())


def encode_line(entries: Sequence[Measured]) -> bytes:
    """One line of the log, without its line feed."""
    return json.dumps([one.as_dict() for one in entries], sort_keys=True, separators=(",", ":")).encode()


def looks_like_platform_log(data: bytes) -> bool:
    """Whether the first line begins as one of this log does."""
    return data.startswith(_START)


def parse_platform_log(data: bytes) -> PlatformLog:
    """Read untrusted bytes; raises EvidenceError `attest.malformed`."""
    lines = data.split(b"\n")
    if lines[-1] != b"" or len(lines) > _LINES_MAX:
        raise EvidenceError("attest.malformed", "platform log: it does not end with a line feed, or has too many lines")
    batches: list[tuple[Measured, ...]] = []
    for number, line in enumerate(lines[:-1], 1):
        batches.append(tuple(_parse_line(line, f"platform log, line {number}")))
        if sum(map(len, batches)) > _ENTRIES_MAX:
            raise EvidenceError("attest.too-large", f"platform log: more than {_ENTRIES_MAX} entries")
    return PlatformLog(tuple(lines[:-1]), tuple(batches))


def _parse_line(line: bytes, what: str) -> list[Measured]:
    value = parse_json(decode_text(line, what), what)
    if not isinstance(value, list) or not value:
        raise EvidenceError("attest.malformed", f"{what}: not a list of measurements")
    return [_entry(one, what) for one in value]


def _entry(value: Any, what: str) -> Measured:
    if not isinstance(value, dict) or set(value) != {"digest", "name", "what"}:
        raise EvidenceError("attest.malformed", f"{what}: not a measurement")
    if not all(isinstance(text, str) for text in value.values()):
        raise EvidenceError("attest.malformed", f"{what}: not a measurement")
    entry = Measured(**value)
    if entry.what not in WHATS or len(entry.name) > _NAME_MAX:
        raise EvidenceError("attest.malformed", f"{what}: a measurement that cannot be")
    digits = entry.digest.removeprefix(_PREFIX)
    if not entry.digest.startswith(_PREFIX) or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise EvidenceError("attest.malformed", f"{what}: a digest that is none")
    return entry
