"""QEMU's bytes out of a source: received, reduced where the line is the bottleneck, sealed, sent.

    QEMU --recv_into--> frame --seal in place--> TCP                                  while the line is fast: one thread
    QEMU --recv_into--> buffer --reduce--> | --zstd--> frame --seal--> TCP            while it is not: see `compressing`

What has come goes out at once: nothing waits for a full buffer, nor for a better match.
"""

import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

from sealane.enclave.compressing import Compressing
from sealane.limits import KIB
from sealane.seal.effort import INTERVAL_S, Effort, Interval
from sealane.seal.records import RecordSealer
from sealane.seal.reduce import LaneReducer

# struct tcp_info (linux/tcp.h): tcpi_rwnd_limited, microseconds; kernels before 4.10 do not have it
_RECEIVER_LIMITED_AT: Final = 176
_TCP_INFO_BYTES: Final = 256


# Pieces of this size cost a reducer a third less a byte than those of 192 KiB, which a unix connection gives at once.
_ENOUGH: Final = 384 * KIB
_LOOK_AGAIN_S: Final = 0.001


@dataclass
class Saved:
    """Bytes of QEMU's that did not cross the wire, by the reason."""

    zero: int = 0
    same: int = 0
    compressed: int = 0


class Outbound:
    """The pump of one lane at the source."""

    def __init__(
        self,
        vm: socket.socket,
        line: socket.socket,
        sealer: RecordSealer,
        reducer: LaneReducer,
        effort: Effort,
        threads: int = 1,
    ) -> None:
        self._vm, self._line, self._sealer = vm, line, sealer
        self._reducer, self._effort, self._threads = reducer, effort, threads
        self._compressing: Compressing | None = None
        self._line_wait_s = self._vm_wait_s = 0.0
        # totals when an interval ended last; sending adds to them in whichever thread it is done
        self._measured = Interval(time.perf_counter(), 0.0, 0.0, 0.0, 0, 0)
        self._compressed_saved = 0
        self._has_reduced = False
        self.vm_bytes = 0
        self.wire_bytes = 0

    def run(self) -> None:
        """Pump until QEMU closes; raises OSError where the line breaks."""
        try:
            while self._pump_piece():
                self._measure()
            self._stop_reducing()
        finally:
            if self._compressing is not None:
                self._compressing.close()

    def _pump_piece(self) -> bool:
        """Send what QEMU has next; False where it has closed."""
        compressing = self._compressing
        buffer = self._sealer.payload if compressing is None else compressing.buffer()
        piece = self._receive(buffer)
        if not piece:
            return False
        if compressing is not None:
            piece = self._receive_more(compressing, buffer, len(piece))
        pieces = self._reducer.feed(piece)
        if compressing is None:
            self._send(self._sealer.seal_data(len(piece)))
        else:
            compressing.send([piece] if pieces is None else pieces, buffer)
        return True

    @property
    def saved(self) -> Saved:
        """What was not sent so far."""
        compressing = self._compressing
        under_way = compressing.saved_bytes if compressing is not None else 0
        return Saved(self._reducer.zero_bytes, self._reducer.same_bytes, self._compressed_saved + under_way)

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
        return buffer[: len(tail) + count if count else 0]

    def _receive_more(self, compressing: Compressing, buffer: memoryview, length: int) -> memoryview:
        """Add what QEMU has by now: larger pieces cost less. While all who compress are busy, waiting costs nothing either."""
        while length < _ENOUGH:
            patience_s = _LOOK_AGAIN_S if compressing.is_busy else 0.0
            if not select.select([self._vm], [], [], patience_s)[0]:
                if patience_s:
                    continue
                break
            count = self._vm.recv_into(buffer[length:_ENOUGH])
            if not count:  # the next `_receive` hears of it again
                break
            self.vm_bytes += count
            length += count
        return buffer[:length]

    def _send(self, record: memoryview) -> None:
        began = time.perf_counter()
        self._line.sendall(record)
        self._line_wait_s += time.perf_counter() - began
        self.wire_bytes += len(record)

    # ---- how much to reduce

    def _measure(self) -> None:
        now, last = time.perf_counter(), self._measured
        if now - last.elapsed_s < INTERVAL_S:
            return
        limited = receiver_limited_s(self._line)
        total = Interval(now, self._line_wait_s, self._vm_wait_s, limited, self.wire_bytes, self.vm_bytes)
        self._effort.learn(total - last)
        self._measured = total
        self._apply(self._effort.level)
        # To keep in step with pieces of 32 KiB costs 0.2 core-seconds a GB. What compresses still can be compressed.
        if not self._has_reduced and self.vm_bytes > self._effort.decided_bytes:
            self._reducer.give_up()

    def _apply(self, level: int | None) -> None:
        if level is None:
            self._stop_reducing()
        elif self._compressing is not None:
            self._compressing.level = level
        else:
            self._compressing = Compressing(self._sealer, self._send, level=level, threads=self._threads)
            self._has_reduced = True
            self._reducer.activate()

    def _stop_reducing(self) -> None:
        held = self._reducer.deactivate()
        compressing = self._compressing
        if compressing is None:
            return
        compressing.send(held, None)
        compressing.drain()
        compressing.close()
        self._compressed_saved += compressing.saved_bytes
        self._compressing = None


def receiver_limited_s(line: socket.socket) -> float:
    """For how long in all the peer's receive window has held this connection up."""
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _RECEIVER_LIMITED_AT + 8:
        return 0.0
    (microseconds,) = struct.unpack_from("Q", info, _RECEIVER_LIMITED_AT)
    return float(microseconds) / 1e6
