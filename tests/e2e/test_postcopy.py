"""A guest that writes faster than the line arrives by postcopy, through cuts too, with its memory as it was."""

from collections.abc import Iterator

import pytest

from sealane.host.models import Migration
from sealane.testing.machine import Workload
from sealane.testing.wiretap import Direction
from tests.e2e.rig import MIB, Attempt, Rig, make_rig

pytestmark = pytest.mark.e2e

BUSY = Workload(fill_mib=32, rewrite_kib_per_s=20 * 1024)
# The rewrites outrun it; the first pass over what the guest holds takes some eight seconds.
SLOWER = {
    "max_bandwidth_bytes_per_s": 12 * MIB,
    "downtime_limit_ms": 100,
    "reduce": False,
    "on_stall": "postcopy",
    "give_up_after_s": 1,
}


@pytest.fixture(scope="module")
def busy() -> Iterator[Rig]:
    with make_rig(workload=BUSY) as rig:
        yield rig


def followed(rig: Rig, **options: object) -> list[Migration]:
    """Every word of the migration, the last one at the end."""
    begun = rig.begin(**options)
    with rig.home.client() as client:
        return [event.migration for event in client.events(begun.id)]


def untouched(_connection: int, _direction: Direction, _offset: int, data: bytes) -> bytes:
    return data


def test_arrives_though_it_writes_faster_than_the_line(busy: Rig) -> None:
    told = followed(busy, **SLOWER)
    last = told[-1]
    assert last.state == "completed", last.problem
    assert last.result is not None
    assert last.result.downtime_ms is not None
    assert last.result.copy_ms is not None
    assert last.result.downtime_ms < last.result.copy_ms
    states = list(dict.fromkeys(each.state for each in told))
    assert states[-4:] == ["copying", "switching-over", "postcopy", "completed"]
    assert any(each.progress.postcopy_requests for each in told if each.state == "postcopy")
    assert all(each.runs_at == "destination" for each in told if each.state == "postcopy")
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    assert attempt.destination is not None
    assert attempt.destination.stream_digest == last.stream_digest is not None
    busy.arrive()
    busy.assert_arrived(attempt)


def test_a_cut_half_way_is_joined_again(busy: Rig) -> None:
    with busy.wiretap([untouched]) as wire:
        assert wire is not None
        begun = busy.begin(**SLOWER)
        told, cuts = [], 0
        with busy.home.client() as client:
            for event in client.events(begun.id):
                told.append(event.migration)
                state, progress = event.migration.state, event.migration.progress
                print(
                    state,
                    event.migration.detail,
                    progress.postcopy_requests,
                    progress.bytes_wire,
                    progress.bytes_remaining,
                )
                if not cuts and state == "postcopy" and progress.postcopy_requests is not None:
                    cuts += 1
                    wire.cut()
                elif state == "postcopy-paused":
                    wire.mend()
        last = told[-1]
    assert cuts
    assert "postcopy-paused" in [each.state for each in told]
    assert last.state == "completed", last.problem
    assert last.problem is None
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    busy.arrive()
    busy.assert_arrived(attempt)
