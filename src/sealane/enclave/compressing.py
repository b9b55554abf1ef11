"""Compression beside the lane's thread: zstd works in threads of its own, and what is sent keeps its order.

    lane's thread       buffer() --recv, reduce--> send(pieces)                goes on with the next buffer
    other threads       zstd --> wait for the turn --> seal --> line           turns follow the pieces' order

Whoever waits for its turn or for the line holds one record; `buffer` waits while all buffers are on their way, so that a slow
line stops QEMU. Nothing waits for more bytes than there are.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from sealane.seal.compression import INPUT_MAX, RecordCompressor
from sealane.seal.records import Coding, RecordSealer
from sealane.seal.reduce import TAIL_MAX, Piece

# Asked when the module is loaded: an enclave's sandbox leaves no way to ask.
_CORES: Final = len(os.sched_getaffinity(0))
_CORES_MAX: Final = 4


def threads_for(lanes: int) -> int:
    """How many threads one of so many lanes has on this machine: its cores, and one that waits for the line meanwhile."""
    return 1 + max(1, min(_CORES_MAX, _CORES // max(1, lanes)))


@dataclass
class _Job:
    """A record to be; `buffer` is free again when it was sent, where it is the last of its buffer."""

    turn: int
    group: list[memoryview]
    buffer: memoryview | None


class Compressing:
    """Compresses and sends what one lane's thread gives it, from construction to `close`.

    `send` puts a sealed record on the line; it is called by one thread at a time. What it raises is raised by the next call
    here, and nothing is sent after it.
    """

    def __init__(self, sealer: RecordSealer, send: Callable[[memoryview], None], *, level: int, threads: int) -> None:
        self.level = level
        """zstd's, for what is given to `send` from now on."""
        self.saved_bytes = 0
        self._sealer, self._send_record = sealer, send
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        for _ in range(threads + 1):
            self._free.put(memoryview(bytearray(TAIL_MAX + INPUT_MAX)))
        self._given = self._sent = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._work, name=f"zstd-{number}", daemon=True).start()

    def buffer(self) -> memoryview:
        """Where to receive the next bytes; waits while all buffers are on their way. Belongs to the caller until `send`."""
        self._raise()
        buffer = self._free.get()
        if buffer is None:  # there is an error now
            self._raise()
        return buffer  # type: ignore[return-value]

    @property
    def is_busy(self) -> bool:
        """Whether every thread has something to do: what is given now would only wait."""
        return self._given - self._sent >= self._threads and self._error is None

    def send(self, pieces: Sequence[Piece], buffer: memoryview | None) -> None:
        """Send the pieces in order. They may be views of `buffer`, which is taken back."""
        groups = list(groups_of(pieces))
        if not groups:
            if buffer is not None:
                self._free.put(buffer)
            return
        for group in groups:
            job = _Job(self._given, group, buffer if group is groups[-1] else None)
            self._jobs.put(job)
            self._given += 1

    def drain(self) -> None:
        """Return when all that was given has been sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._sent == self._given)
        self._raise()

    def close(self) -> None:
        """Drop what was not sent. The threads end at once, but for one that waits for the line."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._fail(InterruptedError("closed"))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._free.put(None)

    def _work(self) -> None:
        compressor: RecordCompressor | None = None
        try:
            while (job := self._jobs.get()) is not None and self._error is None:
                if compressor is None or compressor.level != self.level:
                    compressor = RecordCompressor(self.level)
                compressed = compressor.compress(job.group)
                if not self._take_turn(job.turn):
                    return
                length = len(compressed)
                self.saved_bytes += sum(map(len, job.group)) - length
                self._sealer.payload[:length] = compressed
                self._send_record(self._sealer.seal_data(length, Coding.ZSTD))
                self._end_turn(job)
        except BaseException as error:
            self._fail(error)

    def _take_turn(self, turn: int) -> bool:
        """Wait for it; False where it will not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._sent == turn)
            return self._error is None

    def _end_turn(self, job: _Job) -> None:
        with self._changed:
            self._sent += 1
            self._changed.notify_all()
        if job.buffer is not None:
            self._free.put(job.buffer)


def groups_of(pieces: Sequence[Piece]) -> Iterator[list[memoryview]]:
    """The pieces in order, cut into groups of at most INPUT_MAX bytes."""
    group: list[memoryview] = []
    room = INPUT_MAX
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest) > room:
            group.append(rest[:room])
            yield group
            rest = rest[room:]
            group, room = [], INPUT_MAX
        if len(rest):
            group.append(rest)
            room -= len(rest)
    if group:
        yield group
