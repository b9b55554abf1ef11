"""One rate for all copies that leave this host together, shared among them; no clock and no I/O.

Each copy asks for its share when it begins, and again and again while it runs: shares move as copies come and go, and as the
total is changed. A copy with a lower bound of its own leaves the rest of its share to the others (max-min
fairness). Rates are bytes a second of QEMU's stream; 0 is no bound.
"""

from collections.abc import Mapping


def fair_shares(total: int, bounds: Mapping[str, int]) -> dict[str, int]:
    """What each may have of `total`, where it has a bound of its own: nobody can have more without another having less.

    Their sum is at most `total`, unless that is below one byte for each.
    """
    if not total:
        return dict(bounds)
    shares: dict[str, int] = {}
    left = total
    # the most modest first: what one of them leaves, the others share
    for count, name in enumerate(sorted(bounds, key=lambda name: bounds[name] or total)):
        even = left // (len(bounds) - count)
        shares[name] = max(1, min(bounds[name] or even, even))
        left -= shares[name]
    return shares


class SharedRate:
    """The copies under way, by migration, and the total that they share."""

    def __init__(self, total_bytes_per_s: int = 0) -> None:
        self.total_bytes_per_s = total_bytes_per_s
        self._bounds: dict[str, int] = {}

    def share_of(self, migration: str, bound_bytes_per_s: int) -> int:
        """What this copy, which has a bound of its own, may have now; from the first time on the others' shares know of it."""
        self._bounds[migration] = bound_bytes_per_s
        return fair_shares(self.total_bytes_per_s, self._bounds)[migration]

    def leave(self, migration: str) -> None:
        """A copy is over; harmless for one that never began."""
        self._bounds.pop(migration, None)
