"""Captures, a made-up stream that has everything in it, and a way to compare what readers give."""

import itertools
import json
import struct
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from sealane.errors import WireError
from sealane.wire import Event, Opaque, PacketPages, PageBatch, Reader
from sealane.wire import constants as q

CAPTURES = Path(__file__).parents[1] / "captures"
PAGE = q.TARGET_PAGE_SIZE


def capture_names() -> list[str]:
    return sorted(path.parent.name for path in CAPTURES.glob("*/provenance.json"))


def provenance(name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((CAPTURES / name / "provenance.json").read_text())
    return told


def connections(name: str, pattern: str = "[0-9]*.zst") -> list[bytes]:
    """The forward connections of a capture, in the order in which they were opened."""
    return [
        zstandard.ZstdDecompressor().decompress(path.read_bytes()) for path in sorted((CAPTURES / name).glob(pattern))
    ]


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def read(reader: Reader, parts: Iterable[bytes]) -> tuple[list[Event], tuple[str, int, str, str] | None]:
    """All events, and the error's code, offset, section and detail."""
    events: list[Event] = []
    try:
        for part in parts:
            events += reader.feed(part)
        events += reader.close()
    except WireError as error:
        return events, (error.code, error.offset, error.section, error.detail)
    return events, None


def told(events: Iterable[Event]) -> list[list[Any]]:
    """What the events say, however the pieces cut them."""
    merged: list[list[Any]] = []
    for event in events:
        last: list[Any] = merged[-1] if merged else [None]
        if isinstance(event, PageBatch):
            contents = [
                bytes(event.raw[start : start + (PAGE if is_page else 1)])
                for start, is_page in zip(event.starts.tolist(), event.is_page.tolist(), strict=True)
            ]
            headers = event.headers.tolist()
            if last[:2] == [PageBatch, event.block] and headers[0] & q.RAM_SAVE_FLAG_CONTINUE:
                last[2] += headers
                last[3] += contents
            else:
                merged.append([PageBatch, event.block, headers, contents])
        elif isinstance(event, Opaque):
            if last[:2] == [Opaque, event.reason]:
                last[2] += bytes(event.raw)
            else:
                merged.append([Opaque, event.reason, bytes(event.raw)])
        elif isinstance(event, PacketPages):
            if last[:2] == [PacketPages, event.packet.offset]:
                last[2] += event.pages.tobytes()
            else:
                merged.append([PacketPages, event.packet.offset, event.pages.tobytes()])
        else:
            values = [getattr(event, one.name) for one in fields(event) if one.name != "packet"]
            plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
            merged.append([type(event), *(bytes(one) if isinstance(one, memoryview) else one for one in plain)])
    return merged


# a made-up stream


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def page(number: int) -> bytes:
    return struct.pack(">Q", number * 0x9E3779B97F4A7C15 % 2**64) * (PAGE // 8)


def record(address: int, flags: int, block: str = "", body: bytes = b"") -> bytes:
    head = struct.pack(">Q", address | flags | (0 if block else q.RAM_SAVE_FLAG_CONTINUE))
    return head + (name(block) if block else b"") + body


def normal(index: int, block: str = "") -> bytes:
    return record(index * PAGE, q.RAM_SAVE_FLAG_PAGE, block, page(index))


def zero(index: int, block: str = "") -> bytes:
    return record(index * PAGE, q.RAM_SAVE_FLAG_ZERO, block, b"\0")


EOS = struct.pack(">Q", q.RAM_SAVE_FLAG_EOS)
FLUSH = struct.pack(">Q", q.RAM_SAVE_FLAG_MULTIFD_FLUSH)
HEADER = struct.pack(">II", q.QEMU_VM_FILE_MAGIC, q.QEMU_VM_FILE_VERSION)
CONFIGURATION = struct.pack(">BI", q.QEMU_VM_CONFIGURATION, 6) + b"pc-q35"
FOOTER = struct.pack(">BI", q.QEMU_VM_SECTION_FOOTER, 2)


def subsection(text: str, body: bytes) -> bytes:
    return bytes([q.QEMU_VM_SUBSECTION]) + name(text) + struct.pack(">I", 1) + body


def start(text: str = "ram", section: int = 2, kind: int = q.QEMU_VM_SECTION_START, version: int = 4) -> bytes:
    return struct.pack(">BI", kind, section) + name(text) + struct.pack(">II", 0, version)


def part(kind: int = q.QEMU_VM_SECTION_PART, section: int = 2) -> bytes:
    return struct.pack(">BI", kind, section)


def listing(blocks: dict[str, int], extra: bytes = b"") -> bytes:
    total = struct.pack(">Q", sum(blocks.values()) | q.RAM_SAVE_FLAG_MEM_SIZE)
    return total + b"".join(name(text) + struct.pack(">Q", length) + extra for text, length in blocks.items())


def command(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", q.QEMU_VM_COMMAND, number, len(payload)) + payload


def main_stream() -> bytes:
    """A small main channel with one of everything, up to postcopy's end."""
    package = command(q.MIG_CMD_POSTCOPY_LISTEN) + start("cpu", 9, q.QEMU_VM_SECTION_FULL, 1) + bytes(range(40))
    discard = b"\0" + name("b") + b"\0" + struct.pack(">QQ", 0, PAGE)
    return b"".join(
        [
            HEADER + CONFIGURATION,
            subsection("configuration/capabilities", struct.pack(">I", 1) + name("x-other")),
            subsection("configuration/target-page-bits", struct.pack(">I", 12)),
            subsection("configuration/uuid", bytes(range(16))),
            command(q.MIG_CMD_OPEN_RETURN_PATH) + command(q.MIG_CMD_PING, b"\0\0\0\1"),
            command(q.MIG_CMD_POSTCOPY_ADVISE, struct.pack(">QQ", PAGE, PAGE)) + command(77, b"later"),
            start() + listing({"a": 64 * PAGE, "b": 8 * PAGE}) + FLUSH + EOS + FOOTER,
            part()
            + normal(0, "a")
            + zero(1)
            + normal(2)
            + record(3 * PAGE, q.RAM_SAVE_FLAG_XBZRLE, "", b"\1\0\3\4\1x"),
            record(0, q.RAM_SAVE_FLAG_COMPRESS_PAGE, "b", struct.pack(">I", 3) + b"xyz") + EOS + FOOTER,
            part() + zero(5) + EOS + FOOTER + command(q.MIG_CMD_POSTCOPY_RAM_DISCARD, discard),
            command(q.MIG_CMD_PACKAGED, struct.pack(">I", len(package))) + package,
            part() + zero(0, "b") + EOS + FOOTER + part(q.QEMU_VM_SECTION_END) + EOS + FOOTER + b"\0",
        ]
    )


def packet(
    block: str = "a",
    *,
    normals: Iterable[int] = (),
    zeros: Iterable[int] = (),
    flags: int = 0,
    number: int = 0,
    payload: bytes | None = None,
    size: int | None = None,
) -> bytes:
    normals, zeros = list(normals), list(zeros)
    body = b"".join(page(index) for index in normals) if payload is None else payload
    offsets = [index * PAGE for index in (*normals, *zeros)]
    fixed = struct.pack(
        ">IIIIIIQI28x256s",
        *(q.MULTIFD_MAGIC, q.MULTIFD_VERSION, flags, 128, len(normals), len(body) if size is None else size),
        *(number, len(zeros), block.encode()),
    )
    return fixed + struct.pack(">128Q", *offsets[:128], *[0] * (128 - len(offsets))) + body


HELLO = struct.pack(">II16sB39x", q.MULTIFD_MAGIC, q.MULTIFD_VERSION, bytes(range(16)), 1)


def channel_stream() -> bytes:
    """A small multifd channel with one of everything."""
    device = struct.pack(">III256sII", q.MULTIFD_MAGIC, 1, q.MULTIFD_FLAG_DEVICE_STATE, b"vfio", 0, 9) + b"nine byte"
    return b"".join(
        [
            HELLO + packet(normals=[0, 2], zeros=[1], number=1) + device,
            packet(normals=[4], flags=q.MULTIFD_FLAG_SYNC, number=2) + packet(flags=q.MULTIFD_FLAG_SYNC, size=4096),
            packet(normals=[5], flags=q.MULTIFD_FLAG_QPL, payload=b"compressed", number=3),
        ]
    )


def message(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload


def return_stream() -> bytes:
    return b"".join(
        [
            message(q.MIG_RP_MSG_PONG, b"\0\0\0\1") + message(q.MIG_RP_MSG_SWITCHOVER_ACK) + message(99, b"later"),
            message(q.MIG_RP_MSG_REQ_PAGES_ID, struct.pack(">QI", PAGE, PAGE) + name("a")),
            message(q.MIG_RP_MSG_REQ_PAGES, struct.pack(">QI", 2 * PAGE, PAGE)),
            message(q.MIG_RP_MSG_RECV_BITMAP, name("a")) + struct.pack(">Q", 8) + bytes(8),
            struct.pack(">Q", q.RAMBLOCK_RECV_BITMAP_ENDING) + message(q.MIG_RP_MSG_SHUT, bytes(4)),
        ]
    )


def preempt_stream() -> bytes:
    return normal(7, "a") + normal(8) + zero(1, "b") + EOS
