"""A switch to postcopy that is lost on its way: the source's QEMU believes in it, and the VM runs on there all the same."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sealane.host.models import Migration
from sealane.host.receipts.statement import Statement
from sealane.host.receipts.verify import verify_chain
from sealane.testing.machine import Hardware
from sealane.testing.pair import AgentHost
from sealane.testing.wiretap import Direction
from tests.e2e.held import held_agent
from tests.e2e.rig import MIB, Rig, make_rig
from tests.e2e.test_crashes import kill_agent, wait
from tests.e2e.test_postcopy import BUSY, SLOWER, meanwhile

pytestmark = pytest.mark.e2e

# Looks at all of its memory every so many ticks.
WORKLOAD = replace(BUSY, check_all=20)

# The source asks again after a pause that grows, where the destination has not seen yet that its QEMU ended.
_PATIENCE_S = 120


class Swallow:
    """Takes, while it is told to, what the source sends, and gives nothing on."""

    def __init__(self) -> None:
        self.is_on = False

    def __call__(self, _connection: int, direction: Direction, _offset: int, data: bytes) -> bytes:
        return b"" if self.is_on and direction == "forward" else data


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unshared")


@pytest.fixture(scope="module")
def busy(directory: Path) -> Iterator[Rig]:
    """Both hosts have the guest's disk."""
    disk = directory / "disk"
    disk.write_bytes(bytes(MIB))
    devices = (
        *("-blockdev", f"driver=file,node-name=disk-file,filename={disk}"),
        *("-blockdev", "driver=raw,node-name=disk,file=disk-file", "-device", "virtio-blk-pci,drive=disk"),
    )
    program, hardware = held_agent(directory / "hold"), Hardware(memory_mib=128, devices=devices)
    with make_rig(hardware=hardware, workload=WORKLOAD, program=program) as rig:
        yield rig


def asked(rig: Rig, command: str) -> Any:
    """What the QEMU at home answers the test, which has a monitor of its own."""
    with rig.guest.machines[rig.home.name].observe() as monitor:
        return monitor.execute(command)


def assert_said(end: AgentHost, migration: Migration) -> None:
    """The receipt of it says where the VM runs."""
    report = verify_chain(end.host.paths)
    assert not report.problems, report.problems
    (said,) = [each.statement for each in report.items if each.sequence == migration.receipt]
    assert isinstance(said, Statement)
    assert (said.predicate.outcome.state, said.predicate.outcome.runs_at) == ("aborted", "source")


@pytest.mark.parametrize("is_killed", [False, True], ids=["agent-there", "agent-killed"])
def test_the_vm_runs_on_at_the_source(busy: Rig, directory: Path, is_killed: bool) -> None:
    home, away, hold, swallow = busy.home, busy.away, directory / "hold", Swallow()
    if is_killed:  # the one before it can be migrated no more
        busy.guest.machines[home.name].stop()
        busy.pair.start_guest(busy.guest, home)
    if not any(each["name"] == "blockdev-set-active" for each in asked(busy, "query-commands")):
        pytest.skip("QEMU before 10.0 cannot take its disks back")
    hold.touch()
    begun: list[str] = []
    with busy.wiretap([swallow]) as wire:
        assert wire is not None

        def once(migration: Migration) -> None:
            if migration.state != "postcopy" or not hold.exists():
                return
            begun.append(migration.id)
            swallow.is_on = True
            hold.unlink()
            wait(lambda: asked(busy, "query-migrate")["status"] == "postcopy-active", "QEMU believes in postcopy")
            if is_killed:
                kill_agent(home)
            wire.cut()
            swallow.is_on = False
            wire.mend()

        meanwhile(busy, once, **SLOWER)
        assert begun
        if is_killed:
            assert not any(each["active"] for each in asked(busy, "query-named-block-nodes"))
            home.start_agent()
        last, arrived = (busy.pair.await_end(end, begun[0], timeout_s=_PATIENCE_S) for end in (home, away))
    for end, migration in ((home, last), (away, arrived)):
        assert (migration.state, migration.runs_at) == ("aborted", "source"), migration
        assert migration.ended_at is not None
        assert_said(end, migration)
    assert last.problem is not None
    assert last.problem.code == "handover.refused"
    console = busy.guest.console
    seen = console.checks
    wait(lambda: console.checks > seen, "the guest has checked all of its memory")
    busy.note_descriptors()
    busy.assert_goes_on(is_set_back=False)
    assert not busy.guest.machines[away.name].console.ticks
    assert all(each["active"] for each in asked(busy, "query-named-block-nodes"))
    assert asked(busy, "query-migrate")["status"] == "postcopy-paused"
    assert_is_not_moved_again(busy)


def assert_is_not_moved_again(rig: Rig) -> None:
    """The next migration is refused before anything happens, and says what mends it."""
    with rig.home.client() as client:
        last = [event.migration for event in client.events(rig.begin().id)][-1]
    assert (last.state, last.runs_at) == ("aborted", "source")
    assert last.problem is not None
    assert last.problem.code == "vm.busy"
    assert "restart its QEMU" in last.problem.mend
    rig.assert_goes_on(is_set_back=False)
