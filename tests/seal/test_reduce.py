"""Reduced streams leave the destination's memory as the whole ones would: real captures, and made-up streams by a model."""

import itertools
import random
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealane import wire
from sealane.seal.reduce import LaneReducer
from sealane.seal.seen import PagesSeen
from sealane.wire import constants as q
from sealane.wire.order import in_order
from tests.wire import rig

KEY = bytes(range(32))


def reduce_lanes(
    lanes: list[bytes], chance: random.Random, *, toggle: bool = True, cut: Callable[[], int] | None = None
) -> tuple[list[bytes], list[LaneReducer]]:
    """Every lane through its reducer, in pieces whose turns are random: as threads would, lanes run ahead of each other."""
    seen = PagesSeen(len(lanes))
    reducers = [LaneReducer(seen, number, KEY) for number in range(len(lanes))]
    for reducer in reducers:
        if not toggle or chance.random() < 0.7:
            reducer.activate()
    left, out = [memoryview(bytearray(lane)) for lane in lanes], [bytearray() for _ in lanes]
    size = cut or (lambda: chance.choice([1, 7, 100, 4104, 5000, 50_000, 200_000]))
    while any(left):
        at = chance.choice([number for number, rest in enumerate(left) if rest])
        count = size()
        piece = bytearray(reducers[at].tail + left[at][:count])
        left[at] = left[at][count:]
        sent = reducers[at].feed(memoryview(piece))
        out[at] += piece if sent is None else b"".join(bytes(part) for part in sent)
        piece[:] = b"\xee" * len(piece)  # the lane receives into the same buffer again
        if toggle and chance.random() < 0.1:
            if reducers[at].active:
                out[at] += b"".join(bytes(part) for part in reducers[at].deactivate())
            else:
                reducers[at].activate()
    for at, reducer in enumerate(reducers):
        out[at] += b"".join(bytes(part) for part in reducer.deactivate())
    return [bytes(one) for one in out], reducers


def events_of(lanes: list[bytes]) -> Iterator[tuple[int, wire.Event]]:
    kinds: dict[type, list[Iterator[wire.Event]]] = defaultdict(list)
    for lane in lanes:
        reader = wire.reader_for(lane)
        kinds[type(reader)].append(wire.iterate_events(reader, [lane]))
    others = kinds[wire.PreemptReader]
    return in_order(kinds[wire.StreamReader][0], kinds[wire.MultifdReader], others)


def memory(lanes: list[bytes]) -> dict[str, str]:
    rebuild = wire.RamRebuild()
    for connection, event in events_of(lanes):
        rebuild.apply(event, connection=connection)
    return {block.name: block.sha256 for block in rebuild.digests()}


@pytest.mark.parametrize("name", rig.capture_names())
def test_memory_is_the_same_with_real_streams(name: str) -> None:
    lanes = rig.connections(name)
    truth = rig.provenance(name)["blocks"]
    for seed, toggle in ((1, False), (2, True), (3, True)):
        out, _ = reduce_lanes(lanes, random.Random(seed), toggle=toggle)
        assert memory(out) == memory(lanes), seed
        if "x-ignore-shared" not in rig.provenance(name)["capabilities"]:
            rebuilt = memory(out)
            assert all(rebuilt[block] == facts["sha256"] for block, facts in truth.items())


@pytest.mark.parametrize("name", rig.capture_names())
def test_nothing_changes_while_not_active(name: str) -> None:
    lanes = rig.connections(name)
    seen = PagesSeen(len(lanes))
    for number, lane in enumerate(lanes):
        reducer = LaneReducer(seen, number, KEY)
        assert all(reducer.feed(memoryview(piece)) is None for piece in rig.pieces(lane, range(9999, len(lane), 9999)))
        assert reducer.deactivate() == []
    assert not seen.used


# made-up streams

CONTENTS = 4
PAGES = 6


@dataclass
class Script:
    """What QEMU sends: for each epoch, for each lane, pages and their contents (0: a zero page) in order."""

    epochs: list[list[list[tuple[int, int]]]]
    has_flush: bool
    lanes: int = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = len(self.epochs[0])


def body(content: int) -> bytes:
    return rig.page(content) if content else bytes(rig.PAGE)


def main_lane(script: Script) -> bytes:
    """Lane 0: its own pages in RAM sections, each of which ends an epoch."""
    sync = (rig.FLUSH if script.has_flush else b"") + rig.EOS + rig.FOOTER
    out = rig.HEADER + rig.CONFIGURATION + rig.start() + rig.listing({"a": PAGES * rig.PAGE, "b": rig.PAGE}) + sync
    for lanes in script.epochs:
        out += rig.part()
        for number, (index, content) in enumerate(lanes[0]):
            block = "" if number else "a"
            if content:
                out += rig.record(index * rig.PAGE, q.RAM_SAVE_FLAG_PAGE, block, body(content))
            else:
                out += rig.record(index * rig.PAGE, q.RAM_SAVE_FLAG_ZERO, block, b"\0")
        out += sync
    return out + rig.part(q.QEMU_VM_SECTION_END) + rig.EOS + rig.FOOTER + b"\0"


def channel(script: Script, lane: int) -> bytes:
    out = rig.HELLO + rig.packet(flags=q.MULTIFD_FLAG_SYNC)  # RAM's first section has a sync
    for lanes in script.epochs:
        pages = lanes[lane]
        for at in range(0, len(pages), 3):
            group = pages[at : at + 3]
            normals = [(index, content) for index, content in group if content]
            zeros = [index for index, content in group if not content]
            payload = b"".join(body(content) for _, content in normals)
            out += rig.packet(normals=[index for index, _ in normals], zeros=zeros, payload=payload, number=1)
        out += rig.packet(flags=q.MULTIFD_FLAG_SYNC)
    return out


def streams(script: Script) -> list[bytes]:
    return [main_lane(script), *(channel(script, lane) for lane in range(1, script.lanes))]


def writes(lanes: list[bytes], has_flush: bool) -> dict[int, dict[tuple[int, int], bytes]]:
    """By page, then by epoch and lane: what the lane wrote to it last in that epoch."""
    found: dict[int, dict[tuple[int, int], bytes]] = defaultdict(dict)
    for number, lane in enumerate(lanes):
        epoch = 0

        def note(offsets: Iterable[int], contents: Iterable[bytes], number: int = number) -> None:
            for offset, content in zip(offsets, contents, strict=True):
                found[offset // rig.PAGE][epoch, number] = content  # noqa: B023 - called at once

        sync_after = False
        missing = 0
        for event in wire.iterate_events(wire.reader_for(lane), [lane]):
            match event:
                case wire.PageBatch():
                    for offset, start, is_page in zip(event.offsets, event.starts, event.is_page, strict=True):
                        content = event.raw[start : start + rig.PAGE] if is_page else bytes(rig.PAGE)
                        note([int(offset)], [bytes(content)])
                case wire.MultifdPacket():
                    note(event.zero_offsets.tolist(), [bytes(rig.PAGE)] * len(event.zero_offsets))
                    sync_after, missing = event.is_sync, len(event.page_offsets)
                case wire.PacketPages():
                    note(event.page_offsets.tolist(), [page.tobytes() for page in event.pages])
                    missing -= len(event.pages)
                case wire.MultifdFlush() if has_flush:
                    epoch += 1
                case wire.RamSectionEnded() if not has_flush:
                    epoch += 1
                case _:
                    pass
            if sync_after and not missing:
                epoch, sync_after = epoch + 1, False
    return found


def possible(lanes: list[bytes], has_flush: bool) -> dict[int, set[bytes]]:
    """For each page what it may hold in the end: within an epoch any lane may be the last one."""
    result = {}
    for page, by in writes(lanes, has_flush).items():
        last = max(epoch for epoch, _ in by)
        result[page] = {content for (epoch, _), content in by.items() if epoch == last}
    return result


def scripts(lanes: int) -> st.SearchStrategy[Script]:
    page = st.tuples(st.integers(0, PAGES - 1), st.integers(0, CONTENTS - 1))
    epoch = st.lists(st.lists(page, max_size=5), min_size=lanes, max_size=lanes)
    return st.builds(Script, st.lists(epoch, min_size=1, max_size=6), st.booleans())


def check(script: Script, seed: int, *, toggle: bool) -> None:
    lanes = streams(script)
    chance = random.Random(seed)
    out, _ = reduce_lanes(lanes, chance, toggle=toggle, cut=lambda: chance.choice([1, 60, 1400, 4100, 9000, 30_000]))
    original, reduced = possible(lanes, script.has_flush), possible(out, script.has_flush)
    for page, contents in original.items():
        assert reduced.get(page, {bytes(rig.PAGE)}) <= contents, page


@settings(max_examples=150)
@given(script=scripts(1), seed=st.integers(0, 1 << 30), toggle=st.booleans())
def test_a_single_stream_means_the_same(script: Script, seed: int, toggle: bool) -> None:
    check(script, seed, toggle=toggle)


@settings(max_examples=300)
@given(script=scripts(3), seed=st.integers(0, 1 << 30), toggle=st.booleans())
def test_lanes_that_run_ahead_of_each_other_mean_the_same(script: Script, seed: int, toggle: bool) -> None:
    check(script, seed, toggle=toggle)


def rewriting(lanes: int, epochs: int) -> Script:
    """Every epoch sends every page again with the same content, each lane its own pages."""
    mine = [[(index, 1 + index % 3) for index in range(lane, PAGES, lanes)] for lane in range(lanes)]
    return Script([mine] * epochs, has_flush=True)


@pytest.mark.parametrize("lanes", [1, 3])
def test_equal_content_is_sent_once(lanes: int) -> None:
    """In turns that keep the epochs, as QEMU's own waiting does."""
    script = rewriting(lanes, epochs=9)
    seen = PagesSeen(lanes)
    reducers = [LaneReducer(seen, number, KEY) for number in range(lanes)]
    carried = 0
    for epoch in range(9):
        before = Script(script.epochs[: epoch + 1], has_flush=True)
        done = Script(script.epochs[:epoch], has_flush=True) if epoch else None
        for number, reducer in enumerate(reducers):
            if not epoch:
                reducer.activate()
            whole = streams(before)[number].removesuffix(rig.part(q.QEMU_VM_SECTION_END) + rig.EOS + rig.FOOTER + b"\0")
            old = b"" if done is None else streams(done)[number]
            old = old.removesuffix(rig.part(q.QEMU_VM_SECTION_END) + rig.EOS + rig.FOOTER + b"\0")
            sent = reducer.feed(memoryview(reducer.tail + whole[len(old) :]))
            assert sent is not None
            carried += sum(len(part) for part in sent)
    named = 8  # lane 0 names its block once an epoch, and that record always goes
    assert carried < (PAGES + named) * 4200 + lanes * 9 * 3 * 1344 + 2000
    assert sum(reducer.same_bytes for reducer in reducers) >= (9 - 1) * (PAGES - 1) * rig.PAGE


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_that_begin_to_reduce_in_the_first_epoch_know_what_they_sent_from_then_on(lanes: int) -> None:
    """As over a slow line: nobody reduces from the first byte, and two passes may be all there are."""
    script = rewriting(lanes, epochs=2)
    ending = rig.part(q.QEMU_VM_SECTION_END) + rig.EOS + rig.FOOTER + b"\0"
    seen = PagesSeen(lanes)
    reducers = [LaneReducer(seen, number, KEY) for number in range(lanes)]
    streamed = [stream.removesuffix(ending) for stream in streams(Script(script.epochs[:1], has_flush=True))]
    for reducer, stream in zip(reducers, streamed, strict=True):
        assert reducer.feed(memoryview(stream[: len(stream) // 2])) is None
    for reducer, stream in zip(reducers, streamed, strict=True):
        reducer.activate()
        reducer.feed(memoryview(reducer.tail + stream[len(stream) // 2 :]))
    for reducer, stream, whole in zip(reducers, streamed, streams(script), strict=True):
        reducer.feed(memoryview(reducer.tail + whole.removesuffix(ending)[len(stream) :]))
    left_out = sum(reducer.same_bytes for reducer in reducers) // rig.PAGE
    assert PAGES // 2 - 2 * lanes <= left_out <= PAGES // 2 + lanes


def test_pages_of_zeros_become_zero_records() -> None:
    pages = rig.normal(0, "a") + b"".join(
        rig.record(index * rig.PAGE, q.RAM_SAVE_FLAG_PAGE, "", bytes(rig.PAGE)) for index in (1, 2, 4)
    )
    stream = rig.HEADER + rig.start() + rig.listing({"a": 8 * rig.PAGE}) + pages + rig.EOS
    reducer = LaneReducer(PagesSeen(1), 0, KEY)
    reducer.activate()
    out = b"".join(bytes(part) for part in reducer.feed(memoryview(stream)) or [])
    batch = next(event for event in wire.StreamReader().feed(out) if isinstance(event, wire.PageBatch))
    assert batch.zero_offsets.tolist() == [rig.PAGE, 2 * rig.PAGE, 4 * rig.PAGE]
    assert reducer.zero_bytes == 3 * rig.PAGE


@pytest.mark.parametrize(
    "ending",
    [
        rig.command(q.MIG_CMD_POSTCOPY_LISTEN),
        rig.command(q.MIG_CMD_POSTCOPY_RUN),
        rig.command(q.MIG_CMD_POSTCOPY_RAM_DISCARD, b"\0" + rig.name("a") + b"\0" + struct.pack(">QQ", 0, rig.PAGE)),
        rig.command(q.MIG_CMD_PACKAGED, struct.pack(">I", 0)),
        rig.command(q.MIG_CMD_POSTCOPY_RESUME),
        rig.command(q.MIG_CMD_RECV_BITMAP, rig.name("a")),
    ],
)
def test_postcopy_ends_leaving_out(ending: bytes) -> None:
    def section(content: int) -> bytes:
        records = (
            rig.record(index * rig.PAGE, q.RAM_SAVE_FLAG_PAGE, "a" if not index else "", body(content))
            for index in range(3)
        )
        return rig.part() + b"".join(records) + rig.EOS + rig.FOOTER

    head = rig.HEADER + rig.start() + rig.listing({"a": 8 * rig.PAGE}) + rig.EOS + rig.FOOTER
    reducer = LaneReducer(PagesSeen(1), 0, KEY)
    reducer.activate()
    reducer.feed(memoryview(head + section(1)))
    reducer.feed(memoryview(section(1)))
    assert reducer.same_bytes == 2 * (rig.PAGE + 8)
    rest = ending + section(1)
    assert b"".join(bytes(part) for part in reducer.feed(memoryview(rest)) or []) == rest
    assert reducer.same_bytes == 2 * (rig.PAGE + 8)


@given(data=st.binary(max_size=400), first=st.sampled_from(["main", "channel", "none"]), sizes=st.integers(1, 97))
def test_what_cannot_be_read_goes_as_it_is(data: bytes, first: str, sizes: int) -> None:
    head = {"main": rig.HEADER + rig.start() + rig.listing({"a": 8 * rig.PAGE}), "channel": rig.HELLO, "none": b""}[
        first
    ]
    lane = head + data
    reducer = LaneReducer(PagesSeen(2), 0, KEY)
    reducer.activate()
    out = b""
    for piece in rig.pieces(lane, range(sizes, len(lane), sizes)):
        sent = reducer.feed(memoryview(reducer.tail + piece))
        out += piece if sent is None else b"".join(bytes(part) for part in sent)
    out += b"".join(bytes(part) for part in reducer.deactivate())
    assert out == lane


# what passes while a lane is not active, or cannot be read, is not known afterwards


def section(*pages: tuple[int, int]) -> bytes:
    """A RAM section of pages and their contents; the first record names its block and is always sent."""
    records = b"".join(
        rig.record(index * rig.PAGE, q.RAM_SAVE_FLAG_PAGE, "" if number else "a", body(content))
        for number, (index, content) in enumerate(pages)
    )
    return rig.part() + records + rig.EOS + rig.FOOTER


def fed(reducer: LaneReducer, data: bytes) -> bytes:
    sent = reducer.feed(memoryview(reducer.tail + data))
    return data if sent is None else b"".join(bytes(part) for part in sent)


def active_main() -> LaneReducer:
    reducer = LaneReducer(PagesSeen(1), 0, KEY)
    reducer.activate()
    fed(reducer, rig.HEADER + rig.start() + rig.listing({"a": 8 * rig.PAGE}) + rig.EOS + rig.FOOTER)
    return reducer


def active_channel() -> LaneReducer:
    seen = PagesSeen(1)
    seen.list_block("a", 8 * rig.PAGE)
    reducer = LaneReducer(seen, 0, KEY)
    reducer.activate()
    fed(reducer, rig.HELLO)
    return reducer


def test_a_page_that_passed_while_not_active_is_sent_again() -> None:
    reducer, page = active_main(), section((0, 1), (1, 1))
    assert fed(reducer, page) == page
    assert fed(reducer, page) != page
    reducer.deactivate()
    fed(reducer, section((0, 1), (1, 2)))
    reducer.activate()
    assert fed(reducer, page) == page


PACKET = rig.packet(normals=[1], number=1)
OTHER = rig.packet(normals=[1], payload=rig.page(7), number=2)


def test_a_packet_that_passed_while_not_active_is_sent_again() -> None:
    reducer = active_channel()
    assert fed(reducer, PACKET) == PACKET
    assert len(fed(reducer, PACKET)) < rig.PAGE
    reducer.deactivate()
    fed(reducer, OTHER)
    reducer.activate()
    assert fed(reducer, PACKET) == PACKET


def test_a_packet_of_which_a_part_was_sent_before_is_not_known() -> None:
    reducer = active_channel()
    fed(reducer, PACKET)
    reducer.deactivate()
    fed(reducer, OTHER[:900])
    reducer.activate()
    assert fed(reducer, OTHER[900:]) == OTHER[900:]
    assert fed(reducer, PACKET) == PACKET


def test_a_packet_that_was_held_when_reducing_ended_is_not_known() -> None:
    reducer = active_channel()
    fed(reducer, PACKET)
    assert fed(reducer, OTHER[:2000]) == b""
    assert b"".join(bytes(part) for part in reducer.deactivate()) == OTHER[:2000]
    fed(reducer, OTHER[2000:])
    reducer.activate()
    assert fed(reducer, PACKET) == PACKET


def test_a_compressed_packet_is_not_known() -> None:
    reducer = active_channel()
    fed(reducer, PACKET)
    compressed = rig.packet(normals=[1], flags=q.MULTIFD_FLAG_ZSTD, payload=b"compressed", number=3)
    assert fed(reducer, compressed) == compressed
    assert fed(reducer, PACKET) == PACKET


@pytest.mark.parametrize(
    "record",
    [
        rig.record(rig.PAGE, q.RAM_SAVE_FLAG_XBZRLE, "", b"\1\0\3\4\1x"),
        rig.record(rig.PAGE, q.RAM_SAVE_FLAG_COMPRESS_PAGE, "", struct.pack(">I", 3) + b"xyz"),
    ],
    ids=["xbzrle", "compressed"],
)
def test_a_page_in_another_form_is_not_known(record: bytes) -> None:
    reducer, page = active_main(), section((0, 1), (1, 1))
    fed(reducer, page)
    other = rig.part() + record + rig.EOS + rig.FOOTER
    assert fed(reducer, other) == other
    assert fed(reducer, page) == page


def test_a_zero_page_is_known_by_its_content() -> None:
    reducer = active_main()
    fed(reducer, rig.part() + rig.normal(0, "a") + rig.zero(1) + rig.EOS + rig.FOOTER)
    zeros = rig.record(rig.PAGE, q.RAM_SAVE_FLAG_PAGE, "", bytes(rig.PAGE))
    out = fed(reducer, rig.part() + zeros + rig.EOS + rig.FOOTER)
    assert out == rig.part() + rig.EOS + rig.FOOTER


def test_a_lane_that_follows_no_more_sends_everything_and_so_do_the_others() -> None:
    seen = PagesSeen(2)
    seen.list_block("a", 8 * rig.PAGE)
    lanes = [LaneReducer(seen, number, KEY) for number in range(2)]
    lanes[0].activate()
    fed(lanes[0], rig.HELLO)
    assert fed(lanes[0], PACKET) == PACKET
    lanes[1].give_up()
    assert fed(lanes[0], PACKET) == PACKET
    for activate in (False, True):
        if activate:
            lanes[1].activate()
        assert (lanes[1].feed(memoryview(PACKET)) is None) == (not activate)
        assert fed(lanes[1], PACKET) == PACKET
    assert lanes[1].deactivate() == []


# the table alone


def digests(*values: int) -> Any:
    return np.array([(value, value) for value in values], np.uint64)


def offsets(*pages: int) -> Any:
    return np.array(pages, np.uint64) * np.uint64(rig.PAGE)


@pytest.fixture
def seen() -> PagesSeen:
    table = PagesSeen(2)
    table.list_block("a", 8 * rig.PAGE)
    return table


def everybody_goes_on(seen: PagesSeen) -> None:
    seen.next_epoch(0)
    seen.next_epoch(1)


def test_known_content_need_not_be_sent(seen: PagesSeen) -> None:
    assert seen.needed(0, "a", offsets(1, 2), digests(7, 8)).tolist() == [True, True]
    assert seen.needed(0, "a", offsets(1, 2), digests(7, 9)).tolist() == [False, True]
    everybody_goes_on(seen)
    assert seen.needed(1, "a", offsets(1, 2), digests(7, 9)).tolist() == [False, False]


def test_a_lane_behind_may_still_send_something_else(seen: PagesSeen) -> None:
    seen.needed(0, "a", offsets(1), digests(7))
    everybody_goes_on(seen)
    seen.next_epoch(0)
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]
    seen.next_epoch(1)
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [False]


def test_two_lanes_in_one_epoch_leave_a_page_unknown(seen: PagesSeen) -> None:
    seen.needed(0, "a", offsets(1), digests(7))
    assert seen.needed(1, "a", offsets(1), digests(7)).tolist() == [True]
    assert seen.needed(1, "a", offsets(1), digests(7)).tolist() == [True]
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]
    everybody_goes_on(seen)
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]


def test_an_older_epoch_changes_nothing(seen: PagesSeen) -> None:
    seen.next_epoch(0)
    seen.needed(0, "a", offsets(1), digests(7))
    assert seen.needed(1, "a", offsets(1), digests(8)).tolist() == [True]
    seen.forget(1, "a", offsets(1))
    seen.next_epoch(1)
    everybody_goes_on(seen)
    assert seen.needed(1, "a", offsets(1), digests(7)).tolist() == [False]


def test_a_page_that_comes_twice_is_sent_twice(seen: PagesSeen) -> None:
    seen.needed(0, "a", offsets(1), digests(7))
    assert seen.needed(0, "a", offsets(1, 1), digests(8, 7)).tolist() == [True, True]
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]


def test_what_passed_unread_makes_nothing_known(seen: PagesSeen) -> None:
    seen.passed_unread(1)
    seen.needed(0, "a", offsets(1), digests(7))
    everybody_goes_on(seen)
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [False]


def test_forgotten_pages_are_sent(seen: PagesSeen) -> None:
    seen.needed(0, "a", offsets(1), digests(7))
    seen.forget(0, "a", offsets(1))
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]


def test_nothing_is_left_out_after_stop(seen: PagesSeen) -> None:
    seen.needed(0, "a", offsets(1), digests(7))
    seen.stop()
    assert seen.needed(0, "a", offsets(1), digests(7)).tolist() == [True]


def test_memory_is_bounded(seen: PagesSeen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealane.seal.seen.SEEN_MEMORY_MAX", 5 * 20)
    table = PagesSeen(1)
    table.list_block("small", 5 * rig.PAGE)
    table.list_block("large", rig.PAGE)
    for name, expected in (("small", [False]), ("large", [True]), ("unlisted", [True])):
        table.needed(0, name, offsets(0), digests(7))
        assert table.needed(0, name, offsets(0), digests(7)).tolist() == expected


def test_a_page_outside_its_block_is_sent(seen: PagesSeen) -> None:
    for _ in range(2):
        assert seen.needed(0, "a", offsets(100), digests(7)).tolist() == [True]
    seen.forget(0, "a", offsets(100))
    assert list(itertools.chain(seen.needed(0, "b", offsets(0), digests(7)))) == [True]
