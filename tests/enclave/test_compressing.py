"""Compression in threads of its own: order, bounds, and what a line that breaks does to it."""

import random
import threading
from collections.abc import Iterator

import pytest

from sealane.enclave.compressing import Compressing, groups_of, threads_for
from sealane.seal.compression import INPUT_MAX
from sealane.seal.records import DataReceived, RecordReader, RecordSealer
from tests.seal.rig import keys

PATIENCE_S = 20.0


class Line:
    """Keeps records, or holds them up."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.broken = False

    def send(self, record: memoryview) -> None:
        self.waiting.set()
        assert self.open.wait(PATIENCE_S)
        if self.broken:
            raise BrokenPipeError("the line is broken")
        self.records.append(bytes(record))


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.open.set()


def opened(records: list[bytes]) -> bytes:
    """What the peer has after these records."""
    reader, out = RecordReader(keys()), bytearray()
    for record in records:
        rest = memoryview(record)
        while rest:
            space = reader.space()
            count = min(len(space), len(rest))
            space[:count], rest = rest[:count], rest[count:]
            event = reader.filled(count)
            if isinstance(event, DataReceived):
                out += event.data
    return bytes(out)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_is_given_arrives_in_order(line: Line, threads: int) -> None:
    chance, sealer, expected = random.Random(threads), RecordSealer(keys()), bytearray()
    line.send(sealer.open_lane())
    work = Compressing(sealer, line.send, level=1, threads=threads)
    for number in range(60):
        buffer = work.buffer()
        length = chance.choice([1, 5000, 200_000])
        buffer[:length] = (chance.randbytes(40) * (length // 40 + 1))[:length]
        expected += buffer[:length]
        cut = length // 3
        work.send([piece for piece in (buffer[:cut], buffer[cut:length]) if piece], buffer)
        if number == 30:
            work.level = 3
    work.send([bytes(INPUT_MAX + 9)], None)  # more than one record holds
    expected += bytes(INPUT_MAX + 9)
    work.drain()
    assert opened(line.records) == bytes(expected)
    assert work.saved_bytes == len(expected) - sum(len(record) - 40 for record in line.records[1:])
    work.close()


def test_a_line_that_stands_stops_who_gives(line: Line) -> None:
    sealer = RecordSealer(keys())
    line.send(sealer.open_lane())
    line.open.clear()
    work = Compressing(sealer, line.send, level=1, threads=2)
    buffers = [work.buffer() for _ in range(3)]
    for buffer in buffers:
        buffer[:4] = b"data"
        work.send([buffer[:4]], buffer)
    got: list[memoryview] = []
    asking = threading.Thread(target=lambda: got.append(work.buffer()))
    asking.start()
    assert line.waiting.wait(PATIENCE_S)
    assert not got, "three buffers are on their way, and there are no more"
    line.open.set()
    asking.join(PATIENCE_S)
    assert len(got) == 1
    work.drain()
    assert opened(line.records) == b"data" * 3
    work.close()


def test_nothing_follows_what_could_not_be_sent(line: Line) -> None:
    sealer = RecordSealer(keys())
    line.send(sealer.open_lane())
    work = Compressing(sealer, line.send, level=1, threads=2)
    line.broken = True
    for _ in range(3):
        work.send([b"never"], None)
    with pytest.raises(BrokenPipeError):
        work.drain()
    line.broken = False
    with pytest.raises(BrokenPipeError):
        work.buffer()
    work.send([b"neither"], None)
    with pytest.raises(BrokenPipeError):
        work.drain()
    assert len(line.records) == 1
    work.close()


def test_groups_hold_what_a_record_holds() -> None:
    pieces = [bytes(10), bytes(INPUT_MAX), b"", bytes(INPUT_MAX - 10)]
    assert [sum(map(len, group)) for group in groups_of(pieces)] == [INPUT_MAX, INPUT_MAX]
    assert list(groups_of([])) == []


def test_lanes_share_the_cores() -> None:
    assert 2 <= threads_for(1) <= 5
    assert threads_for(1000) == 2
