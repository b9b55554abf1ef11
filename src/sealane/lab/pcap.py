"""Captures of tcpdump (pcap), and the TCP connections in them put together again.

Ethernet, raw IP and Linux "cooked" captures, IPv4 and IPv6, either byte order, micro- and nanoseconds. What is no such capture
is `lab.capture`. Memory is bounded by the captured payload: a segment that is missing from the capture leaves a gap, which is
counted and not filled.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from sealane.errors import EvidenceError

Endpoint: TypeAlias = tuple[str, int]
_MAGICS: Final = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\x4d\x3c\xb2\xa1": "<",
    b"\xa1\xb2\x3c\x4d": ">",
}
_PCAPNG: Final = b"\x0a\x0d\x0d\x0a"
# link type: bytes before the network layer, and where in them the protocol's number stands (None: there is none)
_LINKS: Final[dict[int, tuple[int, int | None]]] = {1: (14, 12), 101: (0, None), 113: (16, 14), 276: (20, 0)}
_RECORD: Final = 16
_TCP: Final = 6
_PACKET_MAX: Final = 1 << 20
_SYN, _ACK = 0x02, 0x10
_WRAP: Final = 1 << 32


@dataclass
class Flow:
    """One direction of one connection. `data` is its bytes; `gaps` counts places where the capture has none of them."""

    data: bytes = b""
    gaps: int = 0


@dataclass
class Conversation:
    """One TCP connection: who opened it, to whom, and what either said."""

    client: Endpoint
    server: Endpoint
    forward: Flow = field(default_factory=Flow)
    back: Flow = field(default_factory=Flow)


@dataclass
class _Segment:
    source: Endpoint
    destination: Endpoint
    sequence: int
    is_syn: bool
    is_ack: bool
    payload: bytes


@dataclass
class _Assembly:
    """The segments of one direction, by their place in it: the first copy of a byte counts."""

    highest: int | None = None
    pieces: dict[int, bytes] = field(default_factory=dict)

    def add(self, segment: _Segment) -> None:
        start = segment.sequence + segment.is_syn
        if self.highest is None:
            self.highest = start
        # the place nearest to the last one that fits the 32 bits
        place = self.highest + (start - self.highest + _WRAP // 2) % _WRAP - _WRAP // 2
        if segment.payload:
            known = self.pieces.get(place, b"")
            if len(segment.payload) > len(known):
                self.pieces[place] = known + segment.payload[len(known) :]
            self.highest = max(self.highest, place + len(segment.payload))

    def finish(self) -> Flow:
        joined, gaps, end = [], 0, None
        for place in sorted(self.pieces):
            piece = self.pieces[place]
            if end is None or place > end:
                gaps += end is not None
                joined.append(piece)
            elif place + len(piece) > end:
                joined.append(piece[end - place :])
            else:
                continue
            end = place + len(piece)
        return Flow(b"".join(joined), gaps)


def read_capture(path: Path, *, port: int | None = None) -> list[Conversation]:
    """The connections in a capture, in the order in which they began; those to `port` alone, where it is given.

    Raises EvidenceError `lab.capture`; a file that cannot be opened is that too.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise EvidenceError("lab.capture", f"{path}: {error}") from error
    return conversations(memoryview(data), port=port)  # the map goes with its last view


def conversations(capture: bytes | memoryview, *, port: int | None = None) -> list[Conversation]:
    """As `read_capture`, of the capture's bytes."""
    found: dict[frozenset[Endpoint], tuple[Conversation, dict[Endpoint, _Assembly]]] = {}
    for segment in _segments(memoryview(capture)):
        if port is not None and port not in (segment.source[1], segment.destination[1]):
            continue
        key = frozenset((segment.source, segment.destination))
        is_opening = segment.is_syn and not segment.is_ack
        if key not in found:
            client, server = segment.source, segment.destination
            if not is_opening and (segment.is_syn or client[1] < server[1]):
                client, server = server, client
            found[key] = (Conversation(client, server), {client: _Assembly(), server: _Assembly()})
        _, assemblies = found[key]
        assemblies.setdefault(segment.source, _Assembly()).add(segment)
    whole = []
    for conversation, assemblies in found.values():
        conversation.forward = assemblies[conversation.client].finish()
        conversation.back = assemblies[conversation.server].finish()
        whole.append(conversation)
    return whole


def _segments(data: memoryview) -> Iterator[_Segment]:
    order = _MAGICS.get(bytes(data[:4]))
    if order is None or len(data) < 24:
        kind = "pcapng; convert it with: tcpdump -r FILE -w FILE.pcap" if bytes(data[:4]) == _PCAPNG else "no capture"
        raise EvidenceError("lab.capture", f"these bytes are {kind}")
    link = struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF
    if link not in _LINKS:
        raise EvidenceError("lab.capture", f"captures of link type {link} are not read here")
    head, protocol_at = _LINKS[link]
    at = 24
    while at + _RECORD <= len(data):
        (length,) = struct.unpack_from(f"{order}I", data, at + 8)
        if length > _PACKET_MAX:
            raise EvidenceError("lab.capture", f"a packet of {length} bytes, at {at}")
        packet = data[at + _RECORD : at + _RECORD + length]  # the last one may be cut: tcpdump was killed
        at += _RECORD + length
        if len(packet) <= head:
            continue
        if protocol_at is not None:
            (protocol,) = struct.unpack_from(">H", packet, protocol_at)
            if protocol not in (0x0800, 0x86DD):
                continue
        segment = _network(packet[head:])
        if segment is not None:
            yield segment


def _network(packet: memoryview) -> _Segment | None:
    """The TCP segment of an IPv4 or IPv6 packet; None where it is another, a fragment, or cut."""
    version = packet[0] >> 4
    if version == 4 and len(packet) >= 20:
        (total,) = struct.unpack_from(">H", packet, 2)
        (fragment,) = struct.unpack_from(">H", packet, 6)
        head = (packet[0] & 15) * 4
        if packet[9] != _TCP or fragment & 0x3FFF or head < 20:
            return None
        names = [".".join(map(str, packet[start : start + 4])) for start in (12, 16)]
        return _transport(packet[head : total or len(packet)], *names)
    if version == 6 and len(packet) >= 40:
        (total,) = struct.unpack_from(">H", packet, 4)
        if packet[6] != _TCP:
            return None
        names = [packet[start : start + 16].hex(":", 2) for start in (8, 24)]
        return _transport(packet[40 : 40 + total if total else len(packet)], *names)
    return None


def _transport(segment: memoryview, source: str, destination: str) -> _Segment | None:
    if len(segment) < 20:
        return None
    source_port, destination_port, sequence = struct.unpack_from(">HHI", segment)
    head = (segment[12] >> 4) * 4
    if head < 20 or head > len(segment):
        return None
    flags = segment[13]
    return _Segment(
        (source, source_port),
        (destination, destination_port),
        sequence,
        bool(flags & _SYN),
        bool(flags & _ACK),
        bytes(segment[head:]),
    )
