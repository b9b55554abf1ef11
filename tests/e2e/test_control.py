"""Cancelling, hooks, a second migration of the same VM, a link that stalls, disks that are full."""

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest
from sealane.hypervisor.qmp import QmpMachine
from sealane.testing.faults import on_record, stall
from sealane.testing.pair import AgentHost
from tests.e2e.rig import MIB, SLOWLY, Attempt, Rig, make_rig

pytestmark = pytest.mark.e2e

MIDDLE = 8 * MIB
OWN: Mapping[str, object] = {"downtime-limit": 2000, "max-bandwidth": 1 << 40}


# Cancel


@pytest.mark.parametrize("state", ["preparing", "copying"])
def test_cancel(rig: Rig, state: str) -> None:
    attempt = rig.attempt(during=lambda found: cancel(rig.home, found), at_state=state, **SLOWLY)
    rig.assert_aborted(attempt, "migration.cancelled", destination=["migration.cancelled", None])  # type: ignore[list-item]


def test_cancel_at_the_destination(rig: Rig) -> None:
    attempt = rig.attempt(during=lambda found: cancel(rig.away, found), at_bytes=MIDDLE, **SLOWLY)
    rig.assert_aborted(attempt, "migration.cancelled", destination=["migration.cancelled"])


def test_cancel_while_switching_over(rig: Rig) -> None:
    attempt = rig.attempt(
        during=lambda found: cancel(rig.home, found), at_state="switching-over", switchover_hook=["sleep", "30"]
    )
    rig.assert_aborted(attempt, "migration.cancelled", destination=["migration.cancelled"])


def test_cancel_twice_and_too_late(rig: Rig) -> None:
    def cancel_twice(found: Migration) -> None:
        cancel(rig.home, found)
        with contextlib.suppress(SealaneError):
            cancel(rig.home, found)

    attempt = rig.attempt(during=cancel_twice, at_bytes=1, **SLOWLY)
    rig.assert_aborted(attempt, "migration.cancelled")
    with rig.home.client() as client, pytest.raises(SealaneError, match=r"migration\.over"):
        client.cancel(attempt.source.id)


# What a move leaves in QEMU


def test_a_migrate_by_hand_after_a_cancelled_move(rig: Rig) -> None:
    """It finds the settings that a person made before, and ends without a word of Sealane's."""

    async def by_hand() -> None:
        async with QmpMachine.connect(str(rig.guest.machines[rig.home.name].qmp_path)) as qemu:
            assert (await qemu.migration_settings()).parameters["downtime-limit"] == OWN["downtime-limit"]
            await qemu.migrate("exec:cat >/dev/null")
            await qemu.wait_migration({"completed"}, 60.0)
            await qemu.resume()

    async def set_by_hand(values: Mapping[str, object]) -> None:
        async with QmpMachine.connect(str(rig.guest.machines[rig.home.name].qmp_path)) as qemu:
            await qemu.execute("migrate-set-parameters", values)

    fresh = rig.settings
    assert fresh is not None
    asyncio.run(set_by_hand(OWN))
    rig.settings = rig.settings_of(rig.home)
    assert OWN.items() <= rig.settings.parameters.items()
    attempt = rig.attempt(during=lambda found: cancel(rig.home, found), at_bytes=MIDDLE, **SLOWLY)
    rig.assert_aborted(attempt, "migration.cancelled")
    asyncio.run(by_hand())
    asyncio.run(set_by_hand({name: fresh.parameters[name] for name in OWN}))
    rig.settings = fresh
    rig.assert_goes_on()
    rig.assert_arrived(rig.attempt())


# The switch-over hook


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (["sh", "-c", "echo the database is not ready; exit 1"], "the database is not ready"),
        (["/nowhere/hook"], "No such file"),
        (["sh", "-c", "kill -9 $$"], "-9"),
    ],
    ids=["says no", "is missing", "is killed"],
)
def test_hook_fails(rig: Rig, hook: list[str], words: str) -> None:
    attempt = rig.attempt(switchover_hook=hook)
    rig.assert_aborted(attempt, "migration.hook-failed", destination=["migration.hook-failed"])
    assert attempt.source.problem is not None
    assert words in attempt.source.problem.detail


def test_hook_hangs(rig: Rig) -> None:
    attempt = rig.attempt(switchover_hook=["sh", "-c", "sleep 100 & sleep 100"])
    rig.assert_aborted(attempt, "migration.hook-failed", destination=["migration.hook-failed"])


def test_hook_agrees(rig: Rig) -> None:
    rig.assert_arrived(rig.attempt(switchover_hook=["true"]))


# The same VM twice


def test_second_migration_of_the_same_vm(rig: Rig) -> None:
    def again(_: Migration) -> None:
        with pytest.raises(SealaneError, match=r"vm\.busy"):
            rig.begin()
        with rig.away.client() as client, pytest.raises(SealaneError, match=r"vm\.busy"):
            client.start_migration(MigrationRequest(vm=rig.guest.name, host=rig.home.name))
        with rig.home.client() as client, pytest.raises(SealaneError, match=r"vm\.busy"):
            client.remove_vm(rig.guest.name)

    rig.assert_arrived(rig.attempt(during=again, at_bytes=MIDDLE, **SLOWLY))


def test_both_sides_at_once(rig: Rig) -> None:
    """The destination is asked to send what it does not have: it says so, and the one migration goes on."""
    with rig.away.client() as client:
        other = client.start_migration(MigrationRequest(vm=rig.guest.name, host=rig.home.name))
        refused = [event.migration for event in client.events(other.id)][-1]
    assert refused.problem is not None
    assert refused.problem.code == "vm.unreachable"
    arrived = rig.attempt()
    rig.assert_arrived(arrived)
    with rig.away.client() as client:
        other = client.start_migration(MigrationRequest(vm=rig.guest.name, host=rig.home.name))
        refused = [event.migration for event in client.events(other.id)][-1]
    assert refused.problem is not None
    went = f"{rig.guest.name} went to {rig.home.name} in migration {arrived.source.number}"
    assert (refused.problem.code, refused.problem.detail.partition(",")[0]) == ("vm.unreachable", went)


# A link that stalls


@pytest.mark.parametrize("lane", [0, 1])
def test_link_stalls_and_goes_on(rig: Rig, lane: int) -> None:
    with rig.wiretap([on_record(lane=lane, which={0: 2, 1: 20}[lane], change=stall)]) as wire:
        assert wire is not None
        begun = rig.begin(**SLOWLY)
        assert wire.stalled.wait(20.0)
        rig.guest.wait_ticks(10)
        wire.release()
        last = rig.follow(begun, None, "", 0)
        arrived = rig.seen_by(rig.away, begun.id)
    assert last.state == "completed", last.problem
    rig.arrive()
    rig.assert_arrived(Attempt(last, arrived, wire))


def test_cancel_while_the_link_stalls(rig: Rig) -> None:
    with rig.wiretap([on_record(lane=1, which=20, change=stall)]) as wire:
        assert wire is not None
        begun = rig.begin(**SLOWLY)
        assert wire.stalled.wait(20.0)
        cancel(rig.home, begun)
        last = rig.follow(begun, None, "", 0)
        arrived = rig.seen_by(rig.away, begun.id)
    rig.assert_aborted(Attempt(last, arrived), "migration.cancelled", destination=["migration.cancelled"])


# Disks that are full


@pytest.fixture
def small_disk() -> Iterator[Rig]:
    """Agents whose state directories are file systems of a few MiB."""
    with make_rig() as rig, contextlib.ExitStack() as stack:
        for end in (rig.home, rig.away):
            assert end.agent is not None
            end.agent.stop()
            state = end.host.paths.state
            kept = [(path.name, path.read_bytes()) for path in state.iterdir() if path.is_file()]
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(state)], capture_output=True, check=False
            )
            if done.returncode:
                pytest.skip("only root may mount a small disk")
            stack.callback(subprocess.run, ["umount", "-l", str(state)], check=True)
            stack.callback(end.agent.stop)
            for name, data in kept:
                (state / name).write_bytes(data)
                (state / name).chmod(0o600)
            end.start_agent()
            stack.callback(end.agent.stop)
        rig.note_descriptors()
        yield rig


@contextlib.contextmanager
def filled(end: AgentHost) -> Iterator[None]:
    """While it lasts no byte more fits into the state directory."""
    ballast = end.host.paths.state / "ballast"
    fill(ballast)
    try:
        yield
    finally:
        ballast.unlink()


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("end", ["source", "destination"])
def test_disk_full_from_the_start(small_disk: Rig, end: str) -> None:
    rig = small_disk
    with filled(rig.home if end == "source" else rig.away):
        if end == "source":
            with pytest.raises(SealaneError, match=r"host\.disk-full"):
                rig.begin()
            rig.assert_goes_on()
        else:
            rig.assert_aborted(rig.attempt(), "host.disk-full")
    rig.migrate_and_return()


@pytest.mark.parametrize("end", ["source", "destination"])
def test_disk_full_in_the_middle(small_disk: Rig, end: str) -> None:
    """Also the end cannot be journalled then; it is told all the same, and a restarted agent finds the VM as it is."""
    rig = small_disk
    full = rig.home if end == "source" else rig.away
    ballast = full.host.paths.state / "ballast"
    attempt = rig.attempt(during=lambda _: fill(ballast), at_bytes=1, **SLOWLY)
    ballast.unlink()
    rig.assert_aborted(attempt, "host.disk-full", "handover.refused")
    rig.migrate_and_return()


def cancel(end: AgentHost, migration: Migration) -> None:
    with end.client() as client:
        client.cancel(migration.id)


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()
