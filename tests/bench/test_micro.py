"""The micro-benchmarks measure what they say: the streams are QEMU's, every task works, and a miss is told."""

import numpy as np
import pytest

from sealane.bench import codecs, micro, wire
from sealane.bench.micro import Figure
from sealane.wire import StreamReader
from sealane.wire.events import PageBatch


def test_every_codec_task_works() -> None:
    names = []
    for task in codecs.tasks():
        task.work()
        names.append(task.name)
        assert task.size_bytes > 0
    assert len(names) == len(set(names))
    assert {name.partition(",")[0] for name in names} >= {"sealed", "hrt", "shift", "affine", "rc4", "digests"}


@pytest.mark.parametrize("piece_bytes", [37, 5000, 1 << 19])
def test_the_measured_stream_is_read_as_pages_and_zero_pages(piece_bytes: int) -> None:
    kinds = np.random.default_rng(7).random(300) < 0.5
    stream = wire.ram_stream(kinds)
    reader = StreamReader()
    batches = [
        event
        for at in range(0, len(stream), piece_bytes)
        for event in reader.feed(stream[at : at + piece_bytes])
        if isinstance(event, PageBatch)
    ]
    first, *offsets = np.concatenate([batch.offsets for batch in batches]).tolist()
    assert first == 0  # the record that names the block
    assert offsets == [4096 * number for number in range(300)]
    assert sum(int(batch.is_page.sum()) for batch in batches) == int(kinds.sum())


def test_a_missed_goal_is_told_with_its_distance() -> None:
    met = Figure("fast", 4.0, 5.0, 3.0, "")
    missed = Figure("slow", 1.5, 2.0, 3.0, "")
    context = Figure("context", 0.1, 0.1, None, "")
    assert micro.verdict([met, context]) == ["all goals met"]
    assert micro.verdict([met, missed, context]) == ["falls short:", "  slow: 1.5 GB/s, goal 3 (50%)"]
