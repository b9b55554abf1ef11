"""Any bytes give events or one WireError: whole, in pieces, cut at every point, changed anywhere, in bounded memory."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sealane import limits
from sealane.errors import WireError
from sealane.wire import (
    Command,
    Event,
    MultifdPacket,
    MultifdReader,
    Opaque,
    PacketPages,
    PageBatch,
    PreemptReader,
    RamBlockListed,
    RamRebuild,
    Reader,
    ReturnPathReader,
    StreamReader,
    reader_for,
)
from sealane.wire import constants as q
from sealane.wire.postcopy import parse_ram_discard
from sealane.wire.summary import StreamSummary
from sealane.wire.writer import encode
from tests.wire import rig
from tests.wire.rig import CONFIGURATION, EOS, FOOTER, HEADER, HELLO, PAGE, packet, pieces, read, told

MADE: dict[str, tuple[Callable[..., Reader], bytes]] = {
    "main": (StreamReader, rig.main_stream()),
    "multifd": (MultifdReader, rig.channel_stream()),
    "return": (ReturnPathReader, rig.return_stream()),
    "preempt": (PreemptReader, rig.preempt_stream()),
}
every_connection = pytest.mark.parametrize("kind", MADE)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def stream_of(*parts: bytes) -> bytes:
    return b"".join([HEADER, CONFIGURATION, *parts])


def ram(*records: bytes, blocks: dict[str, int] | None = None) -> bytes:
    return stream_of(rig.start(), rig.listing(blocks or {"a": 64 * PAGE}), EOS, FOOTER, rig.part(), *records)


@every_connection
def test_everything_is_understood(kind: str) -> None:
    make, data = MADE[kind]
    events, error = read(make(), [data])
    assert error is None
    assert b"".join(event.raw for event in events) == data
    assert all(encode(event) == event.raw for event in events)
    opaque = {event.reason for event in events if isinstance(event, Opaque)}
    assert opaque <= {"device state", "a bitmap of received pages"}
    assert isinstance(reader_for(data), make)  # type: ignore[arg-type]


@every_connection
def test_byte_by_byte_is_the_same(kind: str) -> None:
    make, data = MADE[kind]
    assert told(read(make(), bytewise(data))[0]) == told(read(make(), [data])[0])


@every_connection
def test_cut_at_every_point(kind: str) -> None:
    make, data = MADE[kind]
    # within long contents one cut in seven is enough; 31 bytes are more than any head
    cuts = [at for at in range(len(data)) if at % 7 == 0 or data[at : at + 31] != data[at + 8 : at + 39]]
    whole = told(read(make(), [data])[0])
    for cut in cuts:
        events, error = read(make(), [data[:cut]])
        two, two_error = read(make(), [data[: cut // 2], data[cut // 2 : cut]])
        assert told(two) == told(events)
        assert two_error == error
        assert error is None or error[0] == "wire.truncated"
        assert len(events) <= len(whole) + 1
        carried, none = read(make(carry=True), [data[:cut], b""])
        assert none is None
        assert b"".join(event.raw for event in carried) == data[:cut]


def test_a_main_channel_that_ends_early_is_an_error() -> None:
    data = rig.main_stream()
    error = read(StreamReader(), [data[:-1]])[1]
    assert error is not None
    assert error[:2] == ("wire.truncated", len(data) - 1)
    assert read(StreamReader(), [])[1] is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MADE)), st.data())
def test_changed_bytes(kind: str, data: st.DataObject) -> None:
    make, stream = MADE[kind]
    changed = bytearray(stream)
    for at in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(st.sampled_from([0, 1, 2, 4, 8, 0x10, 0x20, 0x28, 0x7F, 0x80, 0xFF]))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    check_everything(make, bytes(changed), cuts)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(MADE)), st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=4))
def test_any_bytes(kind: str, data: bytes, cuts: list[int]) -> None:
    check_everything(MADE[kind][0], data, [cut for cut in cuts if cut <= len(data)])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("PZ"), st.integers(0, 70), st.booleans()), min_size=1, max_size=120),
    st.lists(st.integers(0, 200_000), max_size=5),
)
@example([("P", 1, True)] * 40, [])
@example([("P", 1, True), ("Z", 2, False)] * 40, [5000])
@example([("Z", 1, False)] * 120 + [("P", 70, False)], [])
def test_any_mixture_of_pages(records: list[tuple[str, int, bool]], cuts: list[int]) -> None:
    body = [rig.normal(0, "a")]
    for kind, index, is_named in records:
        body.append((rig.normal if kind == "P" else rig.zero)(index, "a" if is_named else ""))
    data = ram(*body, EOS, FOOTER, b"\0")
    check_everything(StreamReader, data, [cut for cut in cuts if cut < len(data)])
    events, error = read(StreamReader(), [data])
    assert (error is not None) == any(index >= 64 for _, index, _ in records)
    if error is None:
        contents = [content for one in told(events) if one[0] is PageBatch for content in one[3]]
        assert len(contents) == len(body)
        for (kind, index, _), content in zip(records, contents[1:], strict=True):
            assert content == (rig.page(index) if kind == "P" else b"\0")


def check_everything(make: Callable[..., Reader], data: bytes, cuts: list[int]) -> None:
    events, error = read(make(), [data])
    again, again_error = read(make(), pieces(data, cuts))
    assert told(again) == told(events)
    assert again_error == error
    if len(data) < 2000:
        single, single_error = read(make(), bytewise(data))
        assert told(single) == told(events)
        assert single_error == error
    length = sum(len(event.raw) for event in events)
    assert data.startswith(b"".join(event.raw for event in events))
    assert error is not None or length == len(data)
    assert error is None or 0 <= error[1] <= len(data)
    assert [event for event in events if encode(event) != event.raw] == []
    carried, carried_error = read(make(carry=True), pieces(data, cuts))
    assert carried_error is None
    assert b"".join(event.raw for event in carried) == data
    use(events)


def use(events: list[Event]) -> None:
    """What is built on events raises nothing else either."""
    rebuild, summary = RamRebuild(most_bytes=1 << 22), StreamSummary()
    try:
        for event in events:
            rebuild.apply(event)
            if isinstance(event, Command) and event.number == q.MIG_CMD_POSTCOPY_RAM_DISCARD:
                parse_ram_discard(event)
    except WireError:
        pass
    if events and not isinstance(events[0], MultifdPacket):
        for event in events:
            summary.add(event)
        summary.as_dict()


# what contradicts the format, and where


@pytest.mark.parametrize(
    ("data", "code", "offset"),
    [
        (b"QEVX" + bytes(4), "wire.malformed", 0),
        (struct.pack(">II", q.QEMU_VM_FILE_MAGIC, 2), "wire.malformed", 0),
        (HEADER + struct.pack(">BI", q.QEMU_VM_CONFIGURATION, 1 << 20), "wire.limit", 8),
        (stream_of(rig.part()), "wire.malformed", 19),
        (stream_of(FOOTER), "wire.malformed", 19),
        (stream_of(rig.command(q.MIG_CMD_PING, b"x")), "wire.malformed", 19),
        (stream_of(rig.command(q.MIG_CMD_POSTCOPY_ADVISE, b"x")), "wire.malformed", 19),
        (stream_of(struct.pack(">BI", q.QEMU_VM_VMDESCRIPTION, 1 << 30)), "wire.limit", 19),
        (stream_of(rig.start(), rig.zero(1)), "wire.malformed", 36),
        (stream_of(rig.start(), struct.pack(">Q", PAGE | 4), rig.listing({"a": 5})[8:]), "wire.malformed", 44),
        (
            stream_of(rig.start(), struct.pack(">Q", 3 * PAGE | 4), rig.listing({"a": PAGE})[8:] * 2),
            "wire.malformed",
            54,
        ),
        (stream_of(rig.start(), struct.pack(">Q", PAGE | 4), rig.listing({"a": 2 * PAGE})[8:]), "wire.malformed", 44),
    ],
)
def test_contradictions_name_their_place(data: bytes, code: str, offset: int) -> None:
    events, error = read(StreamReader(), [data])
    assert error is not None
    assert error[:2] == (code, offset)
    assert read(StreamReader(), bytewise(data))[1] == error
    assert sum(len(event.raw) for event in events) == offset


@pytest.mark.parametrize(
    "records",
    [
        rig.zero(64, "a"),
        rig.zero(0, "b"),
        rig.zero(0),
        rig.record(0, q.RAM_SAVE_FLAG_ZERO, "a")[:8] + b"\0\0",
        rig.record(0, q.RAM_SAVE_FLAG_XBZRLE, "a", b"\2\0\0"),
        rig.record(0, q.RAM_SAVE_FLAG_XBZRLE, "a", b"\1\x20\0"),
        rig.record(0, q.RAM_SAVE_FLAG_COMPRESS_PAGE, "a", struct.pack(">I", 5000)),
    ],
)
def test_records_that_do_not_fit(records: bytes) -> None:
    data = ram(records)
    error = read(StreamReader(), [data])[1]
    assert error is not None
    assert error[:3] == ("wire.malformed", len(data) - len(records), "ram")


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", q.MULTIFD_MAGIC, 2) + bytes(56),
        HELLO + packet(normals=range(100), zeros=range(100))[:1344],
        HELLO + packet(normals=[1], size=5)[:1344],
        HELLO + packet(normals=[1], flags=q.MULTIFD_FLAG_ZSTD, size=1 << 30)[:1344],
        HELLO + packet(normals=[1], flags=q.MULTIFD_FLAG_ZSTD, payload=b"") + b"x",
        HELLO + packet("x" * 300),
        HELLO + bytes(12),
    ],
)
def test_packets_that_do_not_fit(data: bytes) -> None:
    error = read(MultifdReader(), [data])[1]
    assert error is not None
    assert error[0] in ("wire.malformed", "wire.limit")


def test_an_error_stays() -> None:
    reader = StreamReader()
    for _ in range(2):
        with pytest.raises(WireError) as caught:
            reader.feed(b"no stream")
        assert (caught.value.offset, caught.value.exit_status) == (0, 3)
    with pytest.raises(WireError):
        reader.close()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"\x55 what is this", "a section of type 0x55"),
        (rig.start("dirty-bitmap", 3) + b"anything", "device state"),
        (rig.start(version=5) + b"anything", "device state"),
        (rig.subsection("configuration/later", b"anything"), "a subsection"),
        (rig.subsection("configuration/target-page-bits", struct.pack(">I", 14)), "pages of 2^14"),
        (
            rig.subsection("configuration/capabilities", struct.pack(">I", 1) + rig.name("mapped-ram"))
            + rig.start()
            + b"x",
            "mapped",
        ),
        (rig.start() + rig.record(0, q.RAM_SAVE_FLAG_HOOK, "a"), "a RAM record"),
        (rig.command(q.MIG_CMD_ENABLE_COLO) + b"anything", "COLO"),
        (b"\0after", "bytes after"),
    ],
)
def test_what_is_unknown_is_carried(tail: bytes, reason: str) -> None:
    data = stream_of(tail)
    for parts in ([data], bytewise(data)):
        events, error = read(StreamReader(), parts)
        assert error is None
        assert b"".join(event.raw for event in events) == data
        assert isinstance(events[-1], Opaque)
        assert events[-1].reason.startswith(reason)


def test_blocks_with_page_sizes_and_addresses() -> None:
    advise = rig.command(q.MIG_CMD_POSTCOPY_ADVISE, struct.pack(">QQ", PAGE | 1 << 21, PAGE))
    blocks = rig.name("huge") + struct.pack(">QQ", 1 << 22, 1 << 21) + rig.name("small") + struct.pack(">Q", PAGE)
    total = struct.pack(">Q", (1 << 22) + PAGE | q.RAM_SAVE_FLAG_MEM_SIZE)
    data = stream_of(advise, rig.start(), total, blocks, EOS, FOOTER, b"\0")
    for parts in ([data], bytewise(data)):
        events, error = read(StreamReader(), parts)
        assert error is None
        listed = [(one.name, one.page_size) for one in events if isinstance(one, RamBlockListed)]
        assert listed == [("huge", 1 << 21), ("small", None)]
    shared = rig.subsection("configuration/capabilities", struct.pack(">I", 1) + rig.name("x-ignore-shared"))
    listing = rig.listing({"a": PAGE, "b": PAGE}, struct.pack(">Q", 7))
    events, error = read(StreamReader(), [stream_of(shared, rig.start(), listing, EOS, FOOTER, b"\0")])
    assert error is None
    assert [one.address for one in events if isinstance(one, RamBlockListed)] == [7, 7]


def test_a_package_ends_where_it_says() -> None:
    inner = rig.start("cpu", 9, q.QEMU_VM_SECTION_FULL, 1) + b"state"
    good = stream_of(rig.command(q.MIG_CMD_PACKAGED, struct.pack(">I", len(inner))), inner, b"\0")
    events, error = read(StreamReader(), [good])
    assert error is None
    assert [type(event).__name__ for event in events[-3:]] == ["SectionBegun", "Opaque", "StreamEnded"]
    for length in (3, len(rig.start("cpu", 9)) - 1):
        bad = stream_of(rig.command(q.MIG_CMD_PACKAGED, struct.pack(">I", length)), inner, b"\0")
        assert read(StreamReader(), [bad])[1] == read(StreamReader(), bytewise(bad))[1]
        error = read(StreamReader(), [bad])[1]
        assert error is not None
        assert "package" in error[3]
    nested = rig.command(q.MIG_CMD_PACKAGED, struct.pack(">I", 9)) * 2
    error = read(StreamReader(), [stream_of(nested)])[1]
    assert error is not None
    assert "package inside" in error[3]


def test_memory_stays_bounded() -> None:
    """A hundred megabytes of pages and of device state through a reader that keeps none of them."""
    reader = StreamReader()
    reader.feed(ram(rig.normal(0, "a")))
    run = b"".join(rig.normal(index % 64) for index in range(256))
    tracemalloc.start()
    for _ in range(100):
        reader.feed(run[:-100])
        reader.feed(run[-100:])
    reader.feed(EOS + FOOTER + rig.start("cpu", 9, q.QEMU_VM_SECTION_FULL))
    for _ in range(100):
        reader.feed(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * limits.MIB


def test_what_is_announced_is_not_allocated() -> None:
    tracemalloc.start()
    for data in (
        ram(blocks={"a": 1 << 60}),
        stream_of(struct.pack(">BI", q.QEMU_VM_VMDESCRIPTION, limits.WIRE_VMDESCRIPTION_MAX)),
        stream_of(rig.command(q.MIG_CMD_PACKAGED, struct.pack(">I", 0xFFFFFFFF))),
    ):
        read(StreamReader(), [data])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limits.MIB


def test_too_many_blocks() -> None:
    listing = struct.pack(">Q", 1 << 40 | q.RAM_SAVE_FLAG_MEM_SIZE) + b"".join(
        rig.name(f"b{number}") + struct.pack(">Q", PAGE) for number in range(limits.WIRE_BLOCKS_MAX + 1)
    )
    error = read(StreamReader(), [stream_of(rig.start(), listing)])[1]
    assert error is not None
    assert error[0] == "wire.limit"


def test_events_never_show_content() -> None:
    for make, data in MADE.values():
        for event in read(make(), [data])[0]:
            assert "bytes, sha256=" in repr(event)
            assert len(repr(event)) < 120


@given(st.lists(st.sampled_from("PZ"), min_size=1, max_size=60))
@example(["P"] * 50)
@example(["P", "Z"] * 25)
def test_batches_are_views(kinds: list[str]) -> None:
    reader = StreamReader()
    reader.feed(ram())
    records = [rig.normal(0, "a"), *((rig.normal if kind == "P" else rig.zero)(at) for at, kind in enumerate(kinds, 1))]
    data = np.frombuffer(b"".join(records), np.uint8)
    (batch,) = reader.feed(data.data)
    assert isinstance(batch, PageBatch)
    assert batch.block == "a"
    expected = [0, *(at for at, kind in enumerate(kinds, 1) if kind == "P")]
    assert (batch.page_offsets // PAGE).tolist() == expected
    assert (batch.zero_offsets // PAGE).tolist() == [at for at, kind in enumerate(kinds, 1) if kind == "Z"]
    assert not batch.fills.any()
    assert batch.offsets.dtype == np.uint64
    assert batch.pages().tobytes() == b"".join(map(rig.page, expected))
    found = []
    for offsets, pages in batch.page_runs():
        assert np.shares_memory(pages, data)
        assert pages.shape == (len(offsets), PAGE)
        found += [(offset // PAGE, one.tobytes()) for offset, one in zip(offsets.tolist(), pages, strict=True)]
    assert found == [(index, rig.page(index)) for index in expected]


def test_packets_are_views() -> None:
    data = np.frombuffer(HELLO + packet(normals=[3, 4], zeros=[9]), np.uint8)
    *_, head, pages = MultifdReader().feed(data.data)
    assert isinstance(head, MultifdPacket)
    assert isinstance(pages, PacketPages)
    assert head.zero_offsets.tolist() == [9 * PAGE]
    assert pages.page_offsets.tolist() == [3 * PAGE, 4 * PAGE]
    assert np.shares_memory(pages.pages, data)
