"""zstd records: round trips in one context, bounds, and bytes that are no frame."""

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.compression import FRAMES_MAX, INPUT_MAX, RecordCompressor, RecordDecompressor
from tests.seal.rig import PROPERTY

payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=300),
        st.tuples(st.binary(min_size=1, max_size=20), st.integers(1, 4000)).map(lambda both: both[0] * both[1]),
    ),
    min_size=1,
    max_size=6,
)


def compressed(compressor: RecordCompressor, *pieces: bytes) -> memoryview:
    out = memoryview(bytearray(RECORD_PAYLOAD_MAX))
    return out[: compressor.compress_into(pieces, out)]


@PROPERTY
@given(records=payloads, level=st.sampled_from([-1, 1, 3, 7]), split=st.integers(1, 9))
def test_round_trip_in_one_context(records: list[bytes], level: int, split: int) -> None:
    compressor, decompressor = RecordCompressor(level), RecordDecompressor()
    for number, payload in enumerate(records):
        parts = [
            payload[at : at + len(payload) // split + 1] for at in range(0, len(payload), len(payload) // split + 1)
        ]
        record = compressed(compressor, *parts)
        assert (record[0] == 0x80) == (not number)
        assert decompressor.decompress(record) == payload


def test_later_records_find_matches_in_earlier_ones() -> None:
    compressor = RecordCompressor(1)
    payload = bytes(hash((7, at)) % 251 for at in range(5000))
    first = compressed(compressor, payload)
    again = compressed(compressor, payload)
    assert len(again) * 20 < len(first)


def test_a_change_of_level_begins_a_new_frame() -> None:
    decompressor = RecordDecompressor()
    for level in (1, 7, 3):
        compressor = RecordCompressor(level)
        for _ in range(2):
            record = compressed(compressor, b"the same " * 90)
            assert decompressor.decompress(record) == b"the same " * 90


def test_frames_do_not_depend_on_each_other() -> None:
    decompressor = RecordDecompressor()
    compressors = [RecordCompressor(1, frame) for frame in range(FRAMES_MAX)]
    for turn in range(3):
        for number, compressor in enumerate(compressors):
            payload = f"turn {turn} of {number} ".encode() * 50
            record = compressed(compressor, payload)
            assert decompressor.decompress(record) == payload
    again = compressed(RecordCompressor(3, 2), b"anew " * 9)
    assert decompressor.decompress(again) == b"anew " * 9
    record = compressed(compressors[1], b"and the others go on")
    assert bytes(decompressor.decompress(record)) == b"and the others go on"


def test_incompressible_bytes_fit_into_a_record() -> None:
    noise = b"".join(struct.pack("<Q", (at * 0x9E3779B97F4A7C15 + 12345) ** 3 % 2**64) for at in range(INPUT_MAX // 8))
    for level in (-1, 1, 7):
        record = compressed(RecordCompressor(level), noise)
        assert RecordDecompressor().decompress(record) == noise


def frame(payload: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(payload)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"", "too short"),
        (b"\0\0\0\0\5", "too short"),
        (struct.pack(">BI", 0x84, 5) + frame(b"hello"), "of frame 4"),
        (struct.pack(">BI", 0x80, 0) + frame(b"hello"), "claims 0 bytes"),
        (struct.pack(">BI", 0x80, INPUT_MAX + 1) + frame(b"hello"), f"claims {INPUT_MAX + 1} bytes"),
        (struct.pack(">BI", 0x80, 6) + frame(b"hello"), "another length"),
        (struct.pack(">BI", 0x80, 5) + frame(b"hello")[:-3], "another length"),
        (struct.pack(">BI", 0x80, 5) + b"no zstd frame", "does not open"),
    ],
)
def test_what_does_not_fit_is_refused(record: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why) as raised:
        RecordDecompressor().decompress(memoryview(record))
    assert raised.value.code == "lane.malformed"


def test_a_record_that_goes_on_with_nothing_is_refused() -> None:
    compressor = RecordCompressor(1)
    compressed(compressor, b"x" * 99)
    record = compressed(compressor, b"x" * 99)
    with pytest.raises(PeerError, match="never begun"):
        RecordDecompressor().decompress(record)


def test_a_bomb_gives_no_more_than_it_claims() -> None:
    bomb = frame(bytes(1 << 30))
    assert len(bomb) < 1 << 17
    decompressor = RecordDecompressor()
    out = decompressor.decompress(memoryview(struct.pack(">BI", 0x80, 1000) + bomb))
    assert len(out) == 1000


def test_a_window_that_is_too_large_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, write_content_size=False)
    large = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = large.compress(b"x" * 100) + large.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(PeerError, match="does not open"):
        RecordDecompressor().decompress(memoryview(struct.pack(">BI", 0x80, 100) + data))


@PROPERTY
@given(records=st.lists(st.tuples(st.binary(max_size=200), st.booleans()), max_size=5))
def test_any_bytes_open_or_are_refused(records: list[tuple[bytes, bool]]) -> None:
    decompressor = RecordDecompressor()
    good = compressed(RecordCompressor(1), b"good " * 20)
    assert decompressor.decompress(good) == b"good " * 20
    for record, first in records:
        try:
            opened = len(decompressor.decompress(memoryview(bytes([0x80 * first]) + record)))
        except PeerError as error:
            opened = 0 if error.code == "lane.malformed" else -1
        assert 0 <= opened <= INPUT_MAX
