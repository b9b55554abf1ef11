"""Marked records: what goes in clear is what was classified and nothing else, and the mark alone brings it back."""

import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sealane.crypto.aead import TAG_BYTES
from sealane.errors import InternalError
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.codecs import CODECS, PAGE_BYTES, PageCodec
from sealane.seal.compression import RecordCompressor, RecordDecompressor
from sealane.seal.keys import Direction, codec_key
from sealane.seal.marks import MARK_BYTES, MARKS_MAX, PIECE_MAX, IsUser, Marks, PageMarker, PartCompressors, Treatment
from sealane.seal.records import HEADER_BYTES, OVERHEAD_BYTES, Coding, Kind, MarksAllowed, RecordReader, RecordSealer
from sealane.wire import PageBatch, StreamReader
from sealane.wire.events import Offsets
from tests.seal.rig import HEADER, OPEN_RECORD, PROPERTY, SECRET, Told, feed, keys
from tests.wire import rig as wire_rig

KEY = bytes(range(100, 132))
PROTECTIONS = ["selective", *sorted(CODECS)]
CAPTURES = ["single-q35-7.2.22", "single-running-10.0.2", "multifd-7.2.22", "multifd-10.0.2", "postcopy-preempt-10.0.2"]


def codec_of(protection: str) -> PageCodec | None:
    return CODECS[protection](KEY) if protection in CODECS else None


def every_third(_block: str, offsets: Offsets) -> NDArray[np.bool_]:
    return (offsets // PAGE_BYTES) % 3 == 0  # type: ignore[no-any-return]


def all_of(answer: bool) -> IsUser:
    return lambda _block, offsets: np.full(len(offsets), answer)


def marked_records(
    data: bytes, sizes: Callable[[], int], protection: str, is_user: IsUser | None, level: int | None = None
) -> tuple[list[bytes], list[bytes]]:
    """The records of a stream that arrives in pieces of these sizes, compressed at a level or not, and the pieces."""
    sealer, codec = RecordSealer(keys()), codec_of(protection)
    compressors = None if level is None else PartCompressors(level)
    marker = PageMarker(is_user, has_codec=codec is not None)
    records, pieces, at = [bytes(sealer.open_lane())], [], 0
    while at < len(data):
        piece = memoryview(bytearray(data[at : at + min(sizes(), PIECE_MAX)]))
        at += len(piece)
        pieces.append(bytes(piece))
        marks = marker.marks_of(piece)
        if marks is not None:
            records.append(bytes(sealer.seal_marked(piece, marks, codec, compressors)))
        elif compressors is not None:
            records.append(bytes(sealer.seal_data(compressors.hide_into(piece, sealer.payload), Coding.ZSTD)))
        else:
            sealer.payload[: len(piece)] = piece
            records.append(bytes(sealer.seal_data(len(piece))))
    return [*records, bytes(sealer.close_lane())], pieces


def opened(records: list[bytes], protection: str, sizes: list[int] | None = None) -> Told:
    reader = RecordReader(keys(), MarksAllowed(codec_of(protection)))
    return feed(reader, b"".join(records), sizes or [])


# ---- what was marked comes back


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("name", CAPTURES)
def test_real_streams_come_back_under_every_protection(name: str, level: int | None) -> None:
    chance = random.Random(name)
    for data in wire_rig.connections(name):
        for protection in PROTECTIONS if len(data) < 3 << 20 else ["selective", "hrt"]:
            records, pieces = marked_records(
                data, lambda: chance.choice([7, 5000, 70_000, 400_000]), protection, every_third, level
            )
            told = opened(records, protection, [65_536])
            assert told.error is None
            assert told.events == ["opened", *pieces, "closed"]


def test_some_of_each_is_marked_in_a_real_stream() -> None:
    data = wire_rig.connections("single-q35-7.2.22")[0]
    marker = PageMarker(every_third, has_codec=True)
    counts = dict.fromkeys(Treatment, 0)
    for at in range(0, len(data), 300_000):
        marks = marker.marks_of(memoryview(data)[at : at + 300_000])
        for treatment in Treatment:
            counts[treatment] += marks.count(treatment) if marks else 0
    pages = sum(int(event.is_page.sum()) for event in StreamReader().feed(data) if isinstance(event, PageBatch))
    assert sum(counts.values()) > 0.95 * pages  # all but those that two pieces share
    assert counts[Treatment.CLEAR] > counts[Treatment.CODED] > 0.2 * pages


def stream_of_pages(count: int) -> bytes:
    """A main channel with so many different pages of block `a`."""
    body = wire_rig.normal(0, "a") + b"".join(wire_rig.normal(index) for index in range(1, count))
    return (
        wire_rig.HEADER + wire_rig.CONFIGURATION + wire_rig.start() + wire_rig.listing({"a": count * PAGE_BYTES})
        + body + wire_rig.EOS + wire_rig.FOOTER + b"\0"
    )  # fmt: skip


@PROPERTY
@given(
    st.integers(1, 40),
    st.lists(st.integers(300, 30_000), min_size=1, max_size=8),
    st.integers(0, 2**32),
    st.sampled_from(PROTECTIONS),
    st.sampled_from([None, -1, 1]),
)
def test_any_pieces_and_classes_come_back(
    count: int, sizes: list[int], seed: int, protection: str, level: int | None
) -> None:
    def is_user(_block: str, offsets: Offsets) -> NDArray[np.bool_] | None:
        return None if chance.random() < 0.2 else np.array([chance.random() < 0.5 for _ in offsets], bool)

    chance = random.Random(seed)
    records, pieces = marked_records(stream_of_pages(count), lambda: chance.choice(sizes), protection, is_user, level)
    assert opened(records, protection).events == ["opened", *pieces, "closed"]


@PROPERTY
@given(st.binary(max_size=20_000), st.lists(st.integers(1, 6000), min_size=1, max_size=8))
def test_what_is_no_stream_is_encrypted_and_never_an_error(data: bytes, sizes: list[int]) -> None:
    chance = random.Random(1)
    for first in (b"", wire_rig.HEADER, wire_rig.HELLO):
        records, pieces = marked_records(first + data, lambda: chance.choice(sizes), "selective", all_of(True))
        assert all(record[1] == Coding.PLAIN for record in records)
        assert opened(records, "selective").events == ["opened", *pieces, "closed"]


# ---- what the wire shows


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_the_wire_shows_the_pages_that_are_no_users_and_no_other_byte(protection: str) -> None:
    data = stream_of_pages(30)
    records, _ = marked_records(data, lambda: PIECE_MAX, protection, every_third)
    wire = b"".join(records)
    for index in range(30):
        assert (wire_rig.page(index) in wire) == (index % 3 != 0), index
        if index % 3 == 0:  # nor a part of it
            assert wire_rig.page(index)[1000:1064] not in wire
    assert b"pc-q35" not in wire  # the stream's structure is encrypted


@pytest.mark.parametrize("is_user", [None, lambda _block, _offsets: None], ids=["no monitor", "unknown block"])
def test_what_nobody_has_classified_is_encrypted(is_user: IsUser | None) -> None:
    for protection in PROTECTIONS:
        records, _ = marked_records(stream_of_pages(9), lambda: PIECE_MAX, protection, is_user)
        assert all(record[1] == Coding.PLAIN for record in records)


def test_a_page_that_two_records_share_is_encrypted() -> None:
    records, _ = marked_records(stream_of_pages(9), lambda: 5000, "selective", all_of(False))
    wire = b"".join(records)
    shown = [index for index in range(9) if wire_rig.page(index)[:512] in wire]
    assert shown
    assert len(shown) < 9
    assert all(wire_rig.page(index) in wire for index in shown)


def test_device_state_is_encrypted() -> None:
    secret = b"the vTPM's permanent state" * 300
    device = wire_rig.start("tpm-emulator", 9, kind=4) + secret
    records, _ = marked_records(stream_of_pages(9)[:-1] + device, lambda: PIECE_MAX, "hrt", all_of(False))
    assert wire_rig.page(3) in b"".join(records)
    assert secret[:64] not in b"".join(records)


def test_each_codec_key_is_of_its_own_lane_direction_and_migration() -> None:
    made = {
        codec_key(secret, lane=lane, direction=direction)
        for secret in (SECRET, bytes(32)) for lane in (0, 1, 256) for direction in Direction
    }  # fmt: skip
    assert len(made) == 12


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_compressed_records_show_what_others_show(protection: str) -> None:
    """Who opens the open part with zstd has the pages that are no user's, and the ciphertext is not compressed with them."""
    data = stream_of_pages(30)
    records, _ = marked_records(data, lambda: PIECE_MAX, protection, every_third, level=1)
    assert records[1][1] == Coding.MARKED_ZSTD
    (count,) = struct.unpack_from(">H", records[1], 2)
    at = HEADER_BYTES + MARK_BYTES * count
    (length,) = struct.unpack_from(">I", records[1], at)
    shown = bytes(RecordDecompressor().decompress(memoryview(records[1])[at + 4 : at + 4 + length]))
    for index in range(30):
        assert (wire_rig.page(index) in shown) == (index % 3 != 0), index
        assert wire_rig.page(index)[1000:1064] not in records[1] or index % 3
    assert b"pc-q35" not in shown + records[1]


# ---- rules 1, 8 and 9: forged records have a right tag, so that no other check can find them


def forge_marked(
    words: list[int],
    body: bytes,
    *,
    open_bytes: int,
    count: int | None = None,
    kind: int = Kind.DATA,
    coding: int = Coding.MARKED,
) -> bytes:
    """A marked record with these marks, whose first `open_bytes` of payload are not encrypted."""
    own, payload = keys(), np.array(words, ">u4").tobytes() + body
    header = HEADER.pack(kind, coding, len(words) if count is None else count, len(payload), 1, own.identifier)
    sealed = bytearray(len(payload) - open_bytes + TAG_BYTES)
    own.at(1).seal_into(own.nonce(1), payload[open_bytes:], header + payload[:open_bytes], sealed)
    return header + payload[:open_bytes] + bytes(sealed)


def word(treatment: int, position: int) -> int:
    return treatment << 30 | position


PAGES = bytes(range(256)) * 32
CLEAR_TWO = MARK_BYTES * 2 + 2 * PAGE_BYTES


def read_forged(record: bytes, protection: str = "selective") -> Told:
    return feed(RecordReader(keys(), MarksAllowed(codec_of(protection))), OPEN_RECORD + record)


def test_the_forger_makes_what_the_reader_takes() -> None:
    told = read_forged(forge_marked([word(0, 3), word(0, 4099)], PAGES + b"abcde", open_bytes=CLEAR_TWO))
    assert told.events == ["opened", b"abc" + PAGES + b"de"]


@pytest.mark.parametrize(
    "words",
    [
        [word(0, 4096), word(0, 0)], [word(0, 0), word(0, 0)], [word(0, 0), word(0, 4095)], [word(0, 0), word(0, 4097)],
        [word(0, 0), word(0, (1 << 30) - 1)], [word(0, 0), word(3, 4096)], [word(2, 0), word(0, 4096)],
        [word(0, 0), word(1, 4096)],
    ],
    ids=["order", "twice", "overlap", "beyond", "far beyond", "no such treatment", "treatments' order", "no codec"],
)  # fmt: skip
def test_rule_8_marks_are_those_of_its_pages(words: list[int]) -> None:
    open_bytes = MARK_BYTES * 2 + PAGE_BYTES * sum(each >> 30 != 2 for each in words)
    told = read_forged(forge_marked(words, PAGES, open_bytes=open_bytes))
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def test_rule_8_pages_of_different_treatments_do_not_overlap() -> None:
    words = [word(0, 10), word(2, 0)]
    told = read_forged(forge_marked(words, PAGES + bytes(20), open_bytes=MARK_BYTES * 2 + PAGE_BYTES))
    assert (told.events, told.code) == (["opened"], "lane.malformed")


@pytest.mark.parametrize(
    "record",
    [
        forge_marked([], PAGES, open_bytes=0),
        forge_marked([word(0, 0)], bytes(PAGE_BYTES - 1), open_bytes=PAGE_BYTES + 3),
        forge_marked([word(0, 0)], bytes(PIECE_MAX + 1), open_bytes=PAGE_BYTES + 4),
        forge_marked([word(0, 0), word(0, 4096)], PAGES, open_bytes=CLEAR_TWO, count=1 + len(PAGES) // PAGE_BYTES + 9),
        forge_marked([word(0, 0), word(0, 4096)], PAGES, open_bytes=CLEAR_TWO, kind=Kind.CLOSE),
        forge_marked([word(0, 0), word(0, 4096)], PAGES, open_bytes=CLEAR_TWO, coding=len(Coding)),
    ],
    ids=["no mark", "no room for its page", "too long", "more marks than pages", "CLOSE", "no such coding"],
)
def test_rule_1_coding_marks_and_length_fit(record: bytes) -> None:
    told = read_forged(record)
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def test_rule_1_a_sealed_lane_takes_no_marked_record() -> None:
    record = forge_marked([word(0, 0), word(0, 4096)], PAGES, open_bytes=CLEAR_TWO)
    told = feed(RecordReader(keys()), OPEN_RECORD + record)
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def forge_compressed(words: list[int], opened: bytes, hidden: bytes, *, claim: int | None = None) -> bytes:
    """A compressed marked record of these parts, as they stand there."""
    claimed = len(opened) if claim is None else claim
    body = struct.pack(">I", claimed) + opened + hidden
    open_bytes = min(MARK_BYTES * len(words) + 4 + claimed, MARK_BYTES * len(words) + len(body))
    return forge_marked(words, body, open_bytes=open_bytes, coding=Coding.MARKED_ZSTD)


def packed(data: bytes) -> bytes:
    return RecordCompressor(1).compress([data])


def test_the_forger_of_compressed_ones_too() -> None:
    words = [word(0, 3), word(2, 4099)]
    told = read_forged(forge_compressed(words, packed(PAGES[:4096]), packed(PAGES[4096:] + b"abcde")))
    assert told.events == ["opened", b"abc" + PAGES + b"de"]


@pytest.mark.parametrize(
    "record",
    [
        forge_compressed([word(0, 0), word(2, 4096)], packed(PAGES[:4095]), packed(PAGES[4096:] + b"x")),
        forge_compressed([word(0, 0), word(2, 4096)], packed(PAGES[:4097]), packed(PAGES[4097:])),
        forge_compressed([word(0, 0)], packed(PAGES[:4096]), packed(bytes(PIECE_MAX + 1 - 4096))),
        forge_compressed([word(0, 0)], packed(PAGES[:4096]), packed(bytes(PIECE_MAX + 1))),
        forge_compressed([word(0, 0)], packed(PAGES[:4096]), b"no frame"),
        forge_compressed([word(0, 0)], b"", packed(PAGES)),
        forge_compressed([word(0, 0)], b"", packed(PAGES), claim=1 << 31),
        forge_compressed([word(0, 0)], b"", b""),
        forge_compressed([word(0, 0)] * (MARKS_MAX + 1), b"", packed(PAGES)),
    ],
    ids=[
        "short",
        "long",
        "piece too long",
        "far too long",
        "no frame",
        "nothing open",
        "claims more",
        "empty",
        "marks",
    ],
)
def test_rules_1_and_9_of_compressed_ones(record: bytes) -> None:
    told = read_forged(record)
    assert (told.events, told.code) == (["opened"], "lane.malformed")


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("protection", ["selective", "hrt"])
def test_every_changed_byte_is_found_in_clear_parts_too(protection: str, level: int | None) -> None:
    records, _ = marked_records(stream_of_pages(3), lambda: PIECE_MAX, protection, every_third, level)
    assert records[1][1] == (Coding.MARKED if level is None else Coding.MARKED_ZSTD)
    for byte in [*range(HEADER_BYTES + 20), *random.Random(1).choices(range(len(records[1])), k=300)]:
        changed = bytearray(records[1])
        changed[byte] ^= 1 << byte % 8
        told = opened([records[0], bytes(changed)], protection)
        assert told.error is not None, byte
        assert told.events == ["opened"]


@PROPERTY
@given(st.binary(max_size=9000), st.integers(0, 5), st.integers(0, 40_000), st.sampled_from([2, 3]))
def test_any_marks_and_bytes_give_a_piece_or_one_typed_error(
    body: bytes, count: int, open_bytes: int, coding: int
) -> None:
    open_bytes = min(open_bytes, len(body))
    told = read_forged(forge_marked([], body, open_bytes=open_bytes, count=count, coding=coding))
    assert told.code in {"lane.malformed", "lane.integrity", "lane.truncated"}
    assert told.events == ["opened"]


# ---- bounds, and misuse by our own side


def test_a_full_piece_fits_a_record() -> None:
    positions = np.arange(PIECE_MAX // PAGE_BYTES, dtype=np.int64) * PAGE_BYTES
    assert len(positions) <= MARKS_MAX
    marks = Marks(positions, np.zeros(len(positions), np.uint8))
    sealer = RecordSealer(keys())
    sealer.open_lane()
    piece = memoryview(bytearray(random.Random(3).randbytes(PIECE_MAX)))
    record = bytes(sealer.seal_marked(piece, marks, None))
    assert len(record) <= RECORD_PAYLOAD_MAX + OVERHEAD_BYTES
    assert read_forged(record).plaintext == bytes(piece)
    for half in (0, len(positions) // 2, len(positions)):
        treatments = np.repeat([0, 2], [half, len(positions) - half]).astype(np.uint8)
        another = RecordSealer(keys())
        another.open_lane()
        record = bytes(another.seal_marked(piece, Marks(positions, treatments), None, PartCompressors(1)))
        assert read_forged(record).plaintext == bytes(piece)
    for wrong in (memoryview(bytes(PIECE_MAX + 1)), memoryview(bytes(PAGE_BYTES - 1))):
        with pytest.raises(InternalError):
            sealer.seal_marked(wrong, marks, None)
