"""What a new agent does with each unfinished migration, with real QEMUs and a real journal."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from sealane.errors import SealaneError, make_error
from sealane.host import recovery as recovery_module
from sealane.host.doubts import resolution_of
from sealane.host.jobs import Jobs
from sealane.host.migration.messages import Promise
from sealane.host.models import Migration
from sealane.host.problems import problem_of
from sealane.host.recovery import Recovery
from sealane.host.store import JournalEntry, Store
from sealane.hypervisor.driver import MigrationParameters, MigrationSettings
from sealane.hypervisor.launch import launch_incoming
from sealane.hypervisor.process import LaunchedMachine, start_time_ticks
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.domains import DomainAddress
from sealane.libvirt.machine import DomainMachine
from tests.host.factories import NOW, migration
from tests.host.stand_ins import StandInJob
from tests.hypervisor.machines import command, running, skip_without_qemu
from tests.hypervisor.strands import failed_switch, unshared_switch

pytestmark = pytest.mark.e2e
QEMU = skip_without_qemu()[-1]


@contextlib.asynccontextmanager
async def stopped_by_migration(tmp_path: Path, *, completed: bool) -> AsyncIterator[MigrationSettings]:
    """A source QEMU whose agent vanished in the switch-over, or after QEMU had sent everything; what it was set to before."""
    async with (
        running(command(QEMU, tmp_path / "s"), tmp_path / "s") as source,
        running(command(QEMU, tmp_path / "d", "-incoming", "defer"), tmp_path / "d") as destination,
    ):
        await destination.configure_migration(MigrationParameters(), incoming=True)
        before = await source.migration_settings()
        await source.configure_migration(MigrationParameters(), incoming=False)
        await destination.migrate_incoming(f"unix:{tmp_path / 'm'}")
        await source.migrate(f"unix:{tmp_path / 'm'}")
        await source.wait_migration({"pre-switchover"}, 60)
        if completed:
            await source.migrate_continue()
            await source.wait_migration({"completed"}, 60)
        await source.aclose()
        yield before


async def recovered(store: Store, qmp: Path) -> tuple[Jobs, Recovery]:
    jobs = Jobs(store)
    recovery = Recovery(store, jobs, lambda _vm: str(qmp), qmp_timeout_s=60)  # a starved QEMU answers all the same
    await recovery.recover()
    return jobs, recovery


async def run_state(path: Path) -> str:
    async with QmpMachine.connect(str(path), 10) as machine:
        return await machine.run_state()


@pytest.mark.parametrize("completed", [False, True])
@pytest.mark.parametrize(
    ("state", "ends", "runs"),
    [
        ("copying", "aborted", True),
        ("switching-over", "aborted", True),
        ("handing-over", "in-doubt", False),
        ("in-doubt", "in-doubt", False),
    ],
)
async def test_source(tmp_path: Path, completed: bool, state: str, ends: str, runs: bool) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state=state), qmp=str(tmp_path / "s"))
        async with stopped_by_migration(tmp_path, completed=completed) as before:
            store.journal(migration(1, state=state), qemu_before=before)
            jobs, _ = await recovered(store, tmp_path / "s")
            async with QmpMachine.connect(str(tmp_path / "s"), 10) as machine:
                assert (await machine.migration_settings() == before) == runs
            assert await run_state(tmp_path / "s") in ({"running"} if runs else {"finish-migrate", "postmigrate"})
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == (ends, "source" if runs else "in-doubt")
        assert after.problem
        assert after.problem.code == ("agent.restarted" if runs else "handover.in-doubt")
        assert (jobs.active_for("web01") is None) == runs
        assert (after.ended_at is not None) == runs


@pytest.mark.parametrize(("state", "expected"), [("copying", "paused"), ("switching-over", "running")])
async def test_a_paused_source_is_resumed_only_if_we_paused_it(tmp_path: Path, state: str, expected: str) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state=state), qmp=str(tmp_path / "s"))
        async with running(command(QEMU, tmp_path / "s"), tmp_path / "s") as source:
            await source.stop()
            await source.aclose()
            await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == expected


async def test_a_source_whose_receipt_came_ends_its_copy(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="completed", runs_at="destination"), qmp=str(tmp_path / "s"))
        async with stopped_by_migration(tmp_path, completed=True):
            jobs, _ = await recovered(store, tmp_path / "s")
            with pytest.raises(SealaneError, match=r"vm\.unreachable"):
                await run_state(tmp_path / "s")
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ("completed", "destination")
        assert after.ended_at
        assert jobs.active_for("web01") is None
        assert store.unfinished() == []


async def test_a_source_whose_receipt_came_leaves_another_vm_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="completed", runs_at="destination"), qmp=str(tmp_path / "s"))
        async with running(command(QEMU, tmp_path / "s"), tmp_path / "s") as started_anew:
            await started_anew.aclose()
            await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == "running"


@pytest.mark.parametrize("state", ["handing-over", "in-doubt", "postcopy", "postcopy-paused"])
async def test_a_source_that_runs_is_not_in_doubt(tmp_path: Path, state: str) -> None:
    """The refusal was heard and the VM resumed, and the agent died before it wrote that down."""
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state=state), qmp=str(tmp_path / "s"))
        async with stopped_by_migration(tmp_path, completed=True):
            async with QmpMachine.connect(str(tmp_path / "s"), 10) as source:
                # QEMU says "completed" a moment before it has tidied up
                while await source.run_state() == "finish-migrate":
                    await asyncio.sleep(0.01)
                await source.resume()
            jobs, _ = await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == "running"
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == ("aborted", "source")
        assert jobs.active_for("web01") is None


@pytest.mark.parametrize(
    ("state", "stays", "runs_at"),
    [
        ("handing-over", "in-doubt", "in-doubt"),
        ("in-doubt", "in-doubt", "in-doubt"),
        ("postcopy", "postcopy-paused", "destination"),
    ],
)
async def test_a_vm_that_was_started_anew_ends_no_doubt(tmp_path: Path, state: str, stays: str, runs_at: str) -> None:
    """The host lost its power, and something starts its VMs at boot: what was sent away may run at the destination all the same."""
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state=state), qmp=str(tmp_path / "s"))
        async with running(command(QEMU, tmp_path / "s"), tmp_path / "s") as started_anew:
            await started_anew.aclose()
            jobs, _ = await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == "running"
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == (stays, runs_at)
        assert jobs.active_for("web01")


@pytest.mark.parametrize(("reason", "ends"), [("BOOTED", "in-doubt"), ("UNPAUSED", "aborted")])
async def test_nor_does_a_domain_of_libvirt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, ends: str
) -> None:
    libvirt = pytest.importorskip("libvirt")
    numbers = [libvirt.VIR_DOMAIN_RUNNING, getattr(libvirt, f"VIR_DOMAIN_RUNNING_{reason}")]
    connection = SimpleNamespace(lookupByUUIDString=lambda _: SimpleNamespace(state=lambda: numbers))
    machine = DomainMachine(connection, DomainAddress(UUID(int=1), "qemu:///system"), 60)
    monkeypatch.setattr(Recovery, "_machine", lambda _recovery, _entry: contextlib.nullcontext(machine))
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="handing-over"))
        await recovered(store, tmp_path / "s")
        assert store.migrations()[0].state == ends


async def test_a_source_that_hangs_stays_open_and_one_that_is_gone_does_not(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="copying"), qmp=str(tmp_path / "s"))
        async with running(command(QEMU, tmp_path / "s", "-S"), tmp_path / "s"):  # its one client is taken
            jobs = Jobs(store)
            recovery = Recovery(store, jobs, lambda _vm: None, qmp_timeout_s=0.2)
            await recovery.recover()
            assert not recovery.is_done
            assert jobs.active_for("web01")
        await recovery.recover()
        assert recovery.is_done
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == ("aborted", "nowhere")


@pytest.mark.parametrize("state", ["preparing", "copying", "switching-over"])
@pytest.mark.parametrize("journalled", [True, False])
async def test_destination_before_the_ticket_is_destroyed(tmp_path: Path, state: str, journalled: bool) -> None:
    path = tmp_path / "d"
    machine = await launch_incoming(command(QEMU, path), str(path), tmp_path / "log", 30)
    with Store(tmp_path / "db") as store:
        launched = machine if journalled else None
        store.journal(migration(1, role="destination", state=state), qmp=str(path), launched=launched)
        await recovered(store, path)
        assert start_time_ticks(machine.pid) is None
        assert not path.exists()
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == ("aborted", "source")


async def test_destination_with_the_ticket_runs(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with Store(tmp_path / "db") as store:
        async with running(command(QEMU, path, "-S"), path) as machine:
            launched = LaunchedMachine(machine.pid, start_time_ticks(machine.pid) or 0)
            store.journal(migration(1, role="destination", state="handing-over"), qmp=str(path), launched=launched)
            await machine.aclose()
            await recovered(store, path)
            assert await run_state(path) == "running"
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == ("completed", "destination")
        store.journal(migration(2, role="destination", state="handing-over"), qmp=str(path))
        await recovered(store, path)
        assert (store.migrations()[0].state, store.migrations()[0].runs_at) == ("completed", "nowhere")


@pytest.mark.parametrize("state", ["handing-over", "postcopy-paused"])
@pytest.mark.parametrize("is_there", [True, False])
async def test_only_what_was_launched_is_let_run(tmp_path: Path, state: str, is_there: bool) -> None:
    """Another QEMU on the VM's socket is not the VM that came: whoever started it says when it runs."""
    path, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    with Store(tmp_path / "db") as store:
        async with running(command(QEMU, elsewhere, "-S"), elsewhere) as machine:
            launched = LaunchedMachine(machine.pid, (start_time_ticks(machine.pid) or 0) - (not is_there))
            store.journal(migration(1, role="destination", state=state), qmp=str(path), launched=launched)
            async with running(command(QEMU, path, "-S"), path) as other:
                await other.aclose()
                await recovered(store, path)
                assert await run_state(path) == "prelaunch"
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ((state, "source") if is_there else ("completed", "nowhere"))


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_what_a_job_could_not_do_at_its_end_is_done_later(tmp_path: Path, role: str) -> None:
    """Aborted and not ended: a source's VM is still paused, a destination's QEMU still there."""
    path = tmp_path / "q"
    with Store(tmp_path / "db") as store:
        left = migration(1, role=role, state="aborted", runs_at="nowhere", problem=problem_of(make_error("peer.slow")))
        if role == "destination":
            machine = await launch_incoming(command(QEMU, path), str(path), tmp_path / "log", 30)
            store.journal(left, qmp=str(path), launched=machine)
            await recovered(store, path)
            assert start_time_ticks(machine.pid) is None
        else:
            store.journal(left, qmp=str(path))
            async with running(command(QEMU, path), path) as source:
                await source.stop()
                await source.aclose()
                await recovered(store, path)
                assert await run_state(path) == "running"
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ("aborted", "source")
        assert after.ended_at
        assert after.problem
        assert after.problem.code == "peer.slow"  # why it was aborted, not that it was recovered


async def test_a_half_that_was_given_up_is_ended(tmp_path: Path) -> None:
    """An operator's word was journalled, and the agent died before it was done."""
    path = tmp_path / "q"
    machine = await launch_incoming(command(QEMU, path), str(path), tmp_path / "log", 30)
    with Store(tmp_path / "db") as store:
        left = migration(1, role="destination", state="completed", runs_at="nowhere")
        store.journal(left, qmp=str(path), launched=machine)
        jobs, _ = await recovered(store, path)
        assert start_time_ticks(machine.pid) is None
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ("completed", "nowhere")
        assert after.ended_at
        assert jobs.active_for("web01") is None


async def test_a_half_that_was_given_up_is_not_another_vm(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="completed", runs_at="nowhere"), qmp=str(path))
        async with running(command(QEMU, path), path) as started_anew:
            await started_anew.aclose()
            await recovered(store, path)
            assert await run_state(path) == "running"
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ("completed", "nowhere")
        assert "was left alone" in after.detail


async def test_a_source_whose_switch_failed_has_the_vm_whole_and_runs_it_again(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        parted = migration(1, state="postcopy-paused", runs_at="destination")
        async with failed_switch(QEMU, tmp_path) as (source, before):
            await source.aclose()
            store.journal(parted, qmp=str(tmp_path / "s"), qemu_before=before)
            jobs, recovery = await recovered(store, tmp_path / "s")
            (entry,) = jobs.left_over()
            assert entry.migration.state == "postcopy-paused"
            assert await recovery.is_whole(entry)
            jobs.decide(entry.migration.model_copy(update={"state": "aborted", "runs_at": "nowhere"}))
            settled = await recovery.settle(parted.id)
            assert await run_state(tmp_path / "s") == "running"
            assert not await recovery.is_whole(entry)
    assert settled is not None
    assert (settled.state, settled.runs_at) == ("aborted", "source")


@pytest.mark.parametrize("is_said", [True, False])
async def test_a_source_whose_switch_failed_is_ended_by_a_word_alone(tmp_path: Path, is_said: bool) -> None:
    with Store(tmp_path / "db") as store:
        word = resolution_of("drop-here", "operator", None, "nothing was heard") if is_said else None
        given_up = migration(1, state="completed", runs_at="nowhere", resolution=word)
        async with failed_switch(QEMU, tmp_path) as (source, _):
            await source.aclose()
            store.journal(given_up, qmp=str(tmp_path / "s"))
            await recovered(store, tmp_path / "s")
            if is_said:
                with pytest.raises(SealaneError, match=r"vm\.unreachable"):
                    await run_state(tmp_path / "s")
            else:
                assert await run_state(tmp_path / "s") in {"paused", "finish-migrate"}
        assert store.migrations()[0].ended_at


REFUSED = {"runs_at": "nowhere", "epoch": 3, "problem": problem_of(make_error("handover.refused", "it never ran"))}
OTHERWISE = problem_of(make_error("handover.operator", "somebody said so"))
PROMISED = resolution_of("own-here", "operator", Promise(migration="1" * 32, vm="web01", epoch=3), "it never ran")
LOOKED = resolution_of("own-here", "operator", None, "somebody has looked")


@pytest.mark.parametrize("how", ["refused", "promised"])
async def test_a_vm_that_its_qemu_takes_to_be_in_two_halves_runs_again_where_the_destination_refused_it(
    tmp_path: Path, how: str
) -> None:
    said = REFUSED if how == "refused" else REFUSED | {"problem": OTHERWISE, "resolution": PROMISED}
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="aborted", **said), qmp=str(tmp_path / "s"))
        async with unshared_switch(QEMU, tmp_path) as source:
            await source.aclose()
            jobs, recovery = await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == "running"
            assert recovery.is_done
        after = store.migrations()[0]
        assert (after.state, after.runs_at) == ("aborted", "source")
        assert after.ended_at
        assert jobs.active_for("web01") is None


@pytest.mark.parametrize(
    "journalled",
    [
        {**REFUSED, "state": "postcopy-paused"},
        {**REFUSED, "state": "switching-over"},
        {**REFUSED, "state": "aborted", "epoch": None},
        {**REFUSED, "state": "aborted", "problem": None},
        {**REFUSED, "state": "aborted", "problem": OTHERWISE},
        {**REFUSED, "state": "aborted", "problem": OTHERWISE, "resolution": LOOKED},
    ],
    ids=["parted", "not given up", "no epoch", "no word", "another word", "somebody looked"],
)
async def test_a_vm_that_its_qemu_takes_to_be_in_two_halves_stays_paused_without_the_destinations_word(
    tmp_path: Path, journalled: dict[str, Any]
) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, **journalled), qmp=str(tmp_path / "s"))
        async with unshared_switch(QEMU, tmp_path) as source:
            await source.aclose()
            jobs, recovery = await recovered(store, tmp_path / "s")
            assert await run_state(tmp_path / "s") == "finish-migrate"
            (entry,) = jobs.left_over()
            assert not await recovery.is_whole(entry)
            assert await recovery.is_whole(entry, is_promised=True)
        assert store.migrations()[0].ended_at is None
        assert jobs.active_for("web01")


class HalfQemu:
    """A destination's QEMU in postcopy, whose VM was not let run yet."""

    def __init__(self, status: str) -> None:
        self.status, self.state, self.is_lent = status, "paused", True

    async def end_loan(self) -> None:
        self.is_lent = False

    async def migration_status(self) -> SimpleNamespace:
        if not self.status:  # it waits for a page itself
            await asyncio.Event().wait()
        return SimpleNamespace(status=self.status)

    async def run_state(self) -> str:
        return self.state

    async def resume(self) -> None:
        self.state = "running"


@pytest.mark.parametrize("state", ["postcopy", "postcopy-paused"])
@pytest.mark.parametrize(
    ("status", "ends", "runs", "words"),
    [
        ("postcopy-active", "postcopy-paused", True, "held without the agent"),
        ("postcopy-paused", "postcopy-paused", False, "still at the source"),
        ("", "postcopy-paused", False, "still at the source"),
        ("completed", "completed", True, "all of its memory is here"),
    ],
)
async def test_a_half_runs_on_where_no_page_can_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, status: str, ends: str, runs: bool, words: str
) -> None:
    qemu = HalfQemu(status)
    monkeypatch.setattr(Recovery, "_machine", lambda _recovery, _entry: contextlib.nullcontext(qemu))
    monkeypatch.setattr("sealane.host.recovery.ANSWERS_WITHIN_S", 0.05)
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, role="destination", state=state, runs_at="destination"))
        await recovered(store, tmp_path / "q")
        after = store.migrations()[0]
    assert (after.state, after.runs_at, qemu.state == "running") == (ends, "destination", runs)
    assert qemu.is_lent == (ends != "completed")  # greeted again by then
    assert words in after.detail


async def test_what_waited_in_the_queue_is_told_to_be_lost(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="queued"))
        jobs, _ = await recovered(store, tmp_path / "q")
        after = store.migrations()[0]
        assert (after.state, after.runs_at, after.problem and after.problem.code) == ("aborted", "source", "queue.lost")
        assert jobs.active_for("web01") is None


async def test_one_that_hangs_or_fails_oddly_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = asyncio.Event()

    async def act(_recovery: Recovery, entry: JournalEntry) -> Migration:
        if entry.migration.number == 1:
            await goes_on.wait()
        if entry.migration.number == 2:
            raise RuntimeError("a bug")
        return entry.migration.model_copy(update={"state": "aborted", "ended_at": NOW})

    monkeypatch.setitem(recovery_module._ACTIONS, ("source", "copying"), act)
    with Store(tmp_path / "db") as store:
        for number in (1, 2, 3):
            store.journal(migration(number, vm=f"vm{number}", state="copying"))
        jobs = Jobs(store)
        recovery = Recovery(store, jobs, lambda _vm: None)
        recovering = asyncio.create_task(recovery.recover())
        async with asyncio.timeout(10):
            while jobs.active_for("vm3"):
                await asyncio.sleep(0)
        assert not recovering.done()
        goes_on.set()
        assert [settled.number for settled in await recovering] == [1, 3]
        assert not recovery.is_done
        assert jobs.active_for("vm2")


async def test_what_recovery_saw_does_not_go_before_the_job_that_took_it_up_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source of a parted postcopy comes back whenever it likes."""
    taken: list[StandInJob] = []

    async def act(_recovery: Recovery, entry: JournalEntry) -> Migration:
        if not taken:
            taken.append(StandInJob(store, entry.migration))
            raise make_error("vm.unreachable", "it waits for a page")
        jobs.take_up(entry.migration.id, lambda _: taken[0])
        return entry.migration.model_copy(update={"detail": "as it was before"})

    monkeypatch.setitem(recovery_module._ACTIONS, ("destination", "postcopy-paused"), act)
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, role="destination", state="postcopy-paused", runs_at="destination"))
        jobs = Jobs(store)
        recovery = Recovery(store, jobs, lambda _vm: None)
        await recovery.recover()
        assert await recovery.recover() == []
        assert jobs.left_over() == []
        assert [job.id for job in jobs.live] == [taken[0].id]
        taken[0].steps.put_nowait(lambda: taken[0].end(state="completed", detail="all came"))
        taken[0].steps.put_nowait(None)
        await taken[0].ended.wait()
        while jobs.live:
            await asyncio.sleep(0)
        assert jobs.active_for("web01") is None
        assert (store.migrations()[0].state, store.migrations()[0].detail) == ("completed", "all came")
