"""A copy whose bytes stand still: a peer that is there and does nothing must not hold a migration for ever."""

import time
from collections.abc import Callable

from sealane.errors import PeerError


class StallLimit:
    """Shown a count of bytes now and then; raises `peer.slow` once it has not moved for `limit_s` seconds."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._count = -1
        self._moved_at = clock()

    def look(self, count: int) -> None:
        """Note the count."""
        now = self._clock()
        if count != self._count:
            self._count, self._moved_at = count, now
        elif now - self._moved_at > self._limit_s:
            raise PeerError("peer.slow", f"no byte crossed the lanes for {self._limit_s:g} s")
