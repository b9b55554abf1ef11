"""QEMU's bytes out of a source: received, reduced where the line is the bottleneck, sealed, sent. One thread a lane.

    QEMU --recv_into--> frame --seal in place--> TCP                                  while the line is fast
    QEMU --recv_into--> buffer --reduce--> --zstd--> frame --seal in place--> TCP     while it is not

What has come goes out at once: nothing waits for a full buffer, nor for a better match.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sealane.limits import MIB
from sealane.seal.compression import INPUT_MAX, RecordCompressor
from sealane.seal.effort import INTERVAL_S, Effort, Interval
from sealane.seal.records import Coding, RecordSealer
from sealane.seal.reduce import TAIL_MAX, LaneReducer, Piece

# struct tcp_info (linux/tcp.h): tcpi_rwnd_limited, microseconds; kernels before 4.10 do not have it
_RECEIVER_LIMITED_AT: Final = 176
_TCP_INFO_BYTES: Final = 256


# So much is followed to see whether the line is the bottleneck. To keep in step with pieces of 32 KiB costs 0.2 core-seconds a
# GB; who did not need to reduce by then is on a fast line, and is followed no more. What compresses still can be compressed.
FOLLOWED_MAX: Final = 64 * MIB


@dataclass
class Saved:
    """Bytes of QEMU's that did not cross the wire, by the reason."""

    zero: int = 0
    same: int = 0
    compressed: int = 0


class Outbound:
    """The pump of one lane at the source."""

    def __init__(
        self, vm: socket.socket, line: socket.socket, sealer: RecordSealer, reducer: LaneReducer, effort: Effort
    ) -> None:
        self._vm, self._line, self._sealer = vm, line, sealer
        self._reducer, self._effort = reducer, effort
        self._buffer = memoryview(bytearray(TAIL_MAX + INPUT_MAX))
        self._compressor: RecordCompressor | None = None
        self._line_wait_s = self._vm_wait_s = 0.0
        self._interval_began = time.perf_counter()
        self._interval_bytes = self._interval_wire = 0
        self._receiver_limited_s = 0.0
        self._compressed_saved = 0
        self._has_reduced = False
        self.vm_bytes = 0
        self.wire_bytes = 0

    def run(self) -> None:
        """Pump until QEMU closes; raises OSError where the line breaks."""
        while piece := self._receive(self._sealer.payload if self._compressor is None else self._buffer):
            pieces = self._reducer.feed(piece)
            if self._compressor is None:
                self._send(self._sealer.seal_data(len(piece)))
            else:
                self._send_compressed([piece] if pieces is None else pieces)
            self._measure()
        self._stop_reducing()

    @property
    def saved(self) -> Saved:
        """What was not sent so far."""
        return Saved(self._reducer.zero_bytes, self._reducer.same_bytes, self._compressed_saved)

    def _receive(self, buffer: memoryview) -> memoryview:
        """QEMU's next bytes, behind the tail that the reducer wants in front of them; empty where QEMU has closed."""
        tail = self._reducer.tail
        if tail:
            buffer[: len(tail)] = tail
        began = time.perf_counter()
        try:
            count = self._vm.recv_into(buffer[len(tail) :] if tail else buffer)
        except ConnectionResetError:
            count = 0
        self._vm_wait_s += time.perf_counter() - began
        self.vm_bytes += count
        self._interval_bytes += count
        return buffer[: len(tail) + count if count else 0]

    def _send(self, record: memoryview) -> None:
        began = time.perf_counter()
        self._line.sendall(record)
        self._line_wait_s += time.perf_counter() - began
        self.wire_bytes += len(record)
        self._interval_wire += len(record)

    def _send_compressed(self, pieces: Sequence[Piece]) -> None:
        compressor = self._compressor
        if compressor is None:
            return
        for group in _groups(pieces):
            coding = Coding.ZSTD_BEGUN if compressor.begins else Coding.ZSTD
            length = compressor.compress_into(group, self._sealer.payload)
            self._compressed_saved += sum(len(piece) for piece in group) - length
            self._send(self._sealer.seal_data(length, coding))

    # ---- how much to reduce

    def _measure(self) -> None:
        now = time.perf_counter()
        elapsed = now - self._interval_began
        if elapsed < INTERVAL_S:
            return
        limited = receiver_limited_s(self._line)
        self._effort.learn(
            Interval(
                elapsed,
                self._line_wait_s,
                self._vm_wait_s,
                limited - self._receiver_limited_s,
                self._interval_wire,
                self._interval_bytes,
            )
        )
        self._receiver_limited_s, self._interval_began = limited, now
        self._line_wait_s = self._vm_wait_s = 0.0
        self._interval_bytes = self._interval_wire = 0
        self._apply(self._effort.level)
        if not self._has_reduced and self.vm_bytes > FOLLOWED_MAX:
            self._reducer.give_up()

    def _apply(self, level: int | None) -> None:
        if level is None:
            self._stop_reducing()
        elif self._compressor is None or self._compressor.level != level:
            self._compressor = RecordCompressor(level)
            self._has_reduced = True
            if not self._reducer.active:
                self._reducer.activate()

    def _stop_reducing(self) -> None:
        self._send_compressed(self._reducer.deactivate())
        self._compressor = None


def receiver_limited_s(line: socket.socket) -> float:
    """For how long in all the peer's receive window has held this connection up."""
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _RECEIVER_LIMITED_AT + 8:
        return 0.0
    (microseconds,) = struct.unpack_from("Q", info, _RECEIVER_LIMITED_AT)
    return float(microseconds) / 1e6


def _groups(pieces: Sequence[Piece]) -> Iterator[list[memoryview]]:
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
