"""zstd records: round trips in one context, bounds, and bytes that are no frame."""

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.compression import INPUT_MAX, RecordCompressor, RecordDecompressor
from tests.seal.rig import PROPERTY

payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=300),
        st.tuples(st.binary(min_size=1, max_size=20), st.integers(1, 4000)).map(lambda both: both[0] * both[1]),
    ),
    min_size=1,
    max_size=6,
)


@PROPERTY
@given(records=payloads, level=st.sampled_from([-1, 1, 3, 7]), split=st.integers(1, 9))
def test_round_trip(records: list[bytes], level: int, split: int) -> None:
    compressor, decompressor = RecordCompressor(level), RecordDecompressor()
    for payload in records:
        step = len(payload) // split + 1
        record = compressor.compress([payload[at : at + step] for at in range(0, len(payload), step)])
        assert decompressor.decompress(record) == payload


def test_each_record_opens_by_itself_whatever_opened_before() -> None:
    records = [
        RecordCompressor(level).compress([b"the same " * count]) for level, count in ((1, 90), (7, 5), (3, 9000))
    ]
    decompressor = RecordDecompressor()
    for record, count in ((records[2], 9000), (records[0], 90), (records[1], 5), (records[2], 9000)):
        assert decompressor.decompress(record) == b"the same " * count


def test_incompressible_bytes_fit_into_a_record() -> None:
    noise = b"".join(struct.pack("<Q", (at * 0x9E3779B97F4A7C15 + 12345) ** 3 % 2**64) for at in range(INPUT_MAX // 8))
    for level in (-1, 1, 7):
        record = RecordCompressor(level).compress([noise])
        assert len(record) <= RECORD_PAYLOAD_MAX
        assert RecordDecompressor().decompress(record) == noise


def frame(payload: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(payload)


def unsized(payload: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(payload)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"", "does not open"),
        (b"no zstd frame", "does not open"),
        (frame(b""), "claims 0 bytes"),
        (frame(bytes(INPUT_MAX + 1)), f"claims {INPUT_MAX + 1} bytes"),
        (frame(bytes(1 << 30)), f"claims {1 << 30} bytes"),
        (unsized(b"hello"), f"claims {2**64 - 1} bytes"),
        (frame(b"hello")[:-3], "does not open"),
        (frame(b"hello") + b"\0", "does not open"),
        (frame(b"hello") + frame(b"again"), "does not open"),
        (frame(b"hello" * 99)[:-1] + b"\xff", "does not open"),
    ],
)
def test_what_does_not_fit_is_refused(record: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why) as raised:
        RecordDecompressor().decompress(memoryview(record))
    assert raised.value.code == "lane.malformed"


def test_a_bomb_gives_no_more_than_it_claims() -> None:
    """The head of a small frame before the blocks of a large one."""
    small, bomb = frame(bytes(1000)), frame(bytes(400_000_000))
    head, large = zstandard.frame_header_size(small), zstandard.frame_header_size(bomb)
    with pytest.raises(PeerError, match="does not open"):
        RecordDecompressor().decompress(small[:head] + bomb[large:])


@PROPERTY
@given(
    record=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: frame(b"good " * 20)[:9] + tail))
)
def test_any_bytes_open_or_are_refused(record: bytes) -> None:
    try:
        opened = len(RecordDecompressor().decompress(record))
    except PeerError as error:
        opened = 1 if error.code == "lane.malformed" else 0
    assert 0 < opened <= INPUT_MAX
