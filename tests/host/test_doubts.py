"""How a doubt ends: which answers and which words are followed, in which order, and how often is asked."""

import asyncio
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest

from sealane.errors import SealaneError, make_error
from sealane.host.doubts import Doubts, check_word
from sealane.host.jobs import Jobs
from sealane.host.migration.messages import Answer, Promise, Ran, Unsettled
from sealane.host.models import Migration, ResolveRequest
from sealane.host.recovery import Recovery
from sealane.host.store import JournalEntry, Store
from tests.host.factories import NOW, migration

ABOUT: dict[str, Any] = {"migration": f"{1:032x}", "vm": "web01", "epoch": 4}
RAN, PROMISE = Ran(**ABOUT), Promise(**ABOUT)
UNDER_WAY, GONE, UNKNOWN = (Unsettled(**ABOUT, reason=cast(Any, reason)) for reason in ("under-way", "gone", "unknown"))
AGAINST, TWO, LAST = "resolve.against-the-answer", "resolve.could-make-two", "resolve.could-lose-it"


class Played:
    """A recovery that notes what the journal said when it was told to do it, and the clock and the answers."""

    def __init__(self, store: Store) -> None:
        self.store, self.jobs = store, Jobs(store)
        self.answers: list[Answer | Exception] = []
        self.asked_at: list[float] = []
        self.seen: list[Migration] = []
        self.locks: dict[str, asyncio.Lock] = {}
        self.now = 100.0
        for entry in store.unfinished():
            self.jobs.adopt(entry)
        self.doubts = Doubts(self.jobs, cast(Recovery, self), self.ask, first_pause_s=2.0, monotonic=lambda: self.now)

    def lock(self, migration_id: str) -> asyncio.Lock:
        return self.locks.setdefault(migration_id, asyncio.Lock())

    async def settle(self, migration_id: str) -> None:
        self.seen.append(self.store.find(migration_id)[0].migration)

    async def ask(self, entry: JournalEntry) -> tuple[Answer, str | None]:
        self.asked_at.append(self.now)
        said = self.answers.pop(0) if self.answers else make_error("peer.unreachable")
        if isinstance(said, Exception):
            raise said
        return said, "d" * 64 if isinstance(said, Ran) else None

    @property
    def migration(self) -> Migration:
        return self.jobs.find("1")


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="in-doubt", runs_at="in-doubt", epoch=4, ended_at=NOW))
        yield Played(store)


def word(decision: str, *, looked: bool = False) -> ResolveRequest:
    return ResolveRequest.model_validate({"decision": decision, "i_have_looked": looked})


@pytest.mark.parametrize(
    ("said", "refusals"),  # of --own-here, of it with --i-have-looked, and the same of --drop-here
    [
        (RAN, [AGAINST, AGAINST, None, None]),
        (PROMISE, [None, None, AGAINST, AGAINST]),
        (GONE, [None, None, AGAINST, AGAINST]),
        (UNDER_WAY, [TWO, None, LAST, None]),
        (UNKNOWN, [TWO, None, LAST, None]),
        (None, [TWO, None, LAST, None]),
    ],
    ids=["ran", "promise", "gone", "under way", "unknown", "nothing"],
)
def test_which_words_are_refused(said: Answer | None, refusals: list[str | None]) -> None:
    for (decision, looked), expected in zip(product(("own-here", "drop-here"), (False, True)), refusals, strict=True):
        if expected is None:
            check_word(word(decision, looked=looked), said, "why")
        else:
            with pytest.raises(SealaneError) as raised:
                check_word(word(decision, looked=looked), said, "why")
            assert raised.value.code == expected


@pytest.mark.parametrize(
    ("said", "state", "runs_at"), [(RAN, "completed", "destination"), (PROMISE, "aborted", "nowhere")]
)
async def test_an_answer_is_journalled_and_then_followed(
    played: Played, said: Answer, state: str, runs_at: str
) -> None:
    played.answers = [said]
    await played.doubts.ask_due()
    (seen,) = played.seen  # what the journal said when it was done
    assert (seen.state, seen.runs_at, seen.ended_at) == (state, runs_at, None)
    assert seen.resolution is not None
    assert (seen.resolution.by, seen.resolution.answer) == ("destination", said.kind)
    assert seen.peer_receipt == ("d" * 64 if said is RAN else None)
    assert [entry.migration.state for entry in played.store.unfinished()] == [
        state
    ]  # the next agent does it, if this one dies


@pytest.mark.parametrize("said", [UNDER_WAY, GONE, UNKNOWN, make_error("peer.unreachable")])
async def test_what_settles_nothing_is_told_and_asked_again_ever_more_rarely(
    played: Played, said: Answer | SealaneError
) -> None:
    for _ in range(400):
        played.answers = [said]
        await played.doubts.ask_due()
        played.now += 1.0
    begun = played.asked_at[0]
    assert [at - begun for at in played.asked_at] == [0, 2, 6, 14, 30, 62, 126, 254]
    assert played.migration.state == "in-doubt"
    assert "asked 8 times" in played.migration.detail
    assert played.seen == []


async def test_what_fails_unforeseen_is_asked_again_as_rarely(played: Played) -> None:
    played.answers = [ValueError("a defect"), ValueError("a defect"), UNDER_WAY]
    for _ in range(2):
        with pytest.raises(ValueError, match="a defect"):
            await played.doubts.ask_due()
        await played.doubts.ask_due()
        played.now += 4.0
    await played.doubts.ask_due()
    assert played.asked_at == [100.0, 104.0, 108.0]


async def test_an_answer_that_cannot_be_journalled_is_not_followed(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise make_error("host.disk-full")

    played.answers = [PROMISE]
    monkeypatch.setattr(played.store, "journal", full)
    await played.doubts.ask_due()
    assert played.seen == []
    assert "host.disk-full" in played.migration.detail


@pytest.mark.parametrize(
    ("decision", "said", "state"),
    [("own-here", UNKNOWN, "aborted"), ("own-here", GONE, "aborted"), ("drop-here", None, "completed")],
)
async def test_an_operators_word_is_kept_with_who_said_it(
    played: Played, decision: str, said: Answer | None, state: str
) -> None:
    played.answers = [said or make_error("peer.unreachable")]
    after = await played.doubts.resolve("1", word(decision, looked=True), "root")
    assert after.state == state
    assert after.resolution is not None
    assert (after.resolution.by, after.resolution.user, after.resolution.decision) == ("operator", "root", decision)
    assert played.seen


async def test_the_destinations_answer_goes_before_the_operators_word(played: Played) -> None:
    played.answers = [PROMISE]
    after = await played.doubts.resolve("1", word("own-here", looked=True), "root")
    assert after.resolution is not None
    assert after.resolution.by == "destination"


async def test_a_refused_word_changes_nothing(played: Played) -> None:
    played.answers = [RAN]
    with pytest.raises(SealaneError, match=AGAINST):
        await played.doubts.resolve("1", word("own-here", looked=True), "root")
    assert (played.migration.state, played.seen) == ("in-doubt", [])


async def test_asking_that_settles_nothing_says_so(played: Played) -> None:
    played.answers = [GONE]
    with pytest.raises(SealaneError, match=r"handover\.in-doubt"):
        await played.doubts.resolve("1", word("ask"), None)


async def test_a_word_is_for_one_doubt(played: Played) -> None:
    """One that waits while the doubt ends by itself has no effect on what comes after."""
    ask, asked, may_answer = played.ask, asyncio.Event(), asyncio.Event()

    async def slowly(entry: JournalEntry) -> tuple[Answer, str | None]:
        asked.set()
        await may_answer.wait()
        return await ask(entry)

    played.answers, played.doubts._ask = [RAN, UNKNOWN], slowly
    by_itself = asyncio.create_task(played.doubts.ask_due())
    await asked.wait()
    told = asyncio.create_task(played.doubts.resolve("1", word("own-here", looked=True), "root"))
    await asyncio.sleep(0)
    may_answer.set()
    with pytest.raises(SealaneError, match=r"resolve\.not-in-doubt"):
        await told
    assert len(played.asked_at) == 1
    await by_itself
    assert played.migration.state == "completed"


async def test_a_doubt_that_ends_while_the_destination_is_asked(played: Played) -> None:
    """Recovery saw the VM run here again: what comes of the question is too late."""
    ask = played.ask

    async def meanwhile(entry: JournalEntry) -> tuple[Answer, str | None]:
        played.jobs.settle(entry.migration.model_copy(update={"state": "aborted", "runs_at": "source"}))
        return await ask(entry)

    played.answers = [RAN]
    played.doubts._ask = meanwhile
    with pytest.raises(SealaneError, match=r"resolve\.not-in-doubt"):
        await played.doubts.resolve("1", word("ask"), None)
    assert played.migration.state == "aborted"
    assert played.seen == []
