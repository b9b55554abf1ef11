"""The firmware's event log (TCG PC Client Platform Firmware Profile, section 10), little-endian, and its replay.

    first event (SHA-1 form)                          every further one (crypto agile)
    +-----+------+---------+------+-----------------+ +-----+------+-------+-----------------+------+-------+
    | pcr | type | SHA-1   | size | Spec ID Event03 | | pcr | type | count | (alg, digest) … | size | event |
    | 4   | 4    | 20      | 4    | or an event     | | 4   | 4    | 4     | 2 + its length  | 4    |       |
    +-----+------+---------+------+-----------------+ +-----+------+-------+-----------------+------+-------+

Without a Spec ID event all events have the SHA-1 form. Digests are believed only as far as the replay gives the quoted
PCRs; event data only as far as it hashes to its digest.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sealane.attest.reading import Reader
from sealane.errors import EvidenceError

ALGORITHMS: Final = {0x0004: ("sha1", 20), 0x000B: ("sha256", 32), 0x000C: ("sha384", 48), 0x000D: ("sha512", 64)}
ALGORITHM_SM3: Final = 0x0012
EVENTS_MAX: Final = 65536
EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
PCRS: Final = 24

EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EV_ACTION: Final = 0x05
EV_S_CRTM_VERSION: Final = 0x08
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_GPT_EVENT: Final = 0x80000006
EV_EFI_ACTION: Final = 0x80000007
# Types whose digest is the digest of the event data, as the profile has it without exceptions in the field.
_DATA_IS_MEASURED: Final = {
    EV_SEPARATOR,
    EV_ACTION,
    EV_S_CRTM_VERSION,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EFI_GPT_EVENT,
    EV_EFI_ACTION,
}
# The types that the profile and its predecessors (TCG 1.2) define.
_LAST_EVENT: Final = 0x14
_FIRST_EFI_EVENT: Final = 0x80000001
_LAST_EFI_EVENT: Final = 0x800000E7
# What firmware writes as the PCR of some events that extend nothing.
_NO_PCR: Final = 0xFFFFFFFF
_SPEC_ID: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"


@dataclass(frozen=True)
class Event:
    """One event: its digests by algorithm name."""

    pcr: int
    type: int
    digests: Mapping[str, bytes]
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class EventLog:
    """A parsed log. `algorithms` are the banks that every event extends."""

    events: tuple[Event, ...] = field(repr=False)
    algorithms: tuple[str, ...]
    startup_locality: int

    @property
    def legacy(self) -> bool:
        """Whether it knows SHA-1 only."""
        return set(self.algorithms) <= {"sha1"}

    def replay(self, algorithm: str) -> dict[int, bytes]:
        """PCR values after all events, for the PCRs that an event extended; KeyError for another algorithm."""
        if algorithm not in self.algorithms:
            raise KeyError(algorithm)
        size = hashlib.new(algorithm).digest_size
        values: dict[int, bytes] = {}
        for event in self.events:
            if event.type == EV_NO_ACTION:
                continue
            start = bytes(size - 1) + bytes([self.startup_locality if event.pcr == 0 else 0])
            before = values.get(event.pcr, b"\xff" * size if 17 <= event.pcr <= 22 else start)
            values[event.pcr] = hashlib.new(algorithm, before + event.digests[algorithm]).digest()
        return values

    def unproved_data(self) -> list[Event]:
        """Events whose data does not hash to their digest, of the types where it has to."""
        return [event for event in self.events if event.type in _DATA_IS_MEASURED and not _data_fits(event)]

    def secure_boot(self) -> bool | None:
        """The variable SecureBoot as it was measured; None where the log does not tell."""
        for event in self.events:
            if event.type == EV_EFI_VARIABLE_DRIVER_CONFIG and event.pcr == 7:
                name, value = _variable(event.data)
                if name == "SecureBoot":
                    return value == b"\x01"
        return None


def looks_like_event_log(data: bytes) -> bool:
    """Whether the first event is one that a log begins with."""
    if len(data) < 32:
        return False
    pcr, kind = struct.unpack_from("<II", data)
    size = int.from_bytes(data[28:32], "little")
    if data[32:48] == _SPEC_ID and pcr == 0 and kind == EV_NO_ACTION:
        return True
    known = kind <= _LAST_EVENT or _FIRST_EFI_EVENT <= kind <= _LAST_EFI_EVENT
    return pcr < PCRS and known and size <= len(data) - 32 and not data.startswith(bytes(16))


def parse_event_log(data: bytes) -> EventLog:
    """Read untrusted bytes; raises EvidenceError `attest.malformed`, also where the log ends within an event.

    Padding of zeros or ones (ACPI tables have it) ends a log.
    """
    reader = Reader(data, "event log")
    events: list[Event] = []
    first = _legacy_event(reader)
    sizes: dict[int, tuple[str, int]] = {0x0004: ALGORITHMS[0x0004]}
    agile = first.type == EV_NO_ACTION and first.data.startswith(_SPEC_ID)
    if agile:
        sizes = _spec_id(first.data)
    else:
        events.append(first)
    while reader.left and not _padding(reader):
        if len(events) >= EVENTS_MAX:
            raise reader.malformed(f"more than {EVENTS_MAX} events")
        events.append(_agile_event(reader, sizes) if agile else _legacy_event(reader))
    algorithms = tuple(name for name, _ in sizes.values() if name in {known for known, _ in ALGORITHMS.values()})
    return EventLog(tuple(events), algorithms, _startup_locality(events))


def _legacy_event(reader: Reader) -> Event:
    pcr, kind = _head(reader)
    digest = reader.take(20)
    return Event(pcr, kind, {"sha1": digest}, reader.counted(4, EVENT_BYTES_MAX))


def _agile_event(reader: Reader, sizes: Mapping[int, tuple[str, int]]) -> Event:
    pcr, kind = _head(reader)
    if reader.number(4) != len(sizes):
        raise reader.malformed("an event does not have one digest for each algorithm of the log")
    digests: dict[str, bytes] = {}
    for _ in sizes:
        algorithm = reader.number(2)
        if algorithm not in sizes or sizes[algorithm][0] in digests:
            raise reader.malformed(f"a digest of the algorithm {algorithm:#06x}, unlisted or twice")
        name, size = sizes[algorithm]
        digests[name] = reader.take(size)
    return Event(pcr, kind, digests, reader.counted(4, EVENT_BYTES_MAX))


def _head(reader: Reader) -> tuple[int, int]:
    pcr, kind = reader.number(4), reader.number(4)
    if pcr >= PCRS and (pcr, kind) != (_NO_PCR, EV_NO_ACTION):
        raise reader.malformed(f"there is no PCR {pcr}")
    return pcr, kind


def _spec_id(data: bytes) -> dict[int, tuple[str, int]]:
    """TCG_EfiSpecIDEvent: which algorithms every digest list has, and how long their digests are."""
    reader = Reader(data, "Spec ID event")
    reader.take(24)  # signature 16, platform class 4, version minor, major, errata, size of UINTN
    count = reader.number(4)
    if not 1 <= count <= 8:
        raise reader.malformed(f"{count} algorithms")
    sizes: dict[int, tuple[str, int]] = {}
    for _ in range(count):
        algorithm, size = reader.number(2), reader.number(2)
        known = ALGORITHMS.get(algorithm)
        if algorithm in sizes or (known is not None and known[1] != size) or not 1 <= size <= 64:
            raise reader.malformed(f"the algorithm {algorithm:#06x} with digests of {size} bytes")
        sizes[algorithm] = known or (f"alg-{algorithm:04x}", size)
    reader.counted(1, 255)
    return sizes


def _padding(reader: Reader) -> bool:
    head = reader.data[reader.offset : reader.offset + 8]
    if len(set(head)) != 1 or head[0] not in {0, 0xFF}:
        return False  # PCR 0 and type 0 is no event, so that only a real end looks at all the rest
    return not reader.data[reader.offset :].strip(head[:1])


def _startup_locality(events: list[Event]) -> int:
    found = [event.data for event in events if event.type == EV_NO_ACTION and event.data.startswith(_STARTUP_LOCALITY)]
    if not found:
        return 0
    if len(found) > 1 or len(found[0]) != 17 or found[0][16] not in {0, 3, 4}:
        raise EvidenceError("attest.malformed", "event log: StartupLocality twice, or of no locality that can be")
    return found[0][16]


def _data_fits(event: Event) -> bool:
    """A separator may also stand for an error: its digest is then that of 1 (PFP, 3.3.2.2)."""
    known = {name: digest for name, digest in event.digests.items() if name in hashlib.algorithms_available}
    return all(hashlib.new(name, event.data).digest() == digest for name, digest in known.items())


def _variable(data: bytes) -> tuple[str, bytes]:
    """UEFI_VARIABLE_DATA: GUID 16, name length 8 (in characters), data length 8, name, data."""
    if len(data) < 32:
        return "", b""
    characters, size = struct.unpack_from("<QQ", data, 16)
    end = 32 + 2 * characters
    if characters > 1024 or size > len(data) - min(end, len(data)):
        return "", b""
    return data[32:end].decode("utf-16-le", "replace"), data[end : end + size]
