"""Limits of one peer or one VM that differ from the host's, and the token buckets that bound what a peer may ask for."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Final

from pydantic import Field

from sealane.host.models import Model

# Names with a bucket; a bucket that is full again is as good as none, so the longest unused one may go.
_BUCKETS_MAX: Final = 4096


class PeerLimits(Model):
    """What `[limits.peers.NAME]` says of one peer; None is the host's own limit."""

    outgoing_max: Annotated[int | None, Field(ge=1, le=256, description="Migrations in progress to it.")] = None
    incoming_max: Annotated[int | None, Field(ge=1, le=256, description="Migrations in progress from it.")] = None
    rate_max_bytes_per_s: Annotated[int | None, Field(ge=0, description="Rate of one migration to it; 0 is none.")] = (
        None
    )


class VmLimits(Model):
    """What `[limits.vms.NAME]` says of one VM; None is the host's own limit."""

    priority: Annotated[int, Field(ge=-100, le=100, description="Its place in the queue: the higher the sooner.")] = 0
    rate_max_bytes_per_s: Annotated[int | None, Field(ge=0, description="Rate of its migrations; 0 is none.")] = None
    time_max_s: Annotated[
        float | None, Field(gt=0, le=604_800, description="How long a migration of it may take, without the queue.")
    ] = None


def least_rate(*rates: int | None) -> int:
    """The lowest of some bounds in bytes a second, where None and 0 are no bound; 0 where none is set."""
    return min((rate for rate in rates if rate), default=0)


class TokenBuckets:
    """For each name so many events at once, and as many again within `per_s`; bounded in how many names it remembers."""

    def __init__(self, most: int, per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rate, self._clock = float(most), most / per_s, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> bool:
        """Count one event of this name; False where it comes too soon after the others."""
        now = self._clock()
        tokens, seen = self._buckets.pop(name, (self._most, now))
        tokens = min(self._most, tokens + (now - seen) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[name] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > _BUCKETS_MAX:
            self._buckets.popitem(last=False)
        return allowed
