"""Records: identity under any chunking, one typed error for everything else, each rule of `seal/records.py` by itself."""

from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sealane.errors import InternalError, PeerError
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.seal.keys import Direction, LaneKeys
from sealane.seal.records import HEADER_BYTES, OVERHEAD_BYTES, Coding, Kind, RecordReader, RecordSealer
from tests.seal.rig import OPEN_RECORD, PROPERTY, SECRET, feed, forge, keys, read, records, seal_all

PAYLOADS = st.lists(st.binary(min_size=1, max_size=300), max_size=6)
SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=12)
LANE_CODES = {
    "lane.integrity", "lane.replay", "lane.reordered", "lane.foreign", "lane.malformed", "lane.truncated",
    "lane.after-close",
}  # fmt: skip


# ---- what was sealed opens, however it arrives


@PROPERTY
@given(PAYLOADS, SIZES)
def test_sealed_then_opened_is_the_same_under_any_chunking(payloads: list[bytes], sizes: list[int]) -> None:
    sealer = RecordSealer(keys())
    wire = b"".join(seal_all(sealer, payloads))
    for plan in ([], [1], sizes):
        reader = RecordReader(keys())
        told = feed(reader, wire, plan)
        assert told.error is None
        assert told.events == ["opened", *payloads, "closed"]
        assert reader.closed
        assert reader.digest == sealer.digest


@pytest.mark.parametrize("length", [1, RECORD_PAYLOAD_MAX - 1, RECORD_PAYLOAD_MAX])
def test_the_largest_records_go_whole_and_in_odd_pieces(length: int) -> None:
    payload = bytes(range(251)) * (length // 251 + 1)
    wire = b"".join(records(payload[:length], b"after"))
    for plan in ([], [65_521], [HEADER_BYTES - 1, 7]):
        told = read(wire, plan)
        assert told.error is None
        assert told.events == ["opened", payload[:length], b"after", "closed"]


# ---- any bytes give events or exactly one error


def _stays_in(reader: RecordReader, error: PeerError) -> None:
    for attempt in (reader.space, lambda: reader.filled(1), lambda: reader.filled(0), reader.ended):
        with pytest.raises(PeerError) as raised:
            attempt()
        assert raised.value is error


@PROPERTY
@given(st.binary(max_size=300), SIZES, st.booleans())
@example(b"", [1], False)
def test_any_bytes_give_one_typed_error(garbage: bytes, sizes: list[int], opened: bool) -> None:
    reader = RecordReader(keys())
    told = feed(reader, (OPEN_RECORD if opened else b"") + garbage, sizes)
    assert told.error is not None
    assert told.code in LANE_CODES
    assert told.events == (["opened"] if opened else [])
    _stays_in(reader, told.error)


@PROPERTY
@given(st.data(), SIZES)
def test_a_mutated_stream_gives_a_true_prefix_and_one_error(data: st.DataObject, sizes: list[int]) -> None:
    payloads = data.draw(PAYLOADS)
    wire = bytearray(b"".join(records(*payloads)))
    position = data.draw(st.integers(0, len(wire) - 1))
    wire[position] ^= data.draw(st.integers(1, 255))
    reader = RecordReader(keys())
    told = feed(reader, bytes(wire), sizes)
    assert told.error is not None
    assert told.code in LANE_CODES
    whole = ["opened", *payloads, "closed"]
    assert told.events == whole[: len(told.events)]
    assert "closed" not in told.events
    _stays_in(reader, told.error)
    assert [told.events, told.code] == [(again := read(bytes(wire))).events, again.code]


def test_truncation_at_every_point_is_an_error() -> None:
    sealed = records(b"first", b"second")
    wire = b"".join(sealed)
    ends = [sum(map(len, sealed[: n + 1])) for n in range(len(sealed))]
    for length in range(len(wire)):
        told = read(wire[:length], [7])
        assert told.code == "lane.truncated", length
        assert len(told.events) == sum(end <= length for end in ends)
    assert read(wire).error is None


# ---- a flipped bit, anywhere in a small record

SMALL = 5


def _flips() -> Iterator[tuple[int, int]]:
    return ((byte, bit) for byte in range(OVERHEAD_BYTES + SMALL) for bit in range(8))


def _expected_codes(byte: int) -> set[str]:
    if byte == 1:  # the coding: another one that exists is found by the tag
        return {"lane.malformed", "lane.integrity"}
    if byte < 4:  # kind and marks
        return {"lane.malformed"}
    if byte < 8:  # length: too long for a record, or the tag is sought in another place, or never comes
        return {"lane.malformed", "lane.integrity", "lane.truncated"}
    if byte < 16:  # the sequence number takes part in nonce and associated data
        return {"lane.integrity"}
    if byte < HEADER_BYTES:
        return {"lane.foreign"}
    return {"lane.integrity"}


def test_every_flipped_bit_of_a_record_is_found() -> None:
    record = records(b"x" * SMALL)[1]
    assert len(record) == OVERHEAD_BYTES + SMALL
    for byte, bit in _flips():
        changed = bytearray(record)
        changed[byte] ^= 1 << bit
        told = read(OPEN_RECORD + bytes(changed))
        assert told.events == ["opened"], (byte, bit)
        assert told.code in _expected_codes(byte), (byte, bit, told.code)


@pytest.mark.parametrize("index", [0, 2])
def test_every_flipped_bit_of_open_and_close_is_found(index: int) -> None:
    sealed = records(b"data")
    for byte in range(OVERHEAD_BYTES):
        for bit in range(8):
            changed = [bytearray(record) for record in sealed]
            changed[index][byte] ^= 1 << bit
            told = read(b"".join(changed))
            assert told.error is not None, (byte, bit)
            assert told.plaintext == (b"data" if index == 2 else b"")
            assert "closed" not in told.events


# ---- the rules, one by one; forged records have a right tag, so that no other check can find them


@pytest.mark.parametrize(
    "record",
    [
        forge(0, 1),
        forge(4, 1, b"x"),
        forge(255, 1, b"x"),
        forge(Kind.DATA, 1, b"x", coding=len(Coding)),
        forge(Kind.DATA, 1, b"x", coding=255),
        forge(Kind.CLOSE, 1, coding=1),
        forge(Kind.DATA, 1, b"x", marks=1),
        forge(Kind.DATA, 1, b"x", marks=0x8000),
        forge(Kind.DATA, 1, b""),
        forge(Kind.CLOSE, 1, b"x"),
    ],
    ids=[
        "kind 0",
        "kind 4",
        "kind 255",
        "coding",
        "coding high",
        "coding of CLOSE",
        "marks of a plain one",
        "marks high",
        "empty DATA",
        "CLOSE with a payload",
    ],
)
def test_rule_1_header_fits(record: bytes) -> None:
    told = read(OPEN_RECORD + record)
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def test_rule_1_open_carries_nothing() -> None:
    assert read(forge(Kind.OPEN, 0, b"x")).code == "lane.malformed"


@pytest.mark.parametrize("length", [RECORD_PAYLOAD_MAX + 1, 0xFFFFFFFF])
def test_rule_1_length_is_bounded_as_soon_as_the_header_is_there(length: int) -> None:
    header = forge(Kind.DATA, 1, b"", length=length)[:HEADER_BYTES]
    told = read(OPEN_RECORD + header, [1], end=False)
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def test_rule_2_identifier_is_this_lanes() -> None:
    told = read(OPEN_RECORD + forge(Kind.DATA, 1, b"x", identifier=b"somebody"))
    assert (told.events, told.code) == (["opened"], "lane.foreign")


@pytest.mark.parametrize(
    "other",
    [
        keys(lane=1),
        keys(lane=256),
        keys(direction=Direction.TO_SOURCE),
        keys(secret=bytes(32)),
    ],
    ids=["swapped lanes", "lane 256", "other direction", "other migration"],
)
def test_rule_2_records_of_another_lane_direction_or_migration(other: LaneKeys) -> None:
    from_there = records(b"x", of=other)
    assert read(from_there[0]).code == "lane.foreign"
    told = read(OPEN_RECORD + from_there[1])
    assert (told.events, told.code) == (["opened"], "lane.foreign")


def test_rule_3_what_was_not_sealed_under_the_key_does_not_open() -> None:
    forged = forge(Kind.DATA, 1, b"x")
    told = read(OPEN_RECORD + forged[:-16] + bytes(16))
    assert (told.events, told.code) == (["opened"], "lane.integrity")


def test_rule_4_replay_and_reorder() -> None:
    opening, first, second, closing = records(b"1", b"2")
    expected = {
        (opening, first, first): (["opened", b"1"], "lane.replay"),
        (opening, first, second, first): (["opened", b"1", b"2"], "lane.replay"),
        (opening, first, opening): (["opened", b"1"], "lane.replay"),
        (opening, second, first): (["opened"], "lane.reordered"),
        (opening, closing): (["opened"], "lane.reordered"),
        (opening, first, closing): (["opened", b"1"], "lane.reordered"),
        (first,): ([], "lane.reordered"),
    }
    for order, (events, code) in expected.items():
        told = read(b"".join(order))
        assert (told.events, told.code) == (events, code)


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.CLOSE])
def test_rule_5_the_first_record_is_open(kind: Kind) -> None:
    told = read(forge(kind, 0, b"x" if kind is Kind.DATA else b""))
    assert (told.events, told.code) == ([], "lane.malformed")


def test_rule_5_no_other_record_is_open() -> None:
    told = read(OPEN_RECORD + forge(Kind.OPEN, 1))
    assert (told.events, told.code) == (["opened"], "lane.malformed")


def test_rule_6_nothing_follows_close() -> None:
    wire = b"".join(records(b"1"))
    for more in (b"!", forge(Kind.DATA, 3, b"x"), bytes(HEADER_BYTES)):
        for plan in ([], [1], [len(wire)]):
            told = read(wire + more, plan)
            assert told.code == "lane.after-close"
            assert told.plaintext == b"1"


def test_rule_7_the_end_comes_after_close_only() -> None:
    sealed = records(b"1")
    assert read(b"").code == "lane.truncated"
    assert read(b"".join(sealed[:-1])).code == "lane.truncated"
    assert read(b"".join(sealed)).error is None


def test_plaintext_of_a_record_that_breaks_rule_4_is_not_given_out() -> None:
    opening, first, _ = records(b"12345")
    reader = RecordReader(keys())
    told = feed(reader, opening + first + first)
    assert told.plaintext == b"12345"
    honest = RecordReader(keys())
    feed(honest, opening + first, end=False)
    assert reader.digest == honest.digest


# ---- the digest, and misuse by our own side


def test_digests_tell_streams_apart() -> None:
    def digest(*payloads: bytes, secret: bytes = SECRET) -> bytes:
        sealer = RecordSealer(keys(secret))
        seal_all(sealer, payloads)
        return sealer.digest

    assert digest(b"1", b"2") == digest(b"1", b"2")
    different = [
        digest(b"1", b"2"),
        digest(b"2", b"1"),
        digest(b"12"),
        digest(b"1"),
        digest(),
        digest(b"1", secret=b"x" * 32),
    ]
    assert len(set(different)) == len(different)


def test_a_sealer_refuses_what_its_reader_would_refuse() -> None:
    sealer = RecordSealer(keys())
    with pytest.raises(InternalError):
        sealer.seal_data(1)
    sealer.open_lane()
    for length in (0, -1, RECORD_PAYLOAD_MAX + 1):
        with pytest.raises(InternalError):
            sealer.seal_data(length)
    with pytest.raises(InternalError):
        sealer.open_lane()
    sealer.close_lane()
    for attempt in (sealer.close_lane, lambda: sealer.seal_data(1)):
        with pytest.raises(InternalError):
            attempt()


def test_events_do_not_show_payload() -> None:
    reader = RecordReader(keys())
    wire = b"".join(records(b"canary")[:2])
    for byte in wire:
        reader.space()[:1] = bytes([byte])
        event = reader.filled(1)
    assert repr(event) == "DataReceived(6 bytes)"
