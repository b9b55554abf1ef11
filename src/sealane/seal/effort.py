"""How much to spend on a byte before it is sent: nothing where the line is fast, zstd's levels where it is the bottleneck.

A lane's thread waits for QEMU, works, or waits for the line. Each INTERVAL_S it tells how it spent its time, and

* while nothing is reduced: begin where the thread waited for the line, the line carried less than compressing could give,
  and the receiver was not the one that could take no more (TCP_INFO's tcpi_rwnd_limited, tcp(7));
* afterwards: a level up where the line is busy all the time, and so nothing else is the bottleneck; one down where the line
  hardly is, or less gets through than it carried without, as on a host whose cores have other work;
* from the lowest level down, stop, but only where less gets through than without.

Two intervals in a row must agree. Having stopped, it begins again where the line carries clearly less than what came through
while reducing, or after a rest that doubles each time: load and contents change.
"""

from dataclasses import dataclass
from typing import Final

INTERVAL_S: Final = 0.05
# zstd's levels, least work first; docs/performance.md has what each of them brings.
LEVELS: Final = (-1, 1, 3, 5, 7)
_START: Final = LEVELS.index(1)
# All lanes together. Compressing gives some 400 MB/s a core: a line that carries this is no bottleneck.
_FAST_LINE_BYTES_PER_S: Final = 400e6
_WAITS: Final = 0.5
_IS_FULL: Final = 0.9
_WORKS: Final = 0.75
_RECEIVER_IS_SLOW: Final = 0.15
_AGREE: Final = 2
# Of what passes on the fastest line that counts as slow until it is known as such: QEMU may begin slowly.
_LATER: Final = 1.6
_CLEARLY_LESS: Final = 0.8
_BEHIND: Final = 0.7
_REST_S: Final = 2.0
_REST_MAX_S: Final = 60.0


@dataclass(frozen=True)
class Interval:
    """What one lane did: seconds, and bytes. Totals have a time of the clock as `elapsed_s`."""

    elapsed_s: float
    line_wait_s: float
    vm_wait_s: float
    receiver_limited_s: float
    wire_bytes: int
    plaintext_bytes: int

    def __sub__(self, earlier: "Interval") -> "Interval":
        """What was done between two totals."""
        return Interval(
            self.elapsed_s - earlier.elapsed_s,
            self.line_wait_s - earlier.line_wait_s,
            self.vm_wait_s - earlier.vm_wait_s,
            self.receiver_limited_s - earlier.receiver_limited_s,
            self.wire_bytes - earlier.wire_bytes,
            self.plaintext_bytes - earlier.plaintext_bytes,
        )


class Effort:
    """One lane's choice; `level` is None while nothing is to be reduced; if it still is after `decided_bytes`, the line is fast."""

    def __init__(self, lanes: int) -> None:
        self._fast = _FAST_LINE_BYTES_PER_S / max(1, lanes)
        self.decided_bytes = int(_LATER * _AGREE * INTERVAL_S * self._fast)
        self._at: int | None = None
        self._votes = 0
        self._reduced_rate: float | None = None
        self._line_rate = 0.0  # what the line carried before reducing began
        self._rest_s = _REST_S
        self._rested_s = 0.0

    @property
    def level(self) -> int | None:
        """zstd's level."""
        return None if self._at is None else LEVELS[self._at]

    def learn(self, interval: Interval) -> None:
        """Take an interval into account."""
        if interval.elapsed_s <= 0:
            return
        waits = interval.line_wait_s / interval.elapsed_s
        idles = interval.vm_wait_s / interval.elapsed_s
        if self._at is None:
            self._rest(interval.elapsed_s)
            is_wanted = waits > _WAITS and self._is_line_slow(interval)
            if is_wanted:
                self._line_rate = interval.wire_bytes / interval.elapsed_s
            self._vote(1 if is_wanted else 0)
            return
        rate = interval.plaintext_bytes / interval.elapsed_s
        self._reduced_rate = rate if self._reduced_rate is None else 0.8 * self._reduced_rate + 0.2 * rate
        if waits > _IS_FULL:
            self._vote(1)
        elif idles > _WAITS:
            self._vote(0)
        elif self._is_behind or (1 - waits - idles > _WORKS and self._at):
            self._vote(-1)
        else:
            self._vote(0)

    @property
    def _is_behind(self) -> bool:
        """Whether less gets through than without reducing."""
        return self._reduced_rate is not None and self._reduced_rate < _BEHIND * self._line_rate

    def _rest(self, elapsed_s: float) -> None:
        """After a while without reducing, forget how it went."""
        self._rested_s += elapsed_s
        if self._rested_s > self._rest_s and self._reduced_rate is not None:
            self._reduced_rate = None
            self._rest_s = min(2 * self._rest_s, _REST_MAX_S)

    def _is_line_slow(self, interval: Interval) -> bool:
        if interval.receiver_limited_s > _RECEIVER_IS_SLOW * interval.elapsed_s:
            return False
        rate = interval.wire_bytes / interval.elapsed_s
        return rate < self._fast and (self._reduced_rate is None or rate < _CLEARLY_LESS * self._reduced_rate)

    def _vote(self, direction: int) -> None:
        """Move where enough intervals agreed."""
        self._votes = self._votes + direction if direction and self._votes * direction >= 0 else direction
        if abs(self._votes) < _AGREE:
            return
        self._votes = 0
        if self._at is None:
            self._at, self._reduced_rate = _START, None
        elif self._at + direction < 0:
            self._at, self._rested_s = None, 0.0
        else:
            self._at = min(self._at + direction, len(LEVELS) - 1)
