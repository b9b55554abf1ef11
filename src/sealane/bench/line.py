"""A line of a known rate between two hosts in network namespaces."""

from typing import Final

from sealane.testing.hosts import INTERFACE
from sealane.testing.pair import HostPair

# A burst lets one segment of the kernel's offload through (64 KiB); the queue holds 10 ms.
_TBF: Final = ("burst", "256kb", "latency", "10ms")


def limit_line(pair: HostPair, mbit: int) -> None:
    """A token bucket (tbf) of `mbit` Mb/s at each end; for a pair with `network="netns"`."""
    for end in (pair.a, pair.b):
        end.host.run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", f"{mbit}mbit", *_TBF)
