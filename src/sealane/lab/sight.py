"""What captured connections are, and which pages of guest memory stand in them in clear or encoded.

Of a Sealane lane only the outside is read, as docs/protocol.md draws it: the preface, the records' heads, and the open part of
marked records. Keys, tags and ciphertext mean nothing here.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from sealane.errors import WireError
from sealane.lab.pcap import Conversation
from sealane.wire import MultifdReader, RamRebuild, StreamReader, iterate_events
from sealane.wire.core import Buffer
from sealane.wire.events import Event
from sealane.wire.order import in_order

PAGE_BYTES: Final = 4096
Pages: TypeAlias = NDArray[np.uint8]
_PREFACE_BYTES: Final = 32
_LANE: Final = 2
_RECORD: Final = struct.Struct(">BBHIQ8s")
_TAG_BYTES: Final = 16
_RECORD_MAX: Final = 1 << 19
_MARKED, _MARKED_ZSTD = 2, 3
_OPENS_MAX: Final = 520_192  # what a compressed part may open to
_CLEAR, _CODED = 0, 1
_KINDS: Final = {1: "Sealane channel (TLS)", 2: "Sealane lane", 3: "Sealane pairing"}
_FEED_BYTES: Final = 1 << 20


@dataclass
class Lane:
    """The outside of one direction of a lane: pages (n, 4096) in clear and encoded, and how many bytes were sealed."""

    records: int = 0
    sealed_bytes: int = 0
    clear: list[Pages] = field(default_factory=list)
    coded: list[Pages] = field(default_factory=list)
    why_not: str = ""


@dataclass
class Sight:
    """All that a capture shows of a migration. `memory` is guest memory by RAM block, where the stream was QEMU's own."""

    kinds: list[tuple[str, int]] = field(default_factory=list)
    memory: dict[str, Pages] = field(default_factory=dict)
    lanes: list[Lane] = field(default_factory=list)
    flows: list[bytes] = field(default_factory=list)
    gaps: int = 0
    problem: str = ""

    @property
    def clear(self) -> Pages:
        """Pages that stand in lanes as they are."""
        return _joined([page for lane in self.lanes for page in lane.clear])

    @property
    def coded(self) -> Pages:
        """Pages that a codec encoded, lane by lane in their order."""
        return _joined([page for lane in self.lanes for page in lane.coded])

    @property
    def total_bytes(self) -> int:
        """What all connections carried."""
        return sum(map(len, self.flows))


def _joined(parts: Sequence[Pages]) -> Pages:
    return np.concatenate(parts) if parts else np.empty((0, PAGE_BYTES), np.uint8)


def kind_of(first: bytes) -> str:
    """What a connection is, by what its client says first."""
    if first.startswith(b"sealane") and len(first) >= _PREFACE_BYTES:
        return _KINDS.get(first[8], "Sealane, of an unknown kind")
    if first.startswith(b"QEVM"):
        return "QEMU main channel, in clear"
    if first.startswith(b"\x11\x22\x33\x44"):
        return "QEMU multifd channel, in clear"
    if first[:2] == b"\x16\x03":
        return "TLS"
    return "unknown" if first else "silent"


def look(conversations: Sequence[Conversation]) -> Sight:
    """Everything that can be read without a key."""
    sight = Sight()
    for conversation in conversations:
        forward, back = conversation.forward, conversation.back
        sight.kinds.append((kind_of(forward.data[:_PREFACE_BYTES]), len(forward.data) + len(back.data)))
        sight.flows += [flow.data for flow in (forward, back) if flow.data]
        sight.gaps += forward.gaps + back.gaps
        if forward.data.startswith(b"sealane") and len(forward.data) > _PREFACE_BYTES and forward.data[8] == _LANE:
            sight.lanes.append(read_lane(memoryview(forward.data)[_PREFACE_BYTES:]))
    sight.memory, sight.problem = _rebuild([conversation.forward.data for conversation in conversations])
    return sight


def read_lane(data: bytes | memoryview) -> Lane:
    """Whatever the records of one direction of a lane leave open. Never raises: `why_not` says where reading ended."""
    view, lane, at = memoryview(data), Lane(), 0
    while at + _RECORD.size <= len(view):
        kind, coding, marks, length, _, _ = _RECORD.unpack_from(view, at)
        if not 1 <= kind <= 3 or length > _RECORD_MAX or marks * 4 > length:
            lane.why_not = f"no record at {at}"
            return lane
        body = view[at + _RECORD.size : at + _RECORD.size + length]
        if len(body) < length:
            break
        at += _RECORD.size + length + _TAG_BYTES
        lane.records += 1
        if coding in (_MARKED, _MARKED_ZSTD) and marks:
            opened = _open_part(body, marks, coding)
            if opened is None:
                lane.why_not = "an open part cannot be read"
                return lane
            lane.sealed_bytes += length - opened[0]
            _take_pages(opened[1], body[: 4 * marks], lane)
        else:
            lane.sealed_bytes += length
    if at < len(view):
        lane.why_not = "the last record is cut"
    return lane


def _open_part(body: memoryview, marks: int, coding: int) -> tuple[int, Buffer] | None:
    """How many bytes of a marked record are open, and the pages in it; None where it is not as it should be."""
    begin = 4 * marks
    treatments = np.frombuffer(body[:begin], ">u4") >> 30
    wanted = PAGE_BYTES * int(np.count_nonzero(treatments <= _CODED))
    if coding == _MARKED:
        return (begin + wanted, body[begin : begin + wanted]) if begin + wanted <= len(body) else None
    if begin + 4 > len(body):
        return None
    length = int.from_bytes(body[begin : begin + 4], "big")
    packed = body[begin + 4 : begin + 4 + length]
    if len(packed) < length:
        return None
    pages = _unpack(packed, wanted) if wanted else b""
    return None if pages is None else (begin + 4 + length, pages)


def _unpack(packed: memoryview, wanted: int) -> bytes | None:
    """A zstd frame that says how long its content is: so long as the pages that should be in it."""
    try:
        if wanted > _OPENS_MAX or zstandard.frame_content_size(packed) != wanted:
            return None
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=wanted, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def _take_pages(opened: Buffer, marks: memoryview, lane: Lane) -> None:
    """Tells the open pages apart: first those in clear, then the encoded ones."""
    pages = np.frombuffer(opened, np.uint8).reshape(-1, PAGE_BYTES)
    clear = int(np.count_nonzero(np.frombuffer(marks, ">u4") >> 30 == _CLEAR))
    lane.clear.append(pages[:clear])
    lane.coded.append(pages[clear:])


def _rebuild(flows: Sequence[bytes]) -> tuple[dict[str, Pages], str]:
    mains = [flow for flow in flows if flow.startswith(b"QEVM")]
    if not mains:
        return {}, ""
    channels = [flow for flow in flows if flow.startswith(b"\x11\x22\x33\x44")]
    rebuild, problem = RamRebuild(), ""
    try:
        multifd = [_events(MultifdReader(carry=True), flow) for flow in channels]
        for number, event in in_order(_events(StreamReader(carry=True), mains[0]), multifd):
            rebuild.apply(event, connection=number)
    except WireError as error:
        problem = str(error)
    return dict(rebuild.memory()), problem


def _events(reader: StreamReader | MultifdReader, flow: bytes) -> Iterator[Event]:
    view = memoryview(flow)
    return iterate_events(reader, (view[at : at + _FEED_BYTES] for at in range(0, len(view), _FEED_BYTES)))
