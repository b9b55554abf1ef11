"""Jobs: numbers, limits, events, ends."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from sealane.errors import SealaneError, make_error
from sealane.host.config import LimitSettings
from sealane.host.jobs import Jobs
from sealane.host.models import Event, Migration, Progress
from sealane.host.queue import Turn
from sealane.host.store import Store
from sealane.host.subscription import PROGRESS_WAITING_MAX
from tests.host.factories import NOW
from tests.host.factories import migration as a_migration
from tests.host.stand_ins import StandInJob


def begin(jobs: Jobs, store: Store, vm: str = "web01", role: str = "source") -> StandInJob:
    job = jobs.begin(lambda m: StandInJob(store, m, clock=lambda: NOW), vm=vm, role=role, peer="b", qmp="/q")  # type: ignore[arg-type]
    return cast(StandInJob, job)


async def finished(job: StandInJob) -> Migration:
    assert job.task
    await asyncio.wait_for(asyncio.wait([job.task]), 10)
    await asyncio.sleep(0)  # the table forgets it in a callback
    return job.migration


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "db")


async def test_one_at_once_for_a_vm_and_so_many_in_all(store: Store) -> None:
    jobs = Jobs(store, limits=LimitSettings(migrations_max=2))
    first = begin(jobs, store)
    assert (first.migration.number, store.unfinished()[0].qmp) == (1, "/q")
    for vm, code in (("web01", "vm.busy"), ("c", None), ("d", "peer.busy")):
        if code is None:
            begin(jobs, store, vm)
            continue
        with pytest.raises(SealaneError) as raised:
            begin(jobs, store, vm, role="destination")
        assert raised.value.code == code
    assert [m.number for m in jobs.list(active=True)] == [2, 1]
    first.steps.put_nowait(lambda: first.end(state="completed", runs_at="destination"))
    first.steps.put_nowait(None)
    assert (await finished(first)).state == "completed"
    assert begin(jobs, store).migration.number == 3
    await jobs.stop(0)
    assert jobs.active_count == 0


async def test_a_vm_whose_last_migration_clears_up_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(store)
    first = begin(jobs, store)
    await asyncio.wait_for(jobs.let_go("web01"), 5)  # it has not ended: `begin` says so
    with pytest.raises(SealaneError, match=r"vm\.busy"):
        begin(jobs, store)
    first.steps.put_nowait(lambda: first.end(state="aborted", runs_at="source"))
    await first.ended.wait()
    with pytest.raises(SealaneError, match=r"vm\.busy"):
        begin(jobs, store)
    waiting = asyncio.create_task(jobs.let_go("web01"))
    await asyncio.sleep(0)
    assert not waiting.done()
    first.steps.put_nowait(None)
    await asyncio.wait_for(waiting, 5)
    second = begin(jobs, store)
    assert second.migration.number == 2
    second.steps.put_nowait(lambda: second.end(state="aborted", runs_at="source"))
    await second.ended.wait()
    monkeypatch.setattr("sealane.host.jobs.CLEAR_UP_TIMEOUT_S", 0.0)
    await asyncio.wait_for(jobs.let_go("web01"), 5)  # it clears up for too long
    with pytest.raises(SealaneError, match=r"vm\.busy"):
        begin(jobs, store)
    await jobs.stop(0)


async def test_references(store: Store) -> None:
    jobs = Jobs(store)
    job = begin(jobs, store)
    for reference in (job.id, "1", job.id[:8]):
        assert jobs.find(reference).id == job.id
    for unknown in ("2", "zz", ""):
        with pytest.raises(SealaneError, match=r"migration\.unknown"):
            jobs.find(unknown)
    await jobs.stop(0)


async def test_events_from_the_present_to_the_end(store: Store) -> None:
    jobs = Jobs(store)
    job = begin(jobs, store)
    job.update(state="copying")
    seen: list[Event] = []

    async def watch() -> None:
        async for event in jobs.events("1"):
            seen.append(event)

    slow = job.subscribe()
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    for number in range(100):
        job.update(progress=Progress(bytes_transferred=number))
    job.update(state="switching-over")
    job.steps.put_nowait(make_error("lane.cut", "gone"))
    await finished(job)
    await watching
    late = [event.type async for event in jobs.events("1")]
    assert late == ["state", "end"]
    for events in (seen, [event async for event in slow]):
        assert (events[0].type, events[0].migration.state) == ("state", "copying")
        assert (events[-1].type, events[-1].migration.state) == ("end", "aborted")
        assert [e.migration.state for e in events if e.type == "state"] == ["copying", "switching-over"]
        progress = [e.migration.progress.bytes_transferred for e in events if e.type == "progress"]
        assert progress == list(range(100 - PROGRESS_WAITING_MAX, 100))
    assert job.migration.problem
    assert job.migration.problem.code == "lane.cut"


@pytest.mark.parametrize(
    ("role", "state", "ends", "runs_at"),
    [
        ("source", "preparing", "aborted", "source"),
        ("source", "copying", "aborted", "source"),
        ("source", "switching-over", "aborted", "source"),
        ("source", "handing-over", "in-doubt", "in-doubt"),
        ("source", "completed", "completed", "destination"),
        ("destination", "copying", "aborted", "source"),
        ("destination", "handing-over", "handing-over", "destination"),
    ],
)
@pytest.mark.parametrize("error", [make_error("lane.cut"), ValueError("a bug")])
async def test_failures_end_where_the_table_says(
    store: Store, role: str, state: str, ends: str, runs_at: str, error: Exception
) -> None:
    jobs = Jobs(store)
    job = begin(jobs, store, role=role)
    job.journal(state=state, runs_at=runs_at)
    job.steps.put_nowait(error)
    migration = await finished(job)
    is_left = ends == "handing-over"
    if isinstance(error, ValueError) and ends == "aborted" and (role, state) != ("source", "preparing"):
        is_left, runs_at = True, "nowhere" if role == "source" else "source"  # nobody knows what the job cleared up
    assert (migration.state, migration.runs_at) == (ends, runs_at)
    assert store.migrations()[0].state == ends
    if state != "completed":
        assert migration.problem
        assert migration.problem.code == ("internal.error" if isinstance(error, ValueError) else "lane.cut")
        assert "a bug" not in migration.problem.detail
    assert (migration.ended_at is None) == is_left
    if is_left or ends == "in-doubt":  # recovery, or a person, goes on from there
        assert jobs.active_for("web01") == migration
        with pytest.raises(SealaneError, match=r"vm\.busy"):
            begin(jobs, store)


async def test_what_a_job_leaves_is_held_until_recovery_has_settled_it(store: Store) -> None:
    jobs, issued = Jobs(store), list[Migration]()
    job = begin(jobs, store)

    def issue(migration: Migration) -> Migration:
        issued.append(migration)
        return migration

    job.issue = issue
    job.steps.put_nowait(lambda: job.leave(state="aborted", runs_at="nowhere", problem=None))
    job.steps.put_nowait(None)
    migration = await finished(job)
    assert (migration.state, migration.ended_at, issued) == ("aborted", None, [])
    assert jobs.active_for("web01") == migration
    assert [entry.migration for entry in jobs.left_over()] == [migration]
    assert [entry.migration.id for entry in store.unfinished()] == [migration.id]
    jobs.settle(migration.model_copy(update={"runs_at": "source", "ended_at": NOW}))
    assert jobs.active_for("web01") is None
    assert store.unfinished() == []


async def test_who_follows_what_a_previous_agent_left_hears_what_recovery_found(store: Store) -> None:
    jobs = Jobs(store)
    store.journal(a_migration(1, state="copying"))
    jobs.adopt(store.unfinished()[0])
    heard: list[Event] = []

    async def follow() -> None:
        async for event in jobs.events("1"):
            heard.append(event)

    following = asyncio.create_task(follow())
    while not heard:
        await asyncio.sleep(0)
    assert [event.type for event in heard] == ["state"]
    jobs.settle(a_migration(1, state="aborted", ended_at=NOW))
    jobs.looked_at(f"{1:032x}")
    await asyncio.wait_for(following, 5)
    assert [(event.type, event.migration.state) for event in heard] == [("state", "copying"), ("end", "aborted")]


async def test_cancelling(store: Store) -> None:
    jobs = Jobs(store)
    job = begin(jobs, store)
    await asyncio.sleep(0)
    assert jobs.cancel("1").state == "preparing"
    migration = await finished(job)
    assert (migration.state, migration.problem and migration.problem.code) == ("aborted", "migration.cancelled")
    with pytest.raises(SealaneError, match=r"migration\.over"):
        jobs.cancel("1")
    job = begin(jobs, store)
    job.journal(state="handing-over")
    with pytest.raises(SealaneError, match=r"migration\.too-late"):
        jobs.cancel("2")
    job.steps.put_nowait(lambda: job.end(state="completed", runs_at="destination"))
    job.steps.put_nowait(None)
    await finished(job)


async def test_a_cancel_before_the_first_step_still_ends(store: Store) -> None:
    jobs = Jobs(store)
    job = begin(jobs, store)
    job.cancel()
    assert (await finished(job)).state == "aborted"
    assert job.ended.is_set()
    assert jobs.active_for("web01") is None


async def test_stopping_waits_then_cancels(store: Store) -> None:
    jobs = Jobs(store)
    quick, endless = begin(jobs, store, "a"), begin(jobs, store, "b")
    quick.steps.put_nowait(lambda: quick.end(state="completed", runs_at="destination"))
    quick.steps.put_nowait(None)
    await jobs.stop(0.2)
    assert (quick.migration.state, endless.migration.state) == ("completed", "aborted")
    with pytest.raises(SealaneError, match=r"agent\.stopping"):
        begin(jobs, store, "c")


def ask(jobs: Jobs, store: Store, vm: str, **turn: object) -> StandInJob:
    turn_of = Turn(**turn)  # type: ignore[arg-type]
    job = jobs.begin(lambda m: StandInJob(store, m), vm=vm, role="source", peer="b", turn=turn_of)
    return cast(StandInJob, job)


async def test_a_queued_migration_says_its_place_and_begins_when_there_is_room(store: Store) -> None:
    jobs = Jobs(store, limits=LimitSettings(outgoing_max=1))
    first, second, third = (ask(jobs, store, vm) for vm in ("a", "b", "c"))
    assert (second.migration.state, third.migration.state) == ("queued", "queued")
    assert third.migration.queue is not None
    assert (third.migration.queue.place, third.migration.queue.waiting) == (2, 2)
    assert "limits.outgoing_max" in third.migration.detail
    assert store.unfinished()[1].migration.state == "queued"
    with pytest.raises(SealaneError, match=r"vm\.busy"):
        ask(jobs, store, "c")
    jobs.cancel("2")
    migration = await finished(second)
    assert (migration.state, migration.runs_at) == ("aborted", "source")
    assert third.migration.queue.place == 1
    first.steps.put_nowait(None)
    await finished(first)
    third.steps.put_nowait(None)
    assert (await finished(third)).queue is None
    assert jobs.queue.waiting_count == 0


async def test_what_was_changed_meanwhile_does_not_begin(store: Store) -> None:
    jobs = Jobs(store, limits=LimitSettings(outgoing_max=1))

    def refuse() -> None:
        raise make_error("queue.changed")

    first, second = ask(jobs, store, "a"), ask(jobs, store, "b", check_again=refuse)
    first.cancel()
    await finished(first)
    migration = await finished(second)
    assert (migration.state, migration.problem and migration.problem.code) == ("aborted", "queue.changed")


async def test_what_takes_too_long_is_aborted(store: Store) -> None:
    jobs = Jobs(store)
    migration = await finished(ask(jobs, store, "a", time_max_s=0.01))
    assert (migration.state, migration.problem and migration.problem.code) == ("aborted", "migration.time-limit")


async def test_stopping_ends_what_waits_at_once(store: Store) -> None:
    jobs = Jobs(store, limits=LimitSettings(outgoing_max=1))
    first, second = ask(jobs, store, "a"), ask(jobs, store, "b")
    stopping = asyncio.create_task(jobs.stop(60.0))
    migration = await finished(second)
    assert (migration.state, migration.problem and migration.problem.code) == ("aborted", "queue.lost")
    assert first.migration.state == "preparing"
    first.steps.put_nowait(None)
    await stopping


async def test_a_peer_cannot_fill_the_journal_with_refused_wishes(store: Store) -> None:
    now = [0.0]
    jobs = Jobs(store, limits=LimitSettings(refusals_per_peer_per_hour=3), monotonic=lambda: now[0])
    for number in range(10):
        for peer in ("b", "c"):
            jobs.refusals.refuse(
                make_error("vm.unknown"), vm="x", role="destination", peer=peer, id=f"{peer}{number:031x}"
            )
    assert len(store.migrations()) == 6
    now[0] = 1200.0
    jobs.refusals.refuse(make_error("vm.unknown"), vm="x", role="destination", peer="b", id=f"{99:032x}")
    assert len(store.migrations()) == 7
