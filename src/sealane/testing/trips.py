"""The trips of a fault campaign: how the VM is moved, what its guest does meanwhile, and what the points are called.

    precopy    source:step:copying:vm-stopped      a calm guest, moved as most are
    postcopy   postcopy:source:step:…              a guest that writes faster than the line, and so goes on to postcopy
    rejoined   rejoined:destination:step:…         the same, the line cut when the destination's QEMU has switched, and whole
                                                   again once the halves are parted; the points from the cut on

A fault is injected on the trip that its point belongs to.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from sealane.testing.machine import Workload

# A tick lasts 50 ms; every fifth one all pages are compared with what the guest wrote there.
CALM: Final = Workload(fill_mib=4, rewrite_kib_per_s=256, tick_ms=50, check_all=5)
# Writes to all of its pages in every tick, to a few of them something new: 160 MiB/s.
BUSY: Final = Workload(
    fill_mib=8, rewrite_kib_per_s=256, touch_kib_per_s=160 << 10, touch_mib=8, tick_ms=50, check_all=10
)
# The line takes some three seconds for what the guest holds, 0.3 s for what it writes to; of that, nothing is small enough.
_BY_POSTCOPY: Final[Mapping[str, object]] = {
    "on_stall": "postcopy",
    "give_up_after_s": 0.5,
    "max_bandwidth_bytes_per_s": 24 << 20,
    "downtime_limit_ms": 20,
}


@dataclass(frozen=True)
class Trip:
    """`prefix` begins the names of its points; from `cut_at` on, where the line is cut, `prefix_after_cut` does."""

    name: str
    workload: Workload
    prefix: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    cut_at: str = ""
    prefix_after_cut: str = ""

    @property
    def by_postcopy(self) -> bool:
        """Whether the VM's memory is in two halves for a while."""
        return bool(self.options)


PRECOPY: Final = Trip("precopy", CALM)
POSTCOPY: Final = Trip("postcopy", BUSY, "postcopy:", _BY_POSTCOPY)
# The first point after the destination's QEMU has switched.
REJOINED: Final = Trip(
    "rejoined", BUSY, "postcopy:", _BY_POSTCOPY, "postcopy:destination:journal:postcopy:before", "rejoined:"
)
TRIPS: Final = (PRECOPY, POSTCOPY, REJOINED)


def trip_of(points: Iterable[str]) -> Trip:
    """The trip on which these points are reached."""
    names = list(points)
    if any(name.startswith(REJOINED.prefix_after_cut) for name in names):
        return REJOINED
    return POSTCOPY if any(name.startswith(POSTCOPY.prefix) for name in names) else PRECOPY
