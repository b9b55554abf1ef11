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
    """Each part is a frame that says how long its content is."""
    pages = [bytes([number, 255 - number]) * 2048 for number in range(3)]
    packed = [zstandard.ZstdCompressor().compress(page) for page in pages]
    records = [record(2, 3, [1 << 30 | 9], struct.pack(">I", len(each)) + each, 100) for each in packed]
    lane = read_lane(b"".join(records))
    assert (lane.records, lane.sealed_bytes, lane.why_not) == (3, 300, "")
    assert [bytes(found[0, :2]) for found in lane.coded] == [page[:2] for page in pages]
    assert not any(len(found) for found in lane.clear)


def test_what_a_compressed_part_says_of_itself_is_not_believed() -> None:
    page = bytes(4096)
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(page)
    bomb = zstandard.ZstdCompressor().compress(bytes(200 * 4096))
    whole = zstandard.ZstdCompressor().compress(page)
    for marks, packed in (
        ([9], nameless),
        ([9, 5000], whole),  # two pages are announced
        ([*range(0, 200 * 4096, 4096)], bomb),  # more than a part may open to
        ([9], whole + b"behind it"),
        ([9], b"no frame"),
    ):
        lane = read_lane(record(2, 3, marks, struct.pack(">I", len(packed)) + packed, 0))
        assert lane.why_not == "an open part cannot be read", packed[:20]


@given(st.binary(max_size=300), st.lists(st.integers(0, (1 << 32) - 1), max_size=5), st.integers(0, 9000))
def test_any_bytes_are_read_without_an_error(noise: bytes, marks: list[int], sealed: int) -> None:
    read_lane(noise)
    lane = read_lane(record(2, 2, marks, noise, sealed) + noise)
    assert lane.records <= 1 + len(noise) // 40
    preface = b"sealane\x03\x02" + bytes(23)
    look(of(noise, b"QEVM" + noise, b"\x11\x22\x33\x44" + noise, preface + noise))


def test_kinds() -> None:
    assert kind_of(b"sealane\x03\x01" + bytes(23)) == "Sealane channel (TLS)"
    assert kind_of(b"QEVM\0\0\0\3") == "QEMU main channel, in clear"
    assert kind_of(b"\x16\x03\x01") == "TLS"
    assert kind_of(b"") == "silent"
