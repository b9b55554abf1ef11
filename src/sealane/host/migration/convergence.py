"""Whether a copy comes nearer to its end, by QEMU's own figures, and when it is given up.

QEMU copies in iterations: each sends what the guest has written during the one before. What an iteration finds to be sent
is what counts here; within one, the rest shrinks whether that leads anywhere or not.

    iteration        1        2        3        4        5
    to be sent     all    80 MB    40 MB    39 MB    41 MB
                          nearer   nearer   fruitless fruitless -> no convergence, after `give_up_after_s`

Progress is an iteration with at least a tenth less to be sent than any before it, and, with auto-converge, the guest being
slowed down more than before. Two fruitless iterations make a copy that does not converge.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sealane.errors import make_error
from sealane.hypervisor.driver import MigrationStatus

# An iteration that has less than a tenth less to send came no nearer: figures of a steady guest vary as much.
_NEARER: Final = 0.9
_FRUITLESS_ITERATIONS: Final = 2


@dataclass(frozen=True)
class Outlook:
    """What the figures say: seconds to the end (None: unknown, or none in sight), whether it converges (None: unknown
    before the second iteration), and how long there was no progress."""

    eta_s: float | None
    converges: bool | None
    stalled_s: float


class Convergence:
    """Shown QEMU's status now and then; `judge` raises `migration.no-convergence` once patience is over.

    `give_up_after_s` None never gives up.
    """

    def __init__(self, give_up_after_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._give_up_after_s, self._clock = give_up_after_s, clock
        self._progressed_at = clock()
        self._iteration = 0
        self._least: int | None = None
        self._fruitless = 0
        self._throttle = 0

    def judge(self, status: MigrationStatus, tell: Callable[[Outlook], None] = lambda outlook: None) -> Outlook:
        """Note the figures and tell what they say; then the error that ends the copy, where it comes to that."""
        now = self._clock()
        if status.iteration <= 1:
            self._progressed_at = now
        elif status.iteration != self._iteration:
            self._begin_iteration(status.ram_remaining, now)
        if (status.throttle_percent or 0) > self._throttle:
            self._throttle = status.throttle_percent or 0
            self._progressed_at, self._fruitless = now, 0
        self._iteration = status.iteration
        outlook = self._outlook(status, now)
        tell(outlook)
        if self._is_hopeless(outlook):
            raise make_error(
                "migration.no-convergence", f"no progress for {outlook.stalled_s:.0f} s: {words_of(status)}"
            )
        return outlook

    def _begin_iteration(self, to_send: int, now: float) -> None:
        if self._least is None or to_send < self._least * _NEARER:
            self._least, self._progressed_at, self._fruitless = to_send, now, 0
        else:
            self._fruitless += 1

    def _outlook(self, status: MigrationStatus, now: float) -> Outlook:
        rate, dirty, left = status.rate_bytes_per_s, status.dirty_rate_bytes_per_s, status.ram_remaining
        if not rate:
            return Outlook(None, None, now - self._progressed_at)
        if status.iteration <= 1 or dirty is None:
            return Outlook(left / rate, None, 0.0)
        net = rate - dirty if self._fruitless < _FRUITLESS_ITERATIONS else 0.0
        return Outlook(left / net if net > 0 else None, net > 0, now - self._progressed_at)

    def _is_hopeless(self, outlook: Outlook) -> bool:
        limit = self._give_up_after_s
        return limit is not None and self._fruitless >= _FRUITLESS_ITERATIONS and outlook.stalled_s > limit


def words_of(status: MigrationStatus) -> str:
    """The two figures that decide, in words."""
    dirty, rate = status.dirty_rate_bytes_per_s or 0.0, status.rate_bytes_per_s or 0.0
    slowed = f", slowed down by {status.throttle_percent} %" if status.throttle_percent else ""
    return f"the guest writes {dirty / 1e6:.1f} MB/s{slowed}, and {rate / 1e6:.1f} MB/s go over"
