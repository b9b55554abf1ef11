"""A copy whose bytes stand still."""

import pytest

from sealane.errors import PeerError
from sealane.host.migration.stall import StallLimit


def test_only_bytes_that_stand_still_are_a_stall() -> None:
    now = 0.0
    stall = StallLimit(10.0, clock=lambda: now)
    for now, count in ((0.0, 0), (9.0, 0), (10.0, 1), (19.0, 1), (20.0, 1), (20.5, 2)):  # noqa: B007 - the clock
        stall.look(count)
    now = 30.4
    stall.look(2)
    now = 30.6
    with pytest.raises(PeerError, match=r"no byte crossed the lanes for 10 s \[peer\.slow\]"):
        stall.look(2)
