"""Capture files as tcpdump and Wireshark write them: pcap in either byte order, micro- and nanoseconds, and pcapng.

What a file says of its own lengths is checked before it is used; what is no capture is `lab.capture`. A file whose end is cut,
as a killed tcpdump leaves it, gives what is whole.
"""

import mmap
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sealane.errors import EvidenceError

PACKET_MAX: Final = 1 << 20
INTERFACES_MAX: Final = 1 << 12
_MAGICS: Final = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\x4d\x3c\xb2\xa1": "<",
    b"\xa1\xb2\x3c\x4d": ">",
}
_HEAD, _RECORD = 24, 16
# pcapng: a section's beginning (its type reads the same in both orders), an interface, and what holds packets
_SECTION: Final = 0x0A0D0D0A
_INTERFACE, _OLD_PACKET, _SIMPLE, _PACKET = 1, 2, 3, 6
_ORDERS: Final = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_BLOCK_MAX: Final = PACKET_MAX + (1 << 16)  # a packet, and the options that may stand behind it
_NETWORKS: Final = Path("/sys/class/net")


def map_capture(path: Path) -> memoryview:
    """The bytes of a capture, read from the file as they are wanted. Raises `lab.capture` for what is no regular file."""
    try:
        # looked at first: to open a pipe is to wait for whoever writes into it
        if not stat.S_ISREG(path.stat().st_mode):
            raise EvidenceError("lab.capture", f"{path}: no regular file")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # the map goes with its last view
    except FileNotFoundError as error:
        if path.name == str(path) and (_NETWORKS / path).exists():
            raise EvidenceError(
                "lab.capture", f"{path} is a network interface, and the lab attaches to none: it reads capture files"
            ) from error
        raise EvidenceError("lab.capture", f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise EvidenceError("lab.capture", f"{path}: {getattr(error, 'strerror', None) or error}") from error


def packets(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Each packet with its link type (tcpdump.org/linktypes.html). Raises `lab.capture`."""
    magic = bytes(data[:4])
    if magic in _MAGICS and len(data) >= _HEAD:
        yield from _pcap(data, _MAGICS[magic])
    elif magic == struct.pack("<I", _SECTION):
        yield from _pcapng(data)
    else:
        raise EvidenceError("lab.capture", "these bytes are no capture: neither pcap nor pcapng")


def _pcap(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    link = struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF
    record = struct.Struct(f"{order}8xII")
    at = _HEAD
    while at + _RECORD <= len(data):
        length, on_the_wire = record.unpack_from(data, at)
        # none at all: a hole in the file, which may be as large as it likes
        if length > PACKET_MAX or not on_the_wire:
            raise EvidenceError("lab.capture", f"a packet of {length if on_the_wire else 0} bytes, at {at}")
        yield link, data[at + _RECORD : at + _RECORD + length]  # the last one may be cut
        at += _RECORD + length


def _pcapng(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Blocks: type, length, body, length again (draft-ietf-opsawg-pcapng)."""
    at, order = 0, ""
    interfaces: list[tuple[int, int]] = []
    while at + 12 <= len(data):
        if bytes(data[at : at + 4]) == struct.pack("<I", _SECTION):
            order, interfaces = _ORDERS.get(bytes(data[at + 8 : at + 12]), ""), []
            if not order:
                raise EvidenceError("lab.capture", f"a pcapng section of no byte order, at {at}")
        kind, length = struct.unpack_from(f"{order}II", data, at)
        if not 12 <= length <= _BLOCK_MAX or length % 4:
            raise EvidenceError("lab.capture", f"a pcapng block of {length} bytes, at {at}")
        body = data[at + 8 : at + length - 4]
        if at + length > len(data):
            return  # cut
        if kind == _INTERFACE and len(body) >= 8:
            if len(interfaces) >= INTERFACES_MAX:
                raise EvidenceError("lab.capture", f"more than {INTERFACES_MAX} interfaces in a pcapng section")
            interfaces.append(struct.unpack_from(f"{order}H2xI", body))
        elif kind in (_PACKET, _OLD_PACKET, _SIMPLE):
            found = _packet_of(kind, body, order, interfaces)
            if found is None:
                raise EvidenceError("lab.capture", f"a pcapng packet that does not fit its block, at {at}")
            yield found
        at += length


def _packet_of(
    kind: int, body: memoryview, order: str, interfaces: list[tuple[int, int]]
) -> tuple[int, memoryview] | None:
    """Link type and bytes; None where the block says what cannot be."""
    if kind == _SIMPLE:
        if len(body) < 4 or not interfaces:
            return None
        link, snap = interfaces[0]
        (length,) = struct.unpack_from(f"{order}I", body)
        return link, body[4 : 4 + min(length, snap or length, len(body) - 4)]
    if len(body) < 20:
        return None
    (number,) = struct.unpack_from(f"{order}{'I' if kind == _PACKET else 'H'}", body)
    (length,) = struct.unpack_from(f"{order}I", body, 12)
    if number >= len(interfaces) or length > len(body) - 20:
        return None
    return interfaces[number][0], body[20 : 20 + length]
