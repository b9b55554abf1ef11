"""Two VMs that leave a host at once share its total rate, and each has its part of what the other leaves."""

import pytest

from sealane.host.models import Event, MigrationRequest, TotalRate
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import make_pair

pytestmark = pytest.mark.e2e

MIB = 1 << 20
# 96 MiB at these rates would take most of a minute: the copies cannot be over before they are told to hurry.
TOTAL = 4 * MIB
OWN = 1 * MIB


def test_copies_share_the_total_rate_and_take_what_becomes_free() -> None:
    settings = f"[limits]\ntotal_rate_max_bytes_per_s = {TOTAL}\n"
    with make_pair(settings=settings) as pair:
        guests = [
            pair.add_guest(name, hardware=Hardware(memory_mib=128), workload=Workload(fill_mib=48, tick_ms=250))
            for name in ("web01", "web02")
        ]
        for guest in guests:
            pair.start_guest(guest, pair.a)
        with pair.a.client() as client:
            modest = client.start_migration(
                MigrationRequest(vm=guests[0].name, host=pair.b.name, max_bandwidth_bytes_per_s=OWN)
            )
            other = client.start_migration(MigrationRequest(vm=guests[1].name, host=pair.b.name))
            seen: list[int] = []
            ended: list[Event] = []
            for event in client.events(other.id):
                limit = event.migration.progress.rate_limit_bytes_per_s
                if limit and limit not in seen[-1:]:
                    seen.append(limit)
                    if limit == TOTAL - OWN:  # the modest one is known to be there: it goes, and leaves its share
                        client.cancel(modest.id)
                    elif limit == TOTAL and TOTAL - OWN in seen:
                        client.change_total_rate(TotalRate(max_bytes_per_s=2 * TOTAL))
                    elif limit == 2 * TOTAL:
                        client.change_total_rate(TotalRate(max_bytes_per_s=0))
                ended.append(event)
            assert ended[-1].migration.state == "completed", ended[-1].migration.problem
            assert seen[-3:] == [TOTAL - OWN, TOTAL, 2 * TOTAL]
            assert "sealane_rate_limit_bytes_per_second 0.0" in client.metrics()
