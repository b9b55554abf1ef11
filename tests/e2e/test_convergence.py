"""A guest that writes faster than the copy goes: it is told with figures, and given up or slowed down as the user asked."""

from collections.abc import Iterator

import pytest

from sealane.host.models import Migration
from sealane.testing.machine import Workload
from tests.e2e.rig import MIB, Attempt, Rig, make_rig

pytestmark = pytest.mark.e2e

# Writes some 20 MiB a second; less goes over, so that one iteration after the other finds as much to be sent.
BUSY = Workload(fill_mib=32, rewrite_kib_per_s=20 * 1024)
SLOWER = {"max_bandwidth_bytes_per_s": 6 * MIB, "downtime_limit_ms": 100, "reduce": False}
# QEMU lets more than its bound pass with multifd; this is somewhat less than what the guest writes.
NEARLY = {"max_bandwidth_bytes_per_s": 8 * MIB, "downtime_limit_ms": 300, "reduce": False}


@pytest.fixture(scope="module")
def busy() -> Iterator[Rig]:
    with make_rig(workload=BUSY) as rig:
        yield rig


def followed(rig: Rig, **options: object) -> list[Migration]:
    """Every word of the migration, the last one at the end."""
    begun = rig.begin(**options)
    with rig.home.client() as client:
        return [event.migration for event in client.events(begun.id)]


def test_given_up_with_the_figures(busy: Rig) -> None:
    told = followed(busy, **SLOWER, give_up_after_s=3)
    last = told[-1]
    busy.assert_aborted(Attempt(last, busy.seen_by(busy.away, last.id)), "migration.no-convergence")
    assert last.problem
    assert "the guest writes" in last.problem.detail
    hopeless = [each.progress for each in told if each.progress.converges is False]
    assert hopeless
    assert all(each.eta_s is None for each in hopeless)
    assert all(each.dirty_rate_bytes_per_s and each.rate_bytes_per_s for each in hopeless)
    assert any("no end in sight" in each.detail for each in told)


def test_slowed_down_and_arrived(busy: Rig) -> None:
    told = followed(busy, **NEARLY, on_stall="auto-converge", throttle_max_percent=99, give_up_after_s=60)
    last = told[-1]
    assert last.state == "completed", last.problem
    assert max(each.progress.throttle_percent or 0 for each in told) >= 20
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    busy.arrive()
    busy.assert_arrived(attempt)
