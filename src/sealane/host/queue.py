"""Which migrations may begin now, and which wait: pure bookkeeping, no clock and no I/O.

A migration to a peer waits where a limit is reached; one that comes from a peer does not, since the peer waits for our
answer: it is refused. The higher priority goes first, then the older one. One that waits for a limit of its own (its peer's,
its group's) holds up nobody behind it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sealane.errors import make_error
from sealane.host.config import LimitSettings
from sealane.host.models import QueuePlace, Role


def place_words(place: QueuePlace) -> str:
    """Where a migration stands in the queue, and why, as a sentence."""
    return f"place {place.place} of {place.waiting} in the queue: this host is at {place.why}"


def _nothing_to_check() -> None:
    pass


@dataclass(frozen=True)
class Turn:
    """How a migration waits for its turn, and what holds once it has come.

    `check_again` is called when one that waited begins, and raises where it may not; `time_max_s` is how long it may take
    from then on, beside the configuration's own limit.
    """

    priority: int = 0
    group: str | None = None
    group_max: int = 0
    time_max_s: float = math.inf
    check_again: Callable[[], None] = _nothing_to_check


# Of what waits for nothing.
NOW: Final = Turn()


@dataclass(frozen=True)
class Wish:
    """A migration as the queue sees it; `group_max` of its group go at once (0: as many as there are)."""

    id: str
    number: int
    role: Role
    peer: str
    turn: Turn = Turn()


class Queue:
    """Those in progress and those that wait. `admit` is called with each that may begin."""

    def __init__(self, limits: LimitSettings, admit: Callable[[str], None]) -> None:
        self._limits, self._admit = limits, admit
        self._running: dict[str, Wish] = {}
        self._waiting: dict[str, Wish] = {}

    @property
    def waiting_count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, wish: Wish) -> bool:
        """Take a migration in: True where it may begin now, False where it waits.

        Raises `peer.busy` where it comes from a peer and a limit is reached, `queue.full` where no more may wait.
        """
        why = self._why_not(wish)
        if why is None:
            self._running[wish.id] = wish
            return True
        if wish.role == "destination":
            raise make_error("peer.busy", f"this host is at {why}")
        if len(self._waiting) >= self._limits.queue_max:
            raise make_error("queue.full", f"{len(self._waiting)} migrations wait already (limits.queue_max)")
        self._waiting[wish.id] = wish
        return False

    def leave(self, id: str) -> None:
        """A migration ended, or waits no longer; those that may begin now are admitted."""
        self._running.pop(id, None)
        self._waiting.pop(id, None)
        for wish in self._in_order():
            if self._why_not(wish) is None:
                del self._waiting[wish.id]
                self._running[wish.id] = wish
                self._admit(wish.id)

    def places(self) -> dict[str, QueuePlace]:
        """Where each that waits stands, the next one first, and what it waits for."""
        ordered = self._in_order()
        return {
            wish.id: QueuePlace(place=place, waiting=len(ordered), why=self._why_not(wish) or "it begins")
            for place, wish in enumerate(ordered, 1)
        }

    def _in_order(self) -> list[Wish]:
        return sorted(self._waiting.values(), key=lambda wish: (-wish.turn.priority, wish.number))

    def _why_not(self, wish: Wish) -> str | None:
        """The limit that keeps this one from beginning now; None where there is room."""
        limits, running = self._limits, self._running.values()
        if len(running) >= limits.migrations_max:
            return f"its limit of {limits.migrations_max} migrations (limits.migrations_max)"
        if wish.role == "destination":
            return None  # a peer's own limit is judged before its wish is read (listener)
        out = [each for each in running if each.role == "source"]
        if len(out) >= limits.outgoing_max:
            return f"its limit of {limits.outgoing_max} migrations to other hosts (limits.outgoing_max)"
        most, name = limits.outgoing_to(wish.peer)
        if sum(each.peer == wish.peer for each in out) >= most:
            return f"its limit of {most} migrations to {wish.peer} ({name})"
        turn = wish.turn
        in_group = sum(each.turn.group == turn.group for each in out) if turn.group is not None else 0
        if turn.group_max and in_group >= turn.group_max:
            return f"the {turn.group_max} at once that were asked for (--parallel)"
        return None
