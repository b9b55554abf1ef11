"""What of the fault campaign needs no hosts: how runs side by side share the faults."""

import pytest

from sealane.testing.campaign import Part
from sealane.testing.faultdirector import FAULTS, Injection

SINGLES = [Injection(f"source:step:copying:{number}", fault) for number in range(20) for fault in FAULTS]


def test_every_fault_is_one_parts() -> None:
    parts = [Part.parse(f"{number}/3") for number in (1, 2, 3)]
    for single in SINGLES:
        assert sum(part.holds(single) for part in parts) == 1
    assert all(any(part.holds(single) for single in SINGLES) for part in parts)
    assert all(Part().holds(single) for single in SINGLES)


@pytest.mark.parametrize("told", ["", "1", "0/2", "3/2", "a/b", "1/2/3"])
def test_what_is_no_part(told: str) -> None:
    with pytest.raises(ValueError):
        Part.parse(told)
