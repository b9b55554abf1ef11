"""What must work: both QEMUs, both kinds of network, any number of lanes, several VMs at once, many times over."""

from collections.abc import Iterator
from typing import Literal

import pytest

from sealane.host.models import MigrationRequest
from sealane.testing.hosts import namespaces_work
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import make_pair
from sealane.testing.qemu import QemuBinary, all_qemus, find_qemu
from tests.e2e.rig import HARDWARE, SLOWLY, WORKLOAD, Rig, make_rig

pytestmark = pytest.mark.e2e

MOVES = 6
GUESTS = 4
# Rewrites two MB a second and reads all of its memory again after every few ticks.
WRITING = Workload(fill_mib=16, rewrite_kib_per_s=2000, check_all=3)
OLD_MACHINE = Hardware(memory_mib=256, machine="pc-q35-7.2")


@pytest.fixture(scope="module", params=all_qemus(), ids=str)
def qemu(request: pytest.FixtureRequest) -> QemuBinary:
    binary: QemuBinary = request.param
    return binary


@pytest.fixture(scope="module")
def rig(qemu: QemuBinary) -> Iterator[Rig]:
    with make_rig(qemu=qemu) as made:
        yield made


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_number_of_channels(rig: Rig, channels: int) -> None:
    attempt = rig.attempt(multifd_channels=channels)
    rig.assert_arrived(attempt)
    assert attempt.source.multifd_channels == channels
    assert attempt.source.tls_version == "TLSv1.3"
    assert attempt.source.kex_group == "X25519MLKEM768"
    assert attempt.source.result is not None
    assert attempt.source.result.bytes_wire > WORKLOAD.fill_mib << 20


def test_cancel_with_either_qemu(rig: Rig) -> None:
    """An abort also with the QEMU that the other modules do not take: it ends its streams in other ways."""
    attempt = rig.attempt(during=lambda found: cancel(rig, found.id), at_bytes=1 << 20, **SLOWLY)
    rig.assert_aborted(attempt, "migration.cancelled", destination=["migration.cancelled"])
    rig.assert_arrived(rig.attempt())


@pytest.mark.parametrize("network", ["netns", "loopback"])
def test_network(network: Literal["netns", "loopback"]) -> None:
    if network == "netns" and not namespaces_work():
        pytest.skip("only root may make network namespaces")
    with make_rig(network=network) as rig:
        rig.migrate_and_return()


def test_back_and_forth_with_a_writing_guest() -> None:
    if not find_qemu().tracks_dirty_pages_under_tcg:
        pytest.skip("this QEMU loses dirty pages under TCG")
    with make_rig(hardware=HARDWARE, workload=WRITING) as rig:
        for _ in range(MOVES):
            rig.assert_arrived(rig.attempt())
            checks = rig.guest.console.checks
            while rig.guest.console.checks < checks + 2:
                rig.guest.wait_ticks(1)
            assert not rig.guest.console.corruptions
        with rig.home.client() as client:
            assert client.vm(rig.guest.name).epoch == MOVES


def test_four_at_once() -> None:
    with make_pair() as pair:
        guests = [
            pair.add_guest(f"guest-{number}", hardware=HARDWARE, workload=Workload(fill_mib=16))
            for number in range(GUESTS)
        ]
        for guest in guests:
            pair.start_guest(guest, pair.a)
        with pair.a.client() as client:
            begun = [client.start_migration(MigrationRequest(vm=guest.name, host=pair.b.name)) for guest in guests]
            for guest, migration in zip(guests, begun, strict=True):
                last = [event.migration for event in client.events(migration.id)][-1]
                assert last.state == "completed", last.problem
                guest.moved_to(pair.b.name)
        for guest in guests:
            guest.wait_ticks(3)
            assert guest.console.is_contiguous
            assert not guest.console.corruptions
        with pair.a.client() as here, pair.b.client() as there:
            assert {vm.state for vm in here.vms()} == {"absent"}
            assert {vm.state for vm in there.vms()} == {"running"}


def test_to_an_older_qemu_is_refused() -> None:
    old, new = two_versions()
    with make_rig(qemu=new, hardware=OLD_MACHINE) as rig:
        argv = rig.guest.machines[rig.away.name].command()
        with rig.launched_as([str(old.path), *argv[1:]]):
            attempt = rig.attempt()
        rig.assert_aborted(attempt, "check.qemu-version", destination=["check.qemu-version"])
        rig.assert_arrived(rig.attempt())


def test_to_a_newer_qemu() -> None:
    old, new = two_versions()
    with make_rig(qemu=old, hardware=OLD_MACHINE) as rig:
        argv = rig.guest.machines[rig.away.name].command()
        with rig.launched_as([str(new.path), *argv[1:]]):
            rig.assert_arrived(rig.attempt())


def two_versions() -> tuple[QemuBinary, QemuBinary]:
    found = all_qemus()
    if len(found) < 2:
        pytest.skip("only one QEMU is here")
    return found[0], found[-1]


def cancel(rig: Rig, migration: str) -> None:
    with rig.home.client() as client:
        client.cancel(migration)
