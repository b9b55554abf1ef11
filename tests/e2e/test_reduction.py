"""Over a slow line: fewer bytes, the same memory; with `reduce` off every byte."""

from collections.abc import Iterator

import pytest

from sealane.testing.hosts import INTERFACE, namespaces_work
from sealane.testing.machine import Workload
from sealane.testing.qemu import find_qemu
from tests.e2e.rig import HARDWARE, Rig, make_rig
from tests.e2e.test_protection import ALLOWED, allow_all

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not namespaces_work(), reason="only root may make network namespaces"),
    pytest.mark.skipif(not find_qemu().tracks_dirty_pages_under_tcg, reason="this QEMU loses dirty pages under TCG"),
]

# 16 MiB that change, 32 MiB that are written with what they hold; all of it is read and compared every few ticks.
WRITING = Workload(fill_mib=64, rewrite_kib_per_s=1000, touch_kib_per_s=32_000, touch_mib=32, check_all=3)
RATE = ("rate", "300mbit", "burst", "256kb", "latency", "10ms")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig(network="netns", hardware=HARDWARE, workload=WRITING, settings=ALLOWED) as made:
        allow_all(made)
        for end in (made.home, made.away):
            end.host.run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *RATE)
        yield made


def memory_is_checked_again(rig: Rig) -> None:
    """The guest's worker stops ticking where a page does not hold what it wrote."""
    checks = rig.guest.console.checks
    while rig.guest.console.checks < checks + 2:
        rig.guest.wait_ticks(1)


@pytest.mark.parametrize(("channels", "protection"), [(0, "sealed"), (2, "sealed"), (0, "selective"), (2, "hrt")])
def test_fewer_bytes_cross_and_memory_is_the_same(rig: Rig, channels: int, protection: str) -> None:
    attempt = rig.attempt(multifd_channels=channels, protection=protection, i_know_this_is_weak=protection != "sealed")
    rig.assert_arrived(attempt)
    memory_is_checked_again(rig)
    result = attempt.source.result
    assert result is not None
    assert result.not_sent.same_bytes > 1 << 20
    assert result.not_sent.zstd_bytes > 1 << 20


def test_without_reducing_every_byte_crosses(rig: Rig) -> None:
    attempt = rig.attempt(reduce=False, multifd_channels=0, downtime_limit_ms=3000)
    rig.assert_arrived(attempt)
    result = attempt.source.result
    assert result is not None
    assert result.not_sent.model_dump() == {"zero_bytes": 0, "same_bytes": 0, "zstd_bytes": 0}
