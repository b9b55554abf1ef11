"""What the destination cannot or must not take: found out before the VM stops, told in one line, nothing left."""

import os
import signal
import socket
import sys
from collections.abc import Iterator

import pytest

from sealane.errors import SealaneError
from sealane.host.models import MigrationRequest, VmDefinition
from sealane.testing.machine import GuestMachine
from tests.e2e.rig import MIB, SLOWLY, Attempt, Rig, make_rig

pytestmark = pytest.mark.e2e

LAUNCH_TIMEOUT_S = 3


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig(settings=f"[limits]\nlaunch_timeout_s = {LAUNCH_TIMEOUT_S}\nqmp_timeout_s = 4\n") as made:
        yield made


def command(rig: Rig, **words: str) -> list[str]:
    """The destination's launch command with other values for some options (`smp="2"`)."""
    argv = rig.guest.machines[rig.away.name].command()
    for option, value in words.items():
        argv[argv.index(f"-{option}") + 1] = value
    return argv


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["/nowhere/qemu-system-x86_64"], "launch.failed"),
        (["/etc/hostname"], "launch.failed"),
        (["/bin/false"], "launch.failed"),
        (["/bin/sh", "-c", "echo the disk is missing >&2; exit 3"], "launch.failed"),
        (["/bin/sh", "-c", "exec sleep 60"], "launch.slow"),
    ],
    ids=["no such file", "no program", "fails", "fails with words", "hangs"],
)
def test_destination_does_not_start(rig: Rig, argv: list[str], code: str) -> None:
    with rig.launched_as(argv):
        attempt = rig.attempt()
        rig.assert_aborted(attempt, code, destination=[code])
    if "missing" in argv[-1]:
        told_at_the_destination_alone(attempt, "the disk is missing")


def test_destination_says_nothing_on_its_monitor(rig: Rig) -> None:
    """A process that listens there and never greets is found out by the launch's time."""
    path = rig.guest.machines[rig.away.name].qmp_path
    silent = f"import socket,time; s=socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); time.sleep(60)"
    with rig.launched_as([sys.executable, "-c", silent]):
        rig.assert_aborted(rig.attempt(), "launch.slow", destination=["launch.slow"])


def test_destination_has_a_wrong_option(rig: Rig) -> None:
    with rig.launched_as([*command(rig), "-device", "no-such-device"]):
        attempt = rig.attempt()
        rig.assert_aborted(attempt, "launch.failed", destination=["launch.failed"])
    told_at_the_destination_alone(attempt, "no-such-device")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({"machine": "pc"}, "check.machine-type"),
        ({"machine": "pc-q35-6.2"}, "check.machine-type"),
        ({"m": "128"}, "check.memory"),
        ({"m": "512"}, "check.memory"),
        ({"smp": "2"}, "check.cpus"),
    ],
    ids=["other machine", "older machine type", "less memory", "more memory", "more CPUs"],
)
def test_destination_is_another_machine(rig: Rig, words: dict[str, str], code: str) -> None:
    with rig.launched_as(command(rig, **words)):
        rig.assert_aborted(rig.attempt(), code, destination=[code])


def test_destination_lacks_a_device(rig: Rig) -> None:
    """No check sees the devices; QEMU does, when their state arrives."""
    argv = command(rig)
    serial = argv.index("-serial")
    with rig.launched_as([*argv[:serial], *argv[serial + 2 :]]):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "migration.destination-died", destination=["migration.destination-died"])
    told_at_the_destination_alone(attempt, "serial")


def test_vm_unknown_at_the_destination(rig: Rig) -> None:
    with rig.launched_as(command(rig), name="another"):
        rig.assert_aborted(rig.attempt(), "check.vm-unknown")


def test_vm_without_launch_command(rig: Rig) -> None:
    with rig.launched_as(None):
        rig.assert_aborted(rig.attempt(), "check.no-launch")


def test_vm_runs_at_the_destination_already(rig: Rig) -> None:
    machine: GuestMachine = rig.guest.machines[rig.away.name]
    with machine.start("-S"):
        attempt = rig.attempt()
        assert attempt.code == "check.vm-present", attempt.source.problem
        assert machine.is_running
    for path in (machine.qmp_path, machine.observer_path):
        path.unlink()
    rig.assert_aborted(attempt, "check.vm-present", destination=["check.vm-present"])


def test_vm_at_the_destination_serves_another_client(rig: Rig) -> None:
    """QMP greets one client at a time: who is not greeted must not conclude that nobody is there."""
    machine: GuestMachine = rig.guest.machines[rig.away.name]
    with machine.start("-S"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(machine.qmp_path))
            assert other.recv(10)
            attempt = rig.attempt()
        assert machine.is_running
    for path in (machine.qmp_path, machine.observer_path):
        path.unlink()
    rig.assert_aborted(attempt, "check.vm-present", destination=["check.vm-present"])


def test_source_vm_is_paused(rig: Rig) -> None:
    with rig.guest.machines[rig.home.name].observe() as monitor:
        monitor.execute("stop")
        attempt = rig.attempt()
        assert attempt.code == "vm.not-running"
        assert monitor.execute("query-status")["status"] == "paused"
        monitor.execute("cont")
    rig.assert_aborted(attempt, "vm.not-running")


def test_destination_qemu_killed_in_the_middle(rig: Rig) -> None:
    attempt = rig.attempt(during=lambda _: os.kill(rig.qemu_of(rig.away), signal.SIGKILL), at_bytes=8 * MIB, **SLOWLY)
    rig.assert_aborted(attempt, "migration.destination-died", destination=["migration.destination-died"])


def test_unknown_vm_at_the_source(rig: Rig) -> None:
    with rig.home.client() as client, pytest.raises(SealaneError, match=r"vm\.unknown"):
        client.start_migration(MigrationRequest(vm="nobody", host=rig.away.name))
    rig.assert_goes_on()


def test_vm_of_that_socket_is_gone_at_the_source(rig: Rig) -> None:
    with rig.home.client() as client:
        client.add_vm(VmDefinition(name="gone", qmp="/nowhere/qmp.sock"))
        begun = client.start_migration(MigrationRequest(vm="gone", host=rig.away.name))
        last = [event.migration for event in client.events(begun.id)][-1]
        client.remove_vm("gone")
    assert last.problem is not None
    assert last.problem.code == "vm.unreachable"
    rig.assert_goes_on()


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()


def told_at_the_destination_alone(attempt: Attempt, words: str) -> None:
    """What QEMU says of its host is for that host; the source hears what kind of thing it was."""
    assert attempt.destination is not None
    assert attempt.destination.problem is not None
    assert attempt.source.problem is not None
    assert words in attempt.destination.problem.detail
    assert words not in attempt.source.problem.detail
