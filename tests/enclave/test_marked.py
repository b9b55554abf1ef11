"""The pump that tells pages apart sends what reduction leaves of the stream, byte for byte, whatever the marks."""

import random
import socket

import numpy as np
import pytest
from numpy.typing import NDArray

from sealane.enclave.marked import Guard, MarkedOutbound
from sealane.seal.effort import Effort
from sealane.seal.marks import PIECE_MAX, PageMarker
from sealane.seal.records import Coding, RecordReader, RecordSealer
from sealane.seal.reduce import LaneReducer
from sealane.seal.seen import PagesSeen
from sealane.wire.events import Offsets
from tests.seal.rig import SECRET, feed, keys
from tests.wire import rig as wire_rig

KEY = bytes(range(32))


def is_user(_block: str, offsets: Offsets) -> NDArray[np.bool_]:
    return (offsets // 4096) % 3 == 0  # type: ignore[no-any-return]


class Pump(MarkedOutbound):
    """Keeps what it sends."""

    records: list[bytes]

    def _send(self, record: memoryview) -> None:
        self.records.append(bytes(record))


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize("protection", ["selective", "hrt", "rc4"])
@pytest.mark.parametrize("name", ["multifd-7.2.22", "multifd-running-10.0.2", "single-running-10.0.2"])
def test_what_reduction_leaves_arrives_under_any_marks(name: str, protection: str, compresses: bool) -> None:
    chance = random.Random(name)
    connections = wire_rig.connections(name)
    seen, seen_too = PagesSeen(len(connections)), PagesSeen(len(connections))
    marked = 0
    for lane, data in enumerate(connections):
        guard, sealer = Guard(protection, is_user), RecordSealer(keys())
        codec = guard.make_codec(SECRET, 0)
        reducer, same = LaneReducer(seen, lane, KEY), LaneReducer(seen_too, lane, KEY)
        near, far = socket.socketpair()
        with near, far:
            marker = PageMarker(is_user, has_codec=codec is not None)
            pump = Pump(near, far, sealer, marker, codec, (reducer, Effort(1)))
            pump.records = [bytes(sealer.open_lane())]
            expected, at = [], 0
            same.activate()
            if compresses:
                pump._apply(1)
            else:
                reducer.activate()
            while at < len(data):
                count = min(chance.choice([900, 60_000, 500_000]), PIECE_MAX - len(reducer.tail))
                piece = memoryview(bytearray(reducer.tail + data[at : at + count]))
                at += count
                expected.append(b"".join(bytes(part) for part in same.feed(piece) or []))
                pump._send_pieces(reducer.feed(piece) or [])
            expected.append(b"".join(bytes(part) for part in same.deactivate()))
            pump._stop_reducing()
        pump.records.append(bytes(sealer.close_lane()))
        told = feed(RecordReader(keys(), guard.marks_allowed(SECRET, 0)), b"".join(pump.records))
        assert told.error is None
        assert told.plaintext == b"".join(expected)
        marked += sum(record[1] == (Coding.MARKED_ZSTD if compresses else Coding.MARKED) for record in pump.records)
    assert marked


def test_nobody_may_mark_under_sealed() -> None:
    assert Guard("sealed").marks_allowed(SECRET, 0) is None
