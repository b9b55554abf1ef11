"""One migration at one end, from its turn in the queue to its last word.

A job publishes snapshots (`Migration`) as events. Subscribers that do not keep up lose progress, never a change of state
and never the end. What a job journals is on the disk before anybody is told.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import structlog

from sealane.errors import ControlError, SealaneError, make_error
from sealane.host.models import Event, Migration, Role, RunsAt
from sealane.host.observer import Observer, Unobserved
from sealane.host.problems import problem_of
from sealane.host.queue import NOW
from sealane.host.store import Store, utc_now
from sealane.host.subscription import Subscription
from sealane.hypervisor.driver import MigrationSettings, VmDescription
from sealane.hypervisor.process import LaunchedMachine
from sealane.session.handover import ENDED, IN_POSTCOPY, Handover, Input, State
from sealane.session.handover import Role as HandoverRole

Clock = Callable[[], datetime]
# Writes the receipt of a migration that rests, and gives the snapshot with its number.
Issue = Callable[[Migration], Migration]
# States of a source whose VM may be elsewhere; it can no longer be cancelled.
BEYOND_CANCEL: Final = frozenset({State.HANDING_OVER, State.IN_DOUBT}) | IN_POSTCOPY

# Where a source's VM may be paused, and a destination's QEMU be there.
_TO_CLEAR_UP: Final = frozenset(
    {("source", "copying"), ("source", "switching-over")}
    | {("destination", state) for state in ("preparing", "copying", "switching-over")}
)


def no_receipt(migration: Migration) -> Migration:
    """An `Issue` that writes none."""
    return migration


def runs_at_after(role: Role, state: State) -> RunsAt:
    """Where the VM runs once a migration rests in `state`, if nothing else went wrong."""
    if state is State.IN_DOUBT:
        return "in-doubt"
    return "destination" if state is State.COMPLETED or state in IN_POSTCOPY else "source"


def state_after_failure(migration: Migration) -> State:
    """Where a failure at this moment leads, by the hand-over's table; what waited has not entered it."""
    if migration.state == "queued":
        return State.ABORTED
    return Handover(HandoverRole(migration.role), State(migration.state)).step(Input.FAILED)


class Job(ABC):
    """One migration at one end. A subclass writes `run`; everything it tells goes through `update` and `journal`.

    `run` returns after `end` or `leave`, or raises: the error's problem then ends the job in the state that the hand-over's
    table gives for a failure (aborted; in-doubt once handing over). `description` is what a `vm list` shows while
    the job holds the VM's QMP socket.
    """

    def __init__(self, store: Store, migration: Migration, *, clock: Clock = utc_now) -> None:
        self.store = store
        self.clock = clock
        self.log = structlog.get_logger().bind(migration=migration.id[:8], vm=migration.vm, role=migration.role)
        self.description: VmDescription | None = None
        self.cancelled = False
        self.cancel_code = "migration.cancelled"
        self.ended = asyncio.Event()
        self.end_is_journalled = True
        self.issue: Issue = no_receipt
        self.task: asyncio.Task[None] | None = None
        self.admitted = asyncio.Event()
        self.hurry = asyncio.Event()  # a job that pauses before it tries something again tries it now
        self.check_again = NOW.check_again
        self.time_max_s: float | None = None
        self.observer: Observer = Unobserved()
        self._migration = migration
        self._subscriptions: set[Subscription] = set()

    @abstractmethod
    async def run(self) -> None:
        """Carry the migration out."""

    @property
    def migration(self) -> Migration:
        """The present snapshot."""
        return self._migration

    @property
    def id(self) -> str:
        """The migration's id."""
        return self._migration.id

    def update(self, **changes: Any) -> Migration:
        """Change the snapshot and tell it: as "progress" if that is all that changed, as "state" otherwise."""
        self._migration = self._with(changes)
        self._publish("progress" if set(changes) == {"progress"} else "state")
        return self._migration

    def journal(
        self,
        *,
        qmp: str | None = None,
        launched: LaunchedMachine | None = None,
        epoch: int | None = None,
        qemu_before: MigrationSettings | None = None,
        **changes: Any,
    ) -> Migration:
        """`update`, durably: the journal has it before the snapshot changes. Raises host.store, host.disk-full."""
        if epoch is not None:
            changes["epoch"] = epoch
        self.store.journal(self._with(changes), qmp=qmp, launched=launched, epoch=epoch, qemu_before=qemu_before)
        return self.update(**changes) if changes else self._migration

    def end(self, **changes: Any) -> Migration:
        """The last word: journalled, and told as the "end" event. A second call changes nothing.

        If the journal fails now, the end is told all the same; `Jobs` writes it when it next can, and an agent that
        ends before finds the entry before it.
        """
        return self._conclude({"ended_at": self.clock(), **changes})

    def leave(self, **changes: Any) -> Migration:
        """The job's last word where the migration's is still to come: something here could not be done yet.

        Journalled and told as `end` is, but `ended_at` stays open: the VM is held, and the agent's recovery goes on.
        """
        return self._conclude(changes)

    def _conclude(self, changes: dict[str, Any]) -> Migration:
        if self.ended.is_set():
            return self._migration
        self._migration = self._with(changes)
        try:
            self.store.journal(self._migration)
        except SealaneError as error:
            self.end_is_journalled = False
            self.log.error("the end was not journalled", code=error.code, detail=error.detail)
        else:
            if self._migration.ended_at is not None:
                self._migration = self._issue(self._migration)
        self.ended.set()
        self._publish("end")
        self._subscriptions.clear()
        return self._migration

    def fail(self, error: BaseException) -> Migration:
        """End with this error, in the state that the hand-over's table gives for a failure here.

        A destination that has journalled the ticket owns the VM, and nobody knows here whether it was resumed: recovery
        resumes it.
        """
        if self._migration.state in ENDED:
            return self.end()
        if (self._migration.role, self._migration.state) == ("destination", State.HANDING_OVER):
            detail = "the VM is this host's; it is resumed as soon as that is possible"
            return self.leave(problem=problem_of(error), detail=detail)
        state = state_after_failure(self._migration)
        if state in IN_POSTCOPY:
            return self.leave(state=state.value, problem=problem_of(error))
        runs_at = runs_at_after(self._migration.role, state)
        return self.end(state=state.value, runs_at=runs_at, problem=problem_of(error))

    def _break_off(self, error: Exception) -> Migration:
        """As `fail`; but nobody knows whether the job cleared up after itself: recovery does, where there may be something left."""
        role, state = self._migration.role, self._migration.state
        if (role, state) not in _TO_CLEAR_UP:
            return self.fail(error)
        runs_at: RunsAt = "nowhere" if role == "source" else "source"
        detail = "it broke off, and the agent clears up after it"
        return self.leave(state=State.ABORTED.value, runs_at=runs_at, problem=problem_of(error), detail=detail)

    def cancel(self, code: str = "migration.cancelled") -> None:
        """Ask the job to end, for the reason `code`; it does so by itself, seen as CancelledError in `run`.

        Raises `migration.over` after the end, `migration.too-late` once handing over.
        """
        if self.ended.is_set() or self._migration.state in ENDED:
            raise make_error("migration.over", f"migration {self._migration.number} is {self._migration.state}")
        if self._migration.state in BEYOND_CANCEL:
            raise make_error("migration.too-late")
        self.cancelled, self.cancel_code = True, code
        if self.task:
            self.task.cancel()

    def subscribe(self, subscription: Subscription | None = None) -> Subscription:
        """Events from now on; the first one tells the present state. One subscription may hear several jobs."""
        subscription = subscription or Subscription()
        subscription.push(Event(type="state", migration=self._migration))
        if self.ended.is_set():
            subscription.push(Event(type="end", migration=self._migration))
        else:
            self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send a subscriber nothing more."""
        self._subscriptions.discard(subscription)

    def _issue(self, migration: Migration) -> Migration:
        """Have the receipt written; where that fails, the next agent writes it: the journal has all that it says."""
        try:
            return self.issue(migration)
        except SealaneError as error:
            self.log.error("the receipt was not written", code=error.code, detail=error.detail)
            return migration

    def _with(self, changes: dict[str, Any]) -> Migration:
        return Migration.model_validate({**self._migration.model_dump(), **changes})

    def _publish(self, kind: Any) -> None:
        event = Event(type=kind, migration=self._migration)
        for subscription in self._subscriptions:
            subscription.push(event)

    async def supervise(self) -> None:
        """Wait for the job's turn, run, and see to it that there is an end whatever happens."""
        structlog.contextvars.bind_contextvars(migration=self.id[:8])
        overdue: asyncio.TimerHandle | None = None
        try:
            await self._wait_for_turn()
            if self.time_max_s is not None:
                overdue = asyncio.get_running_loop().call_later(self.time_max_s, self._end_overdue)
            await self.run()
            self.end()
        except asyncio.CancelledError:
            self.fail(make_error(self.cancel_code))
        except SealaneError as error:
            self.fail(error)
        except Exception as error:
            self.log.exception("unexpected error")
            self._break_off(error)
        finally:
            if overdue is not None:
                overdue.cancel()
            migration = self._migration
            code = migration.problem.code if migration.problem else None
            self.log.info("migration ended", state=migration.state, runs_at=migration.runs_at, code=code)

    async def _wait_for_turn(self) -> None:
        """What waited is looked at again when its turn comes: the peer may not be trusted any more."""
        since = time.monotonic()
        if self._migration.state == "queued":
            await self.admitted.wait()
            self.check_again()
            waited_s = round(time.monotonic() - since, 3)
            self.journal(state="preparing", queue=None, detail="", waited_s=waited_s)
        begun = self._migration
        self.log.info("migration began", peer=begun.peer, waited_s=begun.waited_s, requested_by=begun.requested_by)
        self.observer.begun(begun)

    def _end_overdue(self) -> None:
        self.log.warning("a migration takes too long", time_max_s=self.time_max_s)
        with contextlib.suppress(ControlError):  # one that is handing over must come to its end
            self.cancel("migration.time-limit")
