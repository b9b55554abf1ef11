"""Records applied in order, epochs kept apart, payloads opened and nothing more than was announced."""

import random
import struct
import zlib
from hashlib import sha256

import numpy as np
import pytest
import zstandard

from sealane.errors import WireError
from sealane.wire import MultifdReader, Opaque, RamBlockListed, RamRebuild, SectionBegun, StreamReader
from sealane.wire import constants as q
from sealane.wire.order import in_order
from sealane.wire.payload import PagesUnpacker
from sealane.wire.vmdescription import walk_devices
from tests.wire import rig
from tests.wire.rig import CONFIGURATION, EOS, FLUSH, FOOTER, HEADER, HELLO, PAGE, connections, packet, page, read

ZERO = bytes(PAGE)


def ram_of(main: bytes, *channels: bytes) -> bytes:
    """Block `a`, of eight pages, as rebuilt; compared by digest."""
    rebuild = RamRebuild()
    streams = [iter(read(MultifdReader(), [HELLO + data])[0]) for data in channels]
    for number, event in in_order(iter(read(StreamReader(), [main])[0]), streams):
        rebuild.apply(event, connection=number)
    return bytes.fromhex(rebuild.digests()[0].sha256)


def digest(*pages: bytes) -> bytes:
    return sha256(b"".join(pages) + ZERO * (8 - len(pages))).digest()


def main_of(*parts: bytes, setup: bytes = b"") -> bytes:
    listed = rig.listing({"a": 8 * PAGE})
    return b"".join([HEADER, CONFIGURATION, rig.start(), listed, setup, EOS, FOOTER, *parts, b"\0"])


def test_the_last_record_for_a_page_counts() -> None:
    records = [rig.normal(1, "a"), rig.zero(1), rig.normal(2), rig.record(2 * PAGE, q.RAM_SAVE_FLAG_PAGE, "", page(9))]
    again = [rig.zero(3, "a"), rig.normal(3)]
    main = main_of(rig.part(), *records, *again, EOS, FOOTER)
    assert ram_of(main) == digest(ZERO, ZERO, page(9), page(3))


def test_xbzrle_and_compressed_pages() -> None:
    changed = bytearray(page(1))
    changed[3] = 0x55
    changed[200:202] = b"xy"
    data = b"\3\1\x55" + bytes([(196 & 0x7F) | 0x80, 196 >> 7]) + b"\2xy"
    delta = rig.record(PAGE, q.RAM_SAVE_FLAG_XBZRLE, "a", struct.pack(">BH", 1, len(data)) + data)
    packed = zlib.compress(page(5))
    whole = rig.record(0, q.RAM_SAVE_FLAG_COMPRESS_PAGE, "", struct.pack(">I", len(packed)) + packed)
    main = main_of(rig.part(), rig.normal(1, "a"), delta, whole, EOS, FOOTER)
    assert ram_of(main) == digest(page(5), bytes(changed))


@pytest.mark.parametrize("data", [b"\1", b"\0\0", b"\0\5abc", b"\xff\xff\1x", b"\x80\x20\1x"])
def test_xbzrle_that_does_not_fit(data: bytes) -> None:
    delta = rig.record(PAGE, q.RAM_SAVE_FLAG_XBZRLE, "a", struct.pack(">BH", 1, len(data)) + data)
    with pytest.raises(WireError):
        ram_of(main_of(rig.part(), delta, EOS, FOOTER))


def sync(number: int) -> bytes:
    return packet(flags=q.MULTIFD_FLAG_SYNC, number=number)


def other(index: int, content: int, number: int) -> bytes:
    return packet(normals=[index], payload=page(content), number=number)


@pytest.mark.parametrize("has_flush", [True, False])
def test_epochs_order_channels_and_main(has_flush: bool) -> None:
    """A page goes by channel one, then by channel two, then as zero on the main channel, each in an epoch of its own."""
    ends = FLUSH + EOS if has_flush else EOS
    parts = [rig.part() + ends + FOOTER] * 2
    main = main_of(
        *parts, rig.part() + rig.zero(2, "a") + rig.zero(3) + ends + FOOTER, setup=FLUSH if has_flush else b""
    )
    one = sync(0) + other(1, 11, 1) + other(2, 12, 2) + sync(5) + sync(6) + sync(7)
    two = sync(0) + sync(5) + other(1, 21, 8) + sync(6) + other(3, 23, 9) + sync(7)
    expected = digest(ZERO, page(21), ZERO, page(23))
    assert ram_of(main, one, two) == expected
    assert ram_of(main, two, one) == expected


def test_packets_of_one_epoch_go_by_their_number() -> None:
    one, two = other(1, 11, 4) + sync(9), other(1, 21, 3) + sync(9)
    assert ram_of(main_of(), one, two) == ram_of(main_of(), two, one) == digest(ZERO, page(11))


def test_a_sync_may_ride_on_pages() -> None:
    data = packet(normals=[1], flags=q.MULTIFD_FLAG_SYNC, number=1) + other(1, 9, 2)
    assert ram_of(main_of(), data) == digest(ZERO, page(9))


@pytest.mark.parametrize("method", ["zstd", "zlib"])
def test_compression_goes_on_from_packet_to_packet(method: str) -> None:
    is_zstd = method == "zstd"
    flag = q.MULTIFD_FLAG_ZSTD if is_zstd else q.MULTIFD_FLAG_ZLIB
    stream = zstandard.ZstdCompressor().compressobj() if is_zstd else zlib.compressobj()
    flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK if is_zstd else zlib.Z_SYNC_FLUSH
    chance = np.random.default_rng(1)
    noise = [chance.bytes(PAGE) for _ in range(2)]
    payloads = [stream.compress(data) + stream.flush(flush) for data in (noise[0] + page(1), noise[0] + noise[1])]
    assert len(payloads[1]) < 1.5 * PAGE  # it refers to the packet before
    packets = [
        packet(normals=[0, 1], flags=flag, payload=payloads[0]),
        packet(normals=[2, 3], flags=flag, payload=payloads[1], number=1),
    ]
    assert ram_of(main_of(), b"".join(packets)) == digest(noise[0], page(1), noise[0], noise[1])


@pytest.mark.parametrize("flag", [q.MULTIFD_FLAG_ZSTD, q.MULTIFD_FLAG_ZLIB])
@pytest.mark.parametrize("count", [1, 3])
def test_a_packet_with_other_pages_than_announced(flag: int, count: int) -> None:
    is_zstd = flag == q.MULTIFD_FLAG_ZSTD
    data = bytes(count * PAGE)
    payload = zstandard.compress(data) if is_zstd else zlib.compress(data)
    events = read(MultifdReader(), [HELLO + packet(normals=[0, 1], flags=flag, payload=payload)])[0]
    with pytest.raises(WireError, match="compressed packet"):
        PagesUnpacker().unpack(events[-1])  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", [q.MULTIFD_FLAG_ZSTD, q.MULTIFD_FLAG_ZLIB])
def test_a_bomb_is_noticed_early(flag: int) -> None:
    data = bytes(1 << 28)
    payload = zstandard.compress(data) if flag == q.MULTIFD_FLAG_ZSTD else zlib.compress(data)
    for content in (payload, b"no such thing"):
        events = read(MultifdReader(), [HELLO + packet(normals=[0], flags=flag, payload=content)])[0]
        with pytest.raises(WireError):
            PagesUnpacker().unpack(events[-1])  # type: ignore[arg-type]


def test_methods_that_cannot_be_read_are_counted() -> None:
    rebuild = RamRebuild()
    rebuild.apply(read(StreamReader(), [main_of()])[0][4])
    for event in read(MultifdReader(), [HELLO + packet(normals=[1, 2], flags=q.MULTIFD_FLAG_QATZIP, payload=b"x")])[0]:
        rebuild.apply(event)
    assert rebuild.unreadable_pages == 2


def test_a_page_of_no_block_and_too_much_memory() -> None:
    with pytest.raises(WireError, match="outside RAM block"):
        ram_of(main_of(), other(8, 1, 1))
    with pytest.raises(WireError, match="outside RAM block"):
        ram_of(main_of(), packet("b", normals=[1]))
    rebuild = RamRebuild(most_bytes=PAGE)
    listed = next(event for event in read(StreamReader(), [main_of()])[0] if isinstance(event, RamBlockListed))
    with pytest.raises(WireError) as caught:
        rebuild.apply(listed)
    assert caught.value.code == "wire.limit"


def described(text: str) -> bytes:
    return rig.start("x", 1, q.QEMU_VM_SECTION_FULL) + b"\0\x06" + struct.pack(">I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "size", ["-9", "1e999", "9" * 30, '"x"', "null", "[]", "4", '4, "array_len": -3', '1, "name": "\\ud800"']
)
def test_descriptions_of_hostile_sizes(size: str) -> None:
    walk = walk_devices(described(f'{{"devices": [{{"name": "x", "fields": [{{"size": {size}}}]}}]}}'))
    assert walk.devices == ()
    assert walk.why_not
    part = f'{{"vmsd_name": "\\ud800", "fields": [{{"size": {size}}}]}}'
    assert walk_devices(described(f'{{"devices": [{{"name": "x", "subsections": [{part}]}}]}}')).why_not


@pytest.mark.parametrize("changes", [1, 5])
def test_changed_descriptions(changes: int) -> None:
    main = connections("single-q35-10.0.2")[0]
    tail = b"".join(event.raw for event in read(StreamReader(), [main])[0] if isinstance(event, Opaque))
    head = next(
        event for event in read(StreamReader(), [main])[0] if isinstance(event, SectionBegun) and event.kind == 4
    )
    whole = bytes(head.raw) + tail
    assert not walk_devices(whole).why_not
    chance = random.Random(changes)
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(changes):
            changed[chance.randrange(len(changed))] = chance.choice(b'0"{}[],:9-\x00\xff')
        walk_devices(changed)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"\0\x06" + struct.pack(">I", 2) + b"{}",
        b"\0\x06" + struct.pack(">I", 3) + b"{x}",
        b"\0\x06" + struct.pack(">I", 7000) + b'{"devices":' + b"[" * 6989,
        b'\4\0\0\0\1\1xaaaabbbb\0\x06\0\0\0\x3a{"devices":[{"name":"x","fields":[{"size":-9}]}],"x":"......"}'[:80],
    ],
)
def test_descriptions_that_do_not_fit(tail: bytes) -> None:
    walk = walk_devices(tail)
    assert walk.devices == ()
    assert walk.why_not
