"""Packets, captures and memory made by hand."""

import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sealane.lab.sight import PAGE_BYTES, Pages

SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12
CLIENT, SERVER = ("10.0.0.1", 40000), ("10.0.0.2", 48217)


def tcp(
    source: tuple[str, int], destination: tuple[str, int], sequence: int, data: bytes = b"", flags: int = ACK
) -> bytes:
    """An Ethernet frame with one TCP segment; checksums are zero."""
    segment = (
        struct.pack(">HHIIBBHHH", source[1], destination[1], sequence % (1 << 32), 0, 5 << 4, flags, 65535, 0, 0) + data
    )
    addresses = b"".join(bytes(map(int, each[0].split("."))) for each in (source, destination))
    packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0) + addresses + segment
    return bytes(12) + b"\x08\x00" + packet


def tcp6(sequence: int, data: bytes = b"", flags: int = ACK, *, extensions: bytes = b"", first: int = 6) -> bytes:
    """A raw IPv6 packet from ::1 port 40000 to ::2 port 48217; `extensions` stand before TCP, the first of kind `first`."""
    segment = struct.pack(">HHIIBBHHH", CLIENT[1], SERVER[1], sequence, 0, 5 << 4, flags, 65535, 0, 0) + data
    head = struct.pack(">IHBB", 6 << 28, len(extensions) + len(segment), first, 64)
    return head + bytes(15) + b"\x01" + bytes(15) + b"\x02" + extensions + segment


def tagged(frame: bytes, *tags: int) -> bytes:
    """The same Ethernet frame in VLANs, the outermost first."""
    between = b"".join(struct.pack(">HH", tag, 7) for tag in tags)
    return frame[:12] + between + frame[12:]


def cooked(frame: bytes) -> bytes:
    """The same packet on a Linux cooked link, version 1."""
    return struct.pack(">HHH8s", 4, 1, 6, b"") + frame[12:]


def pcapng(frames: Iterable[bytes], *, order: str = "<", link: int = 1, kind: int = 6) -> bytes:
    """A capture of these frames as Wireshark writes it: a section, an interface, and a block of `kind` for each packet."""
    blocks = block(order, 0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1))
    blocks += block(order, 1, struct.pack(f"{order}HHI", link, 0, 262144))
    for frame in frames:
        heads = {
            6: struct.pack(f"{order}5I", 0, 0, 0, len(frame), len(frame)),
            2: struct.pack(f"{order}HH4I", 0, 0, 0, 0, len(frame), len(frame)),
            3: struct.pack(f"{order}I", len(frame)),
        }
        blocks += block(order, kind, heads[kind] + frame + bytes(-len(frame) % 4))
    return blocks + block(order, 5, bytes(12))  # statistics, which nobody needs


def block(order: str, kind: int, body: bytes) -> bytes:
    """One block of pcapng."""
    length = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + length + body + length


def pcap(frames: Iterable[bytes], *, order: str = "<", link: int = 1) -> bytes:
    """A capture of these frames."""
    head = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)
    return head + b"".join(struct.pack(f"{order}IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames)


def memory(count: int = 256) -> Pages:
    """Pages such as processes have: a program, a text, records, noise."""
    program = np.frombuffer(Path(shutil.which("busybox") or "/bin/busybox").read_bytes(), np.uint8)
    made = program[: len(program) // PAGE_BYTES * PAGE_BYTES].reshape(-1, PAGE_BYTES)[: count // 2]
    text = (
        b"The harbour at the northern end of the bay will be sold before the end of the year, for less than was told. "
    )
    random = np.random.default_rng(7)
    written = np.resize(np.frombuffer(text, np.uint8), (count // 4, PAGE_BYTES)).copy()
    written[:, 3000:] = 0  # a file's last page has zeros behind its end
    records = np.zeros((count // 8, PAGE_BYTES // 8), "<u8")
    records[:, ::4] = 0x7F0000000000 + random.integers(0, 1 << 24, (count // 8, PAGE_BYTES // 32))
    noise = random.integers(0, 256, (count // 8, PAGE_BYTES), dtype=np.uint8)
    return np.concatenate([made, written, records.view(np.uint8), noise])
