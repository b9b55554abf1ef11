"""The monitor: never waits, errs towards the user, and ends when it is told to."""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from sealane.enclave.monitor import Classified, Monitor
from sealane.guest import PAGE_BYTES, PageClass
from tests.guest.rig import FakeMemory, Guest, hole_layout

PATIENCE_S = 20.0


class Rig:
    """A guest of which one page is the user's, and its monitor."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.answers: queue.Queue[Classified] = queue.Queue()
        self.top = guest.process()
        self.mapped = guest.page(guest.map(self.top, 0))
        self.monitor = Monitor(guest.memory, guest.layout, post=self.answers.put)

    def refresh(self, number: int = 1, *, is_last: bool = False) -> Classified:
        self.monitor.refresh([self.guest.cpu(self.top)], number=number, is_last=is_last)
        return self.answers.get(timeout=PATIENCE_S)

    def is_user(self, *pages: int, block: str = "pc.ram") -> list[bool]:
        answer: list[bool] = self.monitor.is_user(block, np.array(pages, np.uint64) * np.uint64(PAGE_BYTES)).tolist()
        return answer


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Guest(hole_layout()))
    with closing(made.monitor):
        yield made
    assert not any(thread.name == "monitor" for thread in threading.enumerate())


def test_what_is_not_known_is_the_users(rig: Rig) -> None:
    assert rig.is_user(rig.mapped, 5) == [True, True]
    assert rig.is_user(5, block="nothing") == [True]


def test_after_a_refresh_it_knows(rig: Rig) -> None:
    answer = rig.refresh(7)
    assert (answer.number, answer.error) == (7, None)
    assert answer.done is not None
    assert answer.done.counts["user"] == 1
    assert rig.is_user(rig.mapped, 5, rig.mapped) == [True, False, True]
    assert rig.is_user(1 << 30) == [True], "beyond the block: not known"
    assert rig.is_user(0, 1, block="0000:00:02.0/vga.vram") == [False, False]
    assert rig.is_user() == []
    assert rig.monitor.classes("pc.ram")[rig.mapped] == PageClass.USER


def test_from_the_switch_over_on_every_page_is_the_users(rig: Rig) -> None:
    rig.refresh()
    assert rig.refresh(2, is_last=True).number == 2
    assert rig.is_user(rig.mapped, 5) == [True, True]
    rig.refresh(3)
    assert rig.is_user(5) == [True]


def test_where_no_process_is_found_every_page_is_the_users(rig: Rig) -> None:
    rig.refresh()
    rig.guest.memory.pages[:] = 0
    answer = rig.refresh(2)
    assert answer.done is not None
    assert answer.done.tops == 0
    assert rig.is_user(5) == [True]


def test_a_failed_refresh_is_told_and_every_page_is_the_users(rig: Rig) -> None:
    rig.refresh()
    rig.guest.memory.is_gone = True
    answer = rig.refresh(2)
    assert answer.done is None
    assert answer.error is not None
    assert answer.error.code == "guest.memory"
    assert rig.is_user(5) == [True]


def test_a_fault_of_our_own_is_told_and_the_next_refresh_works(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sealane.guest.classifier.search.scan", lambda *_: 1 / 0)
        answer = rig.refresh()
    assert answer.error is not None
    assert answer.error.code == "internal.error"
    assert rig.is_user(5) == [True]
    assert rig.refresh(2).done is not None
    assert rig.is_user(5) == [False]


class HeldMemory(FakeMemory):
    """Lets the first read go on only when it is told to."""

    held: threading.Event
    reached: threading.Event

    def read_into(self, position: int, out: NDArray[np.uint8]) -> None:
        self.reached.set()
        assert self.held.wait(PATIENCE_S)
        super().read_into(position, out)


def test_nobody_waits_for_a_refresh_and_only_the_newest_request_waits() -> None:
    guest = Guest()
    guest.memory.__class__ = HeldMemory
    held = guest.memory
    assert isinstance(held, HeldMemory)
    held.held, held.reached = threading.Event(), threading.Event()
    rig = Rig(guest)
    with closing(rig.monitor):
        rig.monitor.refresh([guest.cpu(rig.top)], number=1)
        assert held.reached.wait(PATIENCE_S)
        assert rig.is_user(rig.mapped) == [True]  # answered while the first refresh is under way
        for number in (2, 3, 4):
            rig.monitor.refresh([guest.cpu(rig.top)], number=number)
        held.held.set()
        assert [rig.answers.get(timeout=PATIENCE_S).number for _ in range(2)] == [1, 4]
