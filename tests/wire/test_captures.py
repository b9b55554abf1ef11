"""Streams of real QEMU: rebuilt RAM is the source's, and nothing is lost on the way."""

import random
from collections.abc import Iterator

import pytest

from sealane.wire import (
    CompressedPage,
    Event,
    MultifdPacket,
    MultifdReader,
    Opaque,
    PackageBegun,
    PacketPages,
    PacketPayload,
    PageBatch,
    RamRebuild,
    StreamReader,
    XbzrlePage,
    iterate_events,
    reader_for,
)
from sealane.wire.order import in_order
from sealane.wire.summary import StreamSummary
from sealane.wire.writer import encode
from tests.wire.rig import CAPTURES, capture_names, connections, pieces, provenance, read, told
from tests.wire.test_readers import check_everything

NAMES = capture_names()


def all_events(name: str, size: int = 1 << 18) -> Iterator[tuple[int, Event]]:
    main: list[Iterator[Event]] = []
    channels: list[Iterator[Event]] = []
    others: list[Iterator[Event]] = []
    for data in connections(name):
        reader = reader_for(data)
        events = iterate_events(reader, pieces(data, range(size, len(data), size)))
        kind = main if isinstance(reader, StreamReader) else channels if isinstance(reader, MultifdReader) else others
        kind.append(events)
    return in_order(main[0], channels, others)


@pytest.mark.parametrize("name", NAMES)
def test_ram_is_rebuilt_hash_for_hash(name: str) -> None:
    truth = provenance(name)
    rebuild = RamRebuild()
    for connection, event in all_events(name):
        rebuild.apply(event, connection=connection)
    rebuilt = {block.name: block for block in rebuild.digests()}
    compared = 0
    for block, facts in truth["blocks"].items():
        assert rebuilt[block].length == facts["length"]
        if "x-ignore-shared" in truth["capabilities"] and block == "pc.ram":
            assert rebuilt[block].pages_received == 0
            continue
        assert rebuilt[block].sha256 == facts["sha256"], block
        compared += 1
    assert compared
    assert rebuild.unreadable_pages == 0


@pytest.mark.parametrize("name", NAMES)
def test_reading_and_writing_is_the_identity(name: str) -> None:
    for data in [*connections(name), *connections(name, "return.zst")]:
        events, error = read(reader_for(data), [data])
        assert error is None
        assert b"".join(event.raw for event in events) == data
        assert all(encode(event) == event.raw for event in events)
        offset = 0
        for event in events:
            assert event.offset == offset
            offset += len(event.raw)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_do_not_matter(name: str) -> None:
    chance = random.Random(name)
    for data in [*connections(name), *connections(name, "return.zst")]:
        whole = told(read(reader_for(data), [data])[0])
        for count in (3, 50, 2000):
            cuts = [chance.randrange(len(data) + 1) for _ in range(count)]
            events, error = read(reader_for(data), pieces(data, cuts))
            assert error is None
            assert told(events) == whole


@pytest.mark.parametrize("name", ["single-q35-10.0.2", "multifd-7.2.22", "postcopy-10.0.2"])
def test_byte_by_byte(name: str) -> None:
    for data in connections(name):
        start = data[: 1 << 17]
        whole = read(reader_for(data), [start])
        single = read(reader_for(data), [start[at : at + 1] for at in range(len(start))])
        assert told(single[0]) == told(whole[0])
        assert single[1] == whole[1]


@pytest.mark.parametrize("name", ["single-pc-10.0.2", "multifd-7.2.22", "postcopy-preempt-10.0.2", "xbzrle-10.0.2"])
def test_cut_around_every_event(name: str) -> None:
    for data in connections(name):
        edges = {event.offset for event in read(reader_for(data), [data])[0]}
        for cut in sorted(
            {cut for edge in edges for cut in (edge - 1, edge, edge + 1, edge + 9) if 4 <= cut < len(data)}
        ):
            events, error = read(reader_for(data), [data[:cut]])
            assert error is None or error[0] == "wire.truncated"
            length = sum(len(event.raw) for event in events)
            assert b"".join(event.raw for event in events) == data[:length]
            assert error is not None or length == cut


@pytest.mark.parametrize("name", ["single-q35-7.2.22", "multifd-zstd-7.2.22", "postcopy-10.0.2", "xbzrle-10.0.2"])
def test_changed_captures(name: str) -> None:
    chance = random.Random(name)
    for data in connections(name):
        make = type(reader_for(data))
        edges = [event.offset for event in read(make(), [data])[0]]
        for _ in range(25):
            changed = bytearray(data)
            # heads are what matters: near the beginning of an event, or anywhere
            at = min(
                chance.choice([chance.choice(edges) + chance.randrange(40), chance.randrange(len(data))]), len(data) - 1
            )
            changed[at] ^= 1 << chance.randrange(8)
            check_everything(make, bytes(changed), [chance.randrange(len(data)) for _ in range(20)])


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_explained(name: str) -> None:
    truth = provenance(name)
    summary = StreamSummary()
    for connection, event in all_events(name):
        summary.add(event, connection=connection)
    facts = summary.as_dict()
    assert facts["machine"].startswith("pc-")
    assert {block["name"] for block in facts["blocks"]} >= set(truth["blocks"])
    if truth["how"] == "postcopy":
        assert {"PACKAGED", "POSTCOPY_LISTEN", "POSTCOPY_RAM_DISCARD"} <= set(facts["commands"])
    else:
        assert facts["devices_why_not"] == ""
        assert {"cpu", "serial", "timer"} <= {device["name"] for device in facts["devices"]}
    if name.startswith("vtpm"):
        assert "tpm-emulator" in {device["name"] for device in facts["devices"]}
    assert set(facts["opaque_bytes"]) == {"device state"}
    if truth["how"] == "running" and "multifd" not in truth["capabilities"]:
        assert facts["iterations"] >= 3
    assert len(facts["multifd_channels"]) == truth["parameters"].get("multifd-channels", 0)


def test_the_captures_hold_what_they_are_for() -> None:
    kinds: dict[str, set[type[Event]]] = {}
    for name in NAMES:
        kinds[name] = {type(event) for _, event in all_events(name)}
    assert XbzrlePage in kinds["xbzrle-10.0.2"]
    assert CompressedPage in kinds["compress-7.2.22"]
    assert PackageBegun in kinds["postcopy-preempt-10.0.2"]
    assert PacketPayload in kinds["multifd-zstd-7.2.22"]
    assert all(Opaque in found for found in kinds.values())


def test_the_captures_are_small() -> None:
    sizes = [path.stat().st_size for name in NAMES for path in (CAPTURES / name).iterdir()]
    assert max(sizes) < 300_000
    assert sum(sizes) < 4_500_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_quiet_reader_keeps_in_step(name: str, seed: int) -> None:
    """Quiet by chance, piece for piece: it is never lost, and tells of all but pages what a reader that is never quiet tells."""
    chance = random.Random(seed)
    pages = (PageBatch, PacketPages, PacketPayload, MultifdPacket, Opaque)
    for data in connections(name):
        expected = {event.offset: type(event) for event in read(reader_for(data), [data])[0]}
        reader = reader_for(data)
        heard = []
        for part in pieces(data, [chance.randrange(len(data) + 1) for _ in range(60)]):
            reader.quiet = chance.random() < 0.5
            heard += reader.feed(part)
        heard += reader.close()
        assert reader.offset == len(data)
        assert all(expected[event.offset] is type(event) for event in heard if not isinstance(event, pages))
        told_of = {event.offset for event in heard}
        assert all(at in told_of for at, kind in expected.items() if not issubclass(kind, pages))
        syncs = [event.offset for event in heard if isinstance(event, MultifdPacket) and event.is_sync]
        everything = [event for event in read(reader_for(data), [data])[0] if isinstance(event, MultifdPacket)]
        assert syncs == [event.offset for event in everything if event.is_sync]
