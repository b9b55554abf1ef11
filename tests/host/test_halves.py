"""Halves that stay parted: when they are joined again, and which words end the half that is here."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sealane.errors import SealaneError, make_error
from sealane.host.halves import Halves, check_drop, check_own
from sealane.host.jobs import Jobs
from sealane.host.migration.messages import Answer, Promise, Ran, Unsettled
from sealane.host.migration.postcopy_source import NOT_JOINED
from sealane.host.models import Migration, ResolveRequest
from sealane.host.recovery import Recovery
from sealane.host.store import JournalEntry, Store
from tests.host.factories import migration
from tests.host.stand_ins import StandInJob

ABOUT: dict[str, Any] = {"migration": f"{1:032x}", "vm": "web01", "epoch": 4}
RAN, PROMISE = Ran(**ABOUT), Promise(**ABOUT)
UNDER_WAY, GONE, UNKNOWN = (Unsettled(**ABOUT, reason=cast(Any, reason)) for reason in ("under-way", "gone", "unknown"))
AGAINST, LOSE, TWO = "resolve.against-the-answer", "resolve.could-lose-it", "resolve.could-make-two"


class Played:
    """A recovery that notes what the journal said when it was told to do it, the destination's answers, and jobs that join."""

    def __init__(self, store: Store) -> None:
        self.store, self.jobs = store, Jobs(store)
        self.answer: Answer | None = None
        self.asked = 0
        self.whole = False
        self.seen: list[Migration] = []
        self.begun: list[StandInJob] = []
        self.at_look: Callable[[], object] = lambda: None
        self._lock = asyncio.Lock()
        for entry in store.unfinished():
            self.jobs.adopt(entry)
            self.jobs.looked_at(entry.migration.id)
        self.halves = Halves(self.jobs, cast(Recovery, self), self.ask, self.rejoin, told_within_s=20)

    def lock(self, _migration_id: str) -> asyncio.Lock:
        return self._lock

    async def settle(self, migration_id: str) -> None:
        self.seen.append(self.store.find(migration_id)[0].migration)

    async def is_whole(self, entry: JournalEntry, *, is_promised: bool = False) -> bool:
        self.was_promised = is_promised
        assert self.jobs.job(entry.migration.id) is None  # whose connection to QEMU is the only one
        return self.whole

    async def look_again(self, _migration_id: str) -> None:
        self.at_look()

    async def ask(self, _entry: JournalEntry) -> tuple[Answer, str | None]:
        self.asked += 1
        if self.answer is None:
            raise make_error("peer.unreachable")
        return self.answer, "d" * 64 if isinstance(self.answer, Ran) else None

    def rejoin(self, left: Migration) -> StandInJob:
        job = self.jobs.take_up(left.id, lambda held: StandInJob(self.store, held))
        assert isinstance(job, StandInJob)
        self.begun.append(job)
        return job

    async def resolve(self, decision: str, *, looked: bool = False) -> Migration:
        return await self.halves.resolve(self.migration, word(decision, looked=looked), "root")

    @property
    def migration(self) -> Migration:
        return self.jobs.find("1")

    def assert_untouched(self) -> None:
        assert (self.migration.state, self.migration.resolution, self.seen) == ("postcopy-paused", None, [])


def word(decision: str, *, looked: bool = False) -> ResolveRequest:
    return ResolveRequest.model_validate({"decision": decision, "i_have_looked": looked})


def parted(directory: Path, role: str) -> Iterator[Played]:
    with Store(directory / "db") as store:
        store.journal(migration(1, role=role, state="postcopy-paused", runs_at="destination", epoch=4))
        yield Played(store)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Played]:
    yield from parted(tmp_path, "source")


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[Played]:
    yield from parted(tmp_path, "destination")


async def end(job: StandInJob) -> None:
    job.steps.put_nowait(make_error("migration.postcopy-paused", "tried in vain"))
    assert job.task is not None
    await asyncio.wait({job.task})


# ---- joining


async def test_asked_for_they_are_joined_by_a_new_job(source: Played) -> None:
    asking = asyncio.create_task(source.resolve("ask"))
    while not source.begun:
        await asyncio.sleep(0)
    (job,) = source.begun
    job.steps.put_nowait(lambda: job.update(detail="meeting host-b"))
    job.steps.put_nowait(lambda: job.update(state="postcopy"))
    assert (await asking).state == "postcopy"
    assert source.asked == 0  # the job asks what it must
    await end(job)


async def test_a_try_that_fails_is_told_and_goes_on(source: Played) -> None:
    asking = asyncio.create_task(source.resolve("ask"))
    while not source.begun:
        await asyncio.sleep(0)
    (job,) = source.begun
    job.steps.put_nowait(lambda: job.update(detail=f"{NOT_JOINED}: no route"))
    with pytest.raises(SealaneError, match=r"no route; it goes on trying \[resolve\.parted\]"):
        await asking
    assert not job.ended.is_set()
    await end(job)


async def test_where_a_job_is_at_it_no_other_begins_and_it_tries_now(source: Played) -> None:
    job = source.rejoin(source.migration)
    job.update(detail=f"{NOT_JOINED}: an old story")
    asking = asyncio.create_task(source.resolve("ask"))
    async with asyncio.timeout(20):
        await job.hurry.wait()
    job.steps.put_nowait(lambda: job.update(detail=f"{NOT_JOINED}: no route"))
    with pytest.raises(SealaneError, match=r"a job was at it, and was told to try now: .*no route; it goes on trying"):
        await asking
    assert source.begun == [job]
    await end(job)


async def test_a_job_that_ends_says_so(source: Played) -> None:
    asking = asyncio.create_task(source.resolve("ask"))
    while not source.begun:
        await asyncio.sleep(0)
    await end(source.begun[0])
    with pytest.raises(SealaneError, match=r"gave up: tried in vain"):
        await asking


async def test_what_is_over_when_it_is_looked_at_again_is_not_joined(source: Played) -> None:
    source.at_look = lambda: source.jobs.decide(source.migration.model_copy(update={"state": "aborted"}))
    assert (await source.resolve("ask")).state == "aborted"
    assert source.begun == []


async def test_it_is_the_source_that_joins(destination: Played) -> None:
    with pytest.raises(SealaneError, match=r"host-b.*resolve\.parted"):
        await destination.resolve("ask")
    destination.assert_untouched()


# ---- giving up


@pytest.mark.parametrize(
    ("said", "refusals"),  # without --i-have-looked, and with it
    [
        (RAN, [None, None]),
        (GONE, [None, None]),
        (PROMISE, [AGAINST, AGAINST]),
        (UNDER_WAY, [AGAINST, AGAINST]),
        (UNKNOWN, [LOSE, None]),
        (None, [LOSE, None]),
    ],
    ids=["ran", "gone", "promise", "under way", "unknown", "nothing"],
)
def test_which_words_are_refused(said: Answer | None, refusals: list[str | None]) -> None:
    for looked, expected in zip((False, True), refusals, strict=True):
        if expected is None:
            check_drop(word("drop-here", looked=looked), said, "why")
        else:
            with pytest.raises(SealaneError) as raised:
                check_drop(word("drop-here", looked=looked), said, "why")
            assert raised.value.code == expected


@pytest.mark.parametrize(
    ("said", "refusals"),  # without --i-have-looked, and with it
    [
        (RAN, [AGAINST, AGAINST]),
        (GONE, [None, None]),
        (PROMISE, [None, None]),
        (UNDER_WAY, [AGAINST, AGAINST]),
        (UNKNOWN, [TWO, None]),
        (None, [TWO, None]),
    ],
    ids=["ran", "gone", "promise", "under way", "unknown", "nothing"],
)
def test_which_words_that_the_vm_is_here_are_refused(said: Answer | None, refusals: list[str | None]) -> None:
    for looked, expected in zip((False, True), refusals, strict=True):
        if expected is None:
            check_own(word("own-here", looked=looked), said, "why")
        else:
            with pytest.raises(SealaneError) as raised:
                check_own(word("own-here", looked=looked), said, "why")
            assert raised.value.code == expected


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_half_a_memory_cannot_run(request: pytest.FixtureRequest, role: str) -> None:
    played: Played = request.getfixturevalue(role)
    with pytest.raises(SealaneError, match=r"resolve\.half"):
        await played.resolve("own-here", looked=True)
    played.assert_untouched()
    assert played.begun == []


async def test_a_job_that_let_go_for_a_word_that_is_refused_is_followed_by_another(source: Played) -> None:
    first = source.rejoin(source.migration)
    with pytest.raises(SealaneError, match=r"resolve\.half"):
        await source.resolve("own-here", looked=True)
    source.assert_untouched()
    assert first.ended.is_set()
    (_, again) = source.begun
    assert source.jobs.job(source.migration.id) is again
    await end(again)


@pytest.mark.parametrize("said", [None, UNKNOWN, GONE, PROMISE])
async def test_a_source_that_has_the_vm_whole_runs_it_again_and_the_journal_knows_first(
    source: Played, said: Answer | None
) -> None:
    source.answer, source.whole = said, True
    await source.resolve("own-here", looked=said in (None, UNKNOWN))
    (seen,) = source.seen
    assert (seen.state, seen.runs_at, seen.ended_at) == ("aborted", "nowhere", None)  # it does not run yet
    assert seen.problem is not None
    assert seen.problem.code == "handover.operator"
    assert seen.resolution is not None
    assert (seen.resolution.decision, seen.resolution.by, seen.resolution.user) == ("own-here", "operator", "root")
    assert "as it was at the switch" in seen.resolution.words


@pytest.mark.parametrize("said", [None, UNKNOWN, GONE, PROMISE])
async def test_only_a_promise_makes_a_vm_whole_whose_qemu_believes_in_postcopy(
    source: Played, said: Answer | None
) -> None:
    source.answer = said
    with pytest.raises(SealaneError, match=r"resolve\.half"):
        await source.resolve("own-here", looked=True)
    assert source.was_promised is (said is PROMISE)


@pytest.mark.parametrize(("said", "code"), [(None, TWO), (UNKNOWN, TWO), (UNDER_WAY, AGAINST), (RAN, AGAINST)])
async def test_a_vm_that_may_run_there_does_not_run_here(source: Played, said: Answer | None, code: str) -> None:
    source.answer, source.whole = said, True
    job = source.rejoin(source.migration)
    with pytest.raises(SealaneError, match=code):
        await source.resolve("own-here")
    source.assert_untouched()
    assert not job.ended.is_set()
    await end(job)


async def test_a_vm_that_is_whole_is_not_ended_for_a_half_that_was_lost(source: Played) -> None:
    source.answer, source.whole = GONE, True
    with pytest.raises(SealaneError, match=rf"the VM is whole here.*{LOSE}"):
        await source.resolve("drop-here")
    source.assert_untouched()
    await source.resolve("drop-here", looked=True)
    assert [seen.state for seen in source.seen] == ["completed"]


@pytest.mark.parametrize("said", [None, UNKNOWN, GONE])
async def test_a_source_gives_its_half_up_and_the_journal_knows_first(source: Played, said: Answer | None) -> None:
    source.answer = said
    await source.resolve("drop-here", looked=said is not GONE)
    (seen,) = source.seen  # what the journal said when it was done
    assert (seen.state, seen.runs_at, seen.ended_at) == ("completed", "nowhere", None)
    assert seen.problem is not None
    assert seen.problem.code == "handover.half-lost"
    assert seen.resolution is not None
    assert (seen.resolution.decision, seen.resolution.by, seen.resolution.user) == ("drop-here", "operator", "root")
    assert ("has looked" in seen.resolution.words) is (said is not GONE)
    assert [entry.migration.state for entry in source.store.unfinished()] == [
        "completed"
    ]  # the next agent's, if this one dies


async def test_a_destination_that_has_all_of_it_makes_the_half_needless(source: Played) -> None:
    source.answer = RAN
    await source.resolve("drop-here")
    (seen,) = source.seen
    assert (seen.state, seen.runs_at, seen.problem, seen.peer_receipt) == ("completed", "destination", None, "d" * 64)
    assert seen.resolution is not None
    assert (seen.resolution.by, seen.resolution.answer) == ("destination", "ran")


@pytest.mark.parametrize(
    ("said", "looked", "code"), [(UNDER_WAY, True, AGAINST), (PROMISE, True, AGAINST), (None, False, LOSE)]
)
async def test_a_refused_word_changes_nothing_and_the_job_goes_on(
    source: Played, said: Answer | None, looked: bool, code: str
) -> None:
    job, source.answer = source.rejoin(source.migration), said
    with pytest.raises(SealaneError, match=code):
        await source.resolve("drop-here", looked=looked)
    source.assert_untouched()
    assert not job.ended.is_set()
    await end(job)


async def test_a_destination_is_believed_only_with_the_operators_look(destination: Played) -> None:
    with pytest.raises(SealaneError, match=LOSE):
        await destination.resolve("drop-here")
    destination.assert_untouched()
    await destination.resolve("drop-here", looked=True)
    (seen,) = destination.seen
    assert (seen.state, seen.runs_at) == ("completed", "nowhere")
    assert destination.asked == 0


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_a_job_lets_go_before_its_half_is_ended(request: pytest.FixtureRequest, role: str) -> None:
    played: Played = request.getfixturevalue(role)
    job = played.rejoin(played.migration)
    await played.resolve("drop-here", looked=True)
    assert job.ended.is_set()
    assert [seen.state for seen in played.seen] == ["completed"]


async def test_halves_that_are_joined_meanwhile_are_not_ended(source: Played) -> None:
    job = source.rejoin(source.migration)
    left = source.migration
    job.update(state="postcopy")
    with pytest.raises(SealaneError, match=r"resolve\.not-in-doubt"):
        await source.halves.resolve(left, word("drop-here", looked=True), "root")
    assert (source.seen, job.ended.is_set()) == ([], False)
    await end(job)


async def test_a_half_that_is_whole_after_all_is_not_ended(destination: Played) -> None:
    whole = {"state": "completed", "runs_at": "destination", "detail": "all of its memory is here"}
    destination.at_look = lambda: destination.jobs.decide(destination.migration.model_copy(update=whole))
    with pytest.raises(SealaneError, match=r"resolve\.not-in-doubt"):
        await destination.resolve("drop-here", looked=True)
    assert (destination.migration.runs_at, destination.seen) == ("destination", [])


async def test_what_cannot_be_journalled_is_not_done(source: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise make_error("host.disk-full")

    monkeypatch.setattr(source.store, "journal", full)
    with pytest.raises(SealaneError, match=r"host\.disk-full"):
        await source.resolve("drop-here", looked=True)
    source.assert_untouched()
