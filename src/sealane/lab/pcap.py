"""The TCP connections in a capture, put together again.

Ethernet with or without VLAN tags, raw IP, loopback and Linux "cooked" links; IPv4, and IPv6 with its extension headers. Segments
may come twice, late or in another order; one that is missing leaves a gap, which is counted and not filled. What is no such
capture, or holds more than is kept in memory, is `lab.capture`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from sealane.errors import EvidenceError
from sealane.lab.capturefile import map_capture, packets

Endpoint: TypeAlias = tuple[str, int]
# What is kept of one capture: payload, and what its administration takes. Joined, looked at and carved it takes some times that.
HELD_MAX: Final = 1 << 32
_SEGMENT_COST: Final = 200
CONVERSATIONS_MAX: Final = 1 << 16
# link type: bytes before the network layer, and where in them the protocol's number stands (None: there is none)
_LINKS: Final[dict[int, tuple[int, int | None]]] = {
    0: (4, None),  # BSD's loopback
    1: (14, 12),  # Ethernet
    12: (0, None),  # raw IP, as some systems number it
    14: (0, None),
    101: (0, None),
    108: (4, None),
    113: (16, 14),  # Linux cooked
    228: (0, None),
    229: (0, None),
    276: (20, 0),  # Linux cooked, version 2
}
_IP: Final = (0x0800, 0x86DD)
_VLAN: Final = (0x8100, 0x88A8, 0x9100)
_TAGS_MAX: Final = 4
_TCP: Final = 6
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS_MAX: Final = 8
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

    def add(self, segment: _Segment) -> int:
        """Take a segment; gives how much more is kept now, in bytes."""
        start = segment.sequence + segment.is_syn
        if self.highest is None:
            self.highest = start
        # the place nearest to the last one that fits the 32 bits
        place = self.highest + (start - self.highest + _WRAP // 2) % _WRAP - _WRAP // 2
        if not segment.payload:
            return 0
        self.highest = max(self.highest, place + len(segment.payload))
        known = self.pieces.get(place)
        if known is not None and len(segment.payload) <= len(known):
            return 0
        self.pieces[place] = (known or b"") + segment.payload[len(known or b"") :]
        return len(segment.payload) - len(known or b"") + (_SEGMENT_COST if known is None else 0)

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


@dataclass
class _Connection:
    """A conversation while its segments come. `opened` is the sequence number of the SYN that began it, where that was seen."""

    conversation: Conversation
    opened: int | None
    sides: dict[Endpoint, _Assembly]

    def is_over(self, segment: _Segment) -> bool:
        """Whether this segment begins another connection between the same ports."""
        is_opening = segment.is_syn and not segment.is_ack
        return is_opening and self.opened is not None and segment.sequence != self.opened

    def finish(self) -> Conversation:
        """All of it, joined."""
        self.conversation.forward = self.sides[self.conversation.client].finish()
        if self.conversation.server != self.conversation.client:  # nobody but a forger speaks to himself
            self.conversation.back = self.sides[self.conversation.server].finish()
        return self.conversation


def read_capture(path: Path, *, port: int | None = None) -> list[Conversation]:
    """The connections in a capture, in the order in which they began; those to `port` alone, where it is given.

    Raises EvidenceError `lab.capture`; a file that cannot be opened is that too.
    """
    return conversations(map_capture(path), port=port)


def conversations(capture: bytes | memoryview, *, port: int | None = None) -> list[Conversation]:
    """As `read_capture`, of the capture's bytes."""
    latest: dict[frozenset[Endpoint], _Connection] = {}
    found: list[_Connection] = []
    left = HELD_MAX
    for segment in _segments(memoryview(capture)):
        if port is not None and port not in (segment.source[1], segment.destination[1]):
            continue
        key = frozenset((segment.source, segment.destination))
        connection = latest.get(key)
        if connection is None or connection.is_over(segment):
            if len(found) >= CONVERSATIONS_MAX:
                raise EvidenceError("lab.capture", f"more than {CONVERSATIONS_MAX} connections; choose with --port")
            connection = latest[key] = _begin(segment)
            found.append(connection)
        if connection.opened is None and segment.is_syn and not segment.is_ack:
            connection.opened = segment.sequence
        left -= connection.sides[segment.source].add(segment)
        if left < 0:
            raise EvidenceError("lab.capture", f"more than {HELD_MAX >> 20} MiB were carried; choose with --port")
    return [connection.finish() for connection in found]


def _begin(segment: _Segment) -> _Connection:
    client, server = segment.source, segment.destination
    is_opening = segment.is_syn and not segment.is_ack
    if not is_opening and (segment.is_syn or client[1] < server[1]):
        client, server = server, client
    sides = {client: _Assembly(), server: _Assembly()}
    return _Connection(Conversation(client, server), segment.sequence if is_opening else None, sides)


def _segments(data: memoryview) -> Iterator[_Segment]:
    for link, packet in packets(data):
        if link not in _LINKS:
            raise EvidenceError("lab.capture", f"captures of link type {link} are not read here")
        network = _network_of(packet, *_LINKS[link])
        segment = _network(network) if network else None
        if segment is not None:
            yield segment


def _network_of(packet: memoryview, head: int, protocol_at: int | None) -> memoryview | None:
    """What a frame carries, if that is IP."""
    if protocol_at is None:
        return packet[head:]
    for _ in range(_TAGS_MAX):
        if len(packet) <= head:
            return None
        (protocol,) = struct.unpack_from(">H", packet, protocol_at)
        if protocol in _IP:
            return packet[head:]
        if protocol not in _VLAN or len(packet) < head + 4:
            return None
        protocol_at, head = head + 2, head + 4  # the tag: two bytes of its own, then the next protocol
    return None


def _network(packet: memoryview) -> _Segment | None:
    """The TCP segment of an IPv4 or IPv6 packet; None where it is another, a fragment, or cut."""
    version = packet[0] >> 4
    if version == 4 and len(packet) >= 20:
        total, fragment = struct.unpack_from(">2xH2xH", packet)
        head = (packet[0] & 15) * 4
        if packet[9] != _TCP or fragment & 0x3FFF or head < 20:
            return None
        names = [".".join(map(str, packet[start : start + 4])) for start in (12, 16)]
        return _transport(packet[head : total or len(packet)], *names)
    if version == 6 and len(packet) >= 40:
        (total,) = struct.unpack_from(">4xH", packet)
        begin = _behind_extensions(packet)
        if begin is None:
            return None
        names = [packet[start : start + 16].hex(":", 2) for start in (8, 24)]
        return _transport(packet[begin : 40 + total if total else len(packet)], *names)
    return None


def _behind_extensions(packet: memoryview) -> int | None:
    """Where TCP begins in an IPv6 packet (RFC 8200, 4); None where it does not."""
    following, at = packet[6], 40
    for _ in range(_EXTENSIONS_MAX):
        if following == _TCP:
            return at
        if len(packet) < at + 8:
            return None
        if following in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            size = (packet[at + 1] + 1) * 8
        elif following == _AUTHENTICATION:
            size = (packet[at + 1] + 2) * 4
        elif following == _FRAGMENT and not struct.unpack_from(">H", packet, at + 2)[0] & 0xFFF9:
            size = 8  # the only fragment there is
        else:
            return None
        following, at = packet[at], at + size
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
