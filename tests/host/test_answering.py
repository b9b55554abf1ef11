"""What a destination answers a source in doubt: the journal's word, to the peer that sent the VM, and the promise first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import SealaneError, make_error
from sealane.host.answering import Asker, answer
from sealane.host.jobs import Jobs
from sealane.host.migration.messages import Answer, Ask, Promise, Ran, Unsettled
from sealane.host.models import Migration
from sealane.host.store import Store
from tests.host.factories import NOW, migration

PEER, OTHER = "SHA256:" + "a" * 64, "SHA256:" + "b" * 64
ENDED = {"role": "destination", "peer": "host-a", "peer_fingerprint": PEER, "ended_at": NOW}
ASK = Ask(migration=f"{1:032x}", vm="web01", epoch=4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "db") as opened:
        yield opened


@pytest.fixture
def answered(store: Store) -> Callable[..., Answer]:
    def ask(question: Ask = ASK, asker: Asker | None = None, **facts: Any) -> Answer:
        store.journal(migration(1, **{**ENDED, **facts}))
        return answer(Jobs(store), store, question, asker or Asker(PEER))[0]

    return ask


def journalled(store: Store) -> Migration:
    return store.migrations()[0]


def test_one_that_ran_here(answered: Callable[..., Answer]) -> None:
    assert isinstance(answered(state="completed", runs_at="destination", epoch=4), Ran)


def test_one_that_never_ran_is_promised_in_the_journal_first(store: Store, answered: Callable[..., Answer]) -> None:
    assert isinstance(answered(state="aborted"), Promise)
    promised = journalled(store).resolution
    assert promised is not None
    assert promised.decision == "promised"
    assert "epoch 4" in promised.words


def test_no_promise_without_the_journal(
    store: Store, answered: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.journal(migration(1, **{**ENDED, "state": "aborted"}))

    def full(*_: object, **__: object) -> None:
        raise make_error("host.disk-full")

    monkeypatch.setattr(store, "journal", full)
    with pytest.raises(SealaneError, match=r"host\.disk-full"):
        answer(Jobs(store), store, ASK, Asker(PEER))


def test_asked_twice_it_promises_once(store: Store, answered: Callable[..., Answer]) -> None:
    answered(state="aborted")
    first = journalled(store)
    assert isinstance(answer(Jobs(store), store, ASK, Asker(PEER))[0], Promise)
    assert journalled(store) == first


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"state": "completed", "runs_at": "nowhere", "epoch": 4}, "gone"),
        ({"state": "completed", "runs_at": "in-doubt", "epoch": 4}, "under-way"),
        ({"state": "completed", "runs_at": "destination", "epoch": 5}, "unknown"),
        ({"state": "completed", "runs_at": "destination", "epoch": 4, "role": "source"}, "unknown"),
        ({"state": "aborted", "vm": "web02"}, "unknown"),
        ({"state": "aborted", "peer_fingerprint": OTHER}, "unknown"),
        ({"state": "aborted", "peer_fingerprint": None}, "unknown"),
        ({"state": "aborted", "id": f"{2:032x}"}, "unknown"),
    ],
)
def test_what_settles_nothing(
    store: Store, answered: Callable[..., Answer], facts: dict[str, Any], reason: str
) -> None:
    said = answered(**facts)
    assert isinstance(said, Unsettled)
    assert said.reason == reason
    assert journalled(store).resolution is None


@pytest.mark.parametrize(
    "facts", [{"state": "switching-over", "ended_at": None}, {"state": "aborted", "ended_at": None}]
)
def test_what_is_under_way_or_not_yet_destroyed_promises_nothing(store: Store, facts: dict[str, Any]) -> None:
    store.journal(migration(1, **{**ENDED, **facts}))
    jobs = Jobs(store)
    for entry in store.unfinished():
        jobs.adopt(entry)
    said, _ = answer(jobs, store, ASK, Asker(PEER))
    assert isinstance(said, Unsettled)
    assert said.reason == "under-way"


def test_a_fleets_host_is_known_by_its_name(answered: Callable[..., Answer]) -> None:
    assert isinstance(answered(asker=Asker(OTHER, "host-a"), state="aborted"), Promise)
    assert isinstance(answered(asker=Asker(OTHER, "host-c"), state="aborted"), Unsettled)
