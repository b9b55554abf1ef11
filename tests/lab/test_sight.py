"""What captured connections show: QEMU's streams, and the outside of lanes."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sealane.lab.pcap import Conversation, Flow
from sealane.lab.sight import kind_of, look, read_lane
from tests.lab.rig import CLIENT, SERVER

CAPTURES = Path(__file__).parents[1] / "captures"


def of(*flows: bytes) -> list[Conversation]:
    return [Conversation(CLIENT, SERVER, Flow(flow)) for flow in flows]


@pytest.mark.parametrize("name", ["single-q35-10.0.2", "multifd-running-10.0.2", "single-q35-7.2.22"])
def test_memory_is_the_sources(name: str) -> None:
    directory = CAPTURES / name
    flows = [
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for path in sorted(directory.glob("*.zst"))
    ]
    sight = look(of(*flows))
    assert not sight.problem
    assert "pc.ram" in sight.memory
    assert sight.memory["pc.ram"].any()
    assert json.loads((directory / "provenance.json").read_text())


def record(kind: int, coding: int, marks: list[int], body: bytes, sealed: int) -> bytes:
    payload = b"".join(struct.pack(">I", mark) for mark in marks) + body + bytes(sealed)
    return struct.pack(">BBHIQ8s", kind, coding, len(marks), len(payload), 0, b"identity") + payload + bytes(16)


def test_open_pages_of_marked_records() -> None:
    clear, coded = bytes([1]) * 4096, bytes([2]) * 4096
    marks = [9, 1 << 30 | 5000, 2 << 30 | 10000]
    lane = read_lane(
        record(1, 0, [], b"", 0)
        + record(2, 2, marks, clear + coded, 4096 + 77)
        + record(2, 0, [], b"", 500)
        + record(3, 0, [], b"", 0)
    )
    assert (lane.records, lane.sealed_bytes, lane.why_not) == (4, 4096 + 77 + 500, "")
    assert np.array_equal(lane.clear[0], np.full((1, 4096), 1))
    assert np.array_equal(lane.coded[0], np.full((1, 4096), 2))


def test_open_pages_that_were_compressed() -> None:
    """One frame goes on from record to record; a piece of it says how much it opens to."""
    frame = zstandard.ZstdCompressor().compressobj()
    records = b""
    for number in range(3):
        page = bytes([number, 255 - number]) * 2048
        packed = frame.compress(page) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        body = struct.pack(">BI", 0 if number else 0x80, 4096) + packed
        records += record(2, 3, [1 << 30 | 9], struct.pack(">I", len(body)) + body, 100)
    lane = read_lane(records)
    assert (lane.records, lane.sealed_bytes, lane.why_not) == (3, 300, "")
    assert [bytes(pages[0, :2]) for pages in lane.coded] == [bytes([n, 255 - n]) for n in range(3)]
    assert not any(len(pages) for pages in lane.clear)


@given(st.binary(max_size=300), st.lists(st.integers(0, (1 << 32) - 1), max_size=5), st.integers(0, 9000))
def test_any_bytes_are_read_without_an_error(noise: bytes, marks: list[int], sealed: int) -> None:
    read_lane(noise)
    lane = read_lane(record(2, 2, marks, noise, sealed) + noise)
    assert lane.records <= 1 + len(noise) // 40
    preface = b"sealane\x02\x02" + bytes(23)
    look(of(noise, b"QEVM" + noise, b"\x11\x22\x33\x44" + noise, preface + noise))


def test_kinds() -> None:
    assert kind_of(b"sealane\x02\x01" + bytes(23)) == "Sealane channel (TLS)"
    assert kind_of(b"QEVM\0\0\0\3") == "QEMU main channel, in clear"
    assert kind_of(b"\x16\x03\x01") == "TLS"
    assert kind_of(b"") == "silent"
