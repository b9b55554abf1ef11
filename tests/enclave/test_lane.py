"""One lane's threads: how each of their ends is told."""

import socket
import threading

import pytest

from sealane.enclave.lane import Broken, Event, Lane
from sealane.errors import InternalError, PeerError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a bug"), "internal.error"),
        (MemoryError(), "internal.error"),
        (PeerError("lane.integrity"), "lane.integrity"),
        (ConnectionResetError(104, "reset"), "lane.cut"),
    ],
)
def test_a_thread_that_ends_badly_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    def fail(_lane: Lane) -> None:
        raise error

    posted, seen = list[Event](), list[type[BaseException] | None]()
    monkeypatch.setattr(Lane, "_inbound", fail)
    monkeypatch.setattr(threading, "excepthook", lambda what: seen.append(what.exc_type))
    ours, theirs = socket.socketpair()
    with theirs:
        lane = Lane(ours, index=3, is_source=False, migration_secret=bytes(32), post=posted.append)
        lane.start()
        lane.join(20)
    (broken,) = posted
    assert isinstance(broken, Broken)
    assert (broken.lane, broken.error.code) == (3, code)
    assert "a bug" not in broken.error.detail
    assert seen == ([type(error)] if isinstance(broken.error, InternalError) else [])
