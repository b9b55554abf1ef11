"""Migrations in progress: one `Job` each, and the table of them.

A job publishes snapshots (`Migration`) as events. Subscribers that do not keep up lose progress, never a change of state
and never the end. What a job journals is on the disk before anybody is told.
"""

import asyncio
import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import structlog

from sealane.errors import ControlError, PeerError, SealaneError, make_error
from sealane.host.config import LimitSettings
from sealane.host.limits import TokenBuckets
from sealane.host.models import Event, Migration, Protection, Role, RunsAt
from sealane.host.observer import Observer, Unobserved
from sealane.host.problems import problem_of
from sealane.host.queue import Queue, Turn, Wish, place_words
from sealane.host.store import JournalEntry, Store, utc_now
from sealane.host.subscription import Subscription
from sealane.hypervisor.driver import VmDescription
from sealane.hypervisor.launch import LaunchedMachine
from sealane.seal.protect import readable_words
from sealane.session.handover import ENDED, IN_POSTCOPY, Handover, Input, State
from sealane.session.handover import Role as HandoverRole

_NOW: Final = Turn()
Clock = Callable[[], datetime]
# Writes the receipt of a migration that rests, and gives the snapshot with its number.
Issue = Callable[[Migration], Migration]
# States of a source whose VM may be elsewhere; it can no longer be cancelled.
BEYOND_CANCEL: Final = frozenset({State.HANDING_OVER, State.IN_DOUBT}) | IN_POSTCOPY


def _no_receipt(migration: Migration) -> Migration:
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


_log = structlog.get_logger()


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
        self.issue: Issue = _no_receipt
        self.task: asyncio.Task[None] | None = None
        self.admitted = asyncio.Event()
        self.check_again = _NOW.check_again
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
        **changes: Any,
    ) -> Migration:
        """`update`, durably: the journal has it before the snapshot changes. Raises host.store, host.disk-full."""
        if epoch is not None:
            changes["epoch"] = epoch
        self.store.journal(self._with(changes), qmp=qmp, launched=launched, epoch=epoch)
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
            self.fail(error)
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


class Jobs:
    """All migrations of this host: the live ones, those a previous agent left, and the history."""

    def __init__(
        self,
        store: Store,
        *,
        limits: LimitSettings | None = None,
        clock: Clock = utc_now,
        issue: Issue = _no_receipt,
        observer: Observer | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or LimitSettings()
        self.queue = Queue(self._limits, self._admit)
        self._refusals = TokenBuckets(self._limits.refusals_per_peer_per_hour, 3600.0, clock=monotonic)
        self._refusals_dropped: dict[str, int] = {}
        self._observer: Observer = observer or Unobserved()
        self._store = store
        self._issue = issue
        self._clock = clock
        self._live: dict[str, Job] = {}
        self._left_over: dict[str, Migration] = {}
        self._awaiting_recovery: dict[str, asyncio.Event] = {}
        self._unwritten: dict[str, Migration] = {}  # ends that the journal did not take
        self._stopping = False

    def begin(  # noqa: PLR0913 - one keyword for each fact
        self,
        make_job: Callable[[Migration], Job],
        *,
        vm: str,
        role: Role,
        peer: str,
        id: str | None = None,
        qmp: str | None = None,
        requested_by: str | None = None,
        protection: Protection = "sealed",
        turn: Turn = _NOW,
    ) -> Job:
        """Number a migration, journal it, and run the job that `make_job` builds for it, now or when its turn comes.

        Raises `vm.busy`, `peer.busy` (one that comes, at this host's limit), `queue.full`, `agent.stopping`, and the store's
        errors.
        """
        if self._stopping:
            raise make_error("agent.stopping")
        if busy := self.active_for(vm):
            raise make_error("vm.busy", f"{vm} is in migration {busy.number} ({busy.state})")
        self.write_ends()
        migration = Migration(
            id=id or secrets.token_hex(16),
            number=self._store.next_number(),
            vm=vm,
            role=role,
            peer=peer,
            state="preparing",
            priority=turn.priority,
            group=turn.group,
            runs_at="source",
            started_at=self._clock(),
            requested_by=requested_by,
            protection=protection,
            readable=readable_words(protection),
        )
        if id is not None and self._store.find(id):
            raise PeerError("peer.message", "that migration id was used before")
        if not self.queue.enter(Wish(migration.id, migration.number, role, peer, turn)):
            place = self.queue.places()[migration.id]
            _log.info("migration queued", migration=migration.id[:8], vm=vm, place=place.place, why=place.why)
            migration = migration.model_copy(update={"state": "queued", "queue": place, "detail": place_words(place)})
        try:
            job = make_job(migration)
            job.issue, job.observer, job.check_again = self._issue, self._observer, turn.check_again
            job.time_max_s = min(self._limits.time_for(vm), turn.time_max_s)
            self._store.journal(migration, qmp=qmp)
        except BaseException:
            self.queue.leave(migration.id)
            raise
        self._live[migration.id] = job
        job.task = asyncio.create_task(job.supervise(), name=f"migration {migration.number}")
        job.task.add_done_callback(lambda _task: self._forget(job))
        self._tell_places()
        return job

    def _admit(self, migration_id: str) -> None:
        self._live[migration_id].admitted.set()

    def _tell_places(self) -> None:
        """Tell those that wait where they stand, each only where that changed."""
        for migration_id, place in self.queue.places().items():
            job = self._live[migration_id]
            if job.migration.queue != place:
                job.update(queue=place, detail=place_words(place))

    def refuse(self, error: SealaneError, *, vm: str, role: Role, peer: str, id: str, **details: Any) -> None:
        """Journal a peer's wish that was refused before it became a job, and write its receipt; never raises.

        So many an hour for each peer (`limits.refusals_per_peer_per_hour`): no peer fills the journal. The others are counted.
        """
        journalled = self._refusals.take(peer)
        self._observer.refused(role, error.code, journalled=journalled)
        if not journalled:
            self._count_dropped(peer)
            return
        if dropped := self._refusals_dropped.pop(peer, 0):
            _log.warning("refused wishes of a peer were not journalled", peer=peer, count=dropped)
        try:
            if self._store.find(id):
                return
            now = self._clock()
            migration = Migration(
                id=id,
                number=self._store.next_number(),
                vm=vm,
                role=role,
                peer=peer,
                state="aborted",
                runs_at="source",
                started_at=now,
                ended_at=now,
                problem=problem_of(error),
                **details,
            )
            self._store.journal(migration)
            self._issue(migration)
        except SealaneError as failure:
            _log.error("a refusal was not journalled", migration=id[:8], code=failure.code, detail=failure.detail)

    def turned_away(self, error: SealaneError) -> None:
        """Count a peer's wish that was not even heard: it asks too often, or has too much under way."""
        self._observer.refused("destination", error.code, journalled=False)

    def _count_dropped(self, peer: str) -> None:
        if peer not in self._refusals_dropped:
            _log.warning("a peer has wishes refused faster than they are journalled", peer=peer)
        self._refusals_dropped[peer] = self._refusals_dropped.get(peer, 0) + 1

    def write_ends(self) -> None:
        """Journal what could not be journalled when it happened; raises as the store does."""
        for migration in list(self._unwritten.values()):
            self._store.journal(migration)
            if migration.ended_at is not None:
                self._issue(migration)
            del self._unwritten[migration.id]

    def _forget(self, job: Job) -> None:
        self._live.pop(job.id, None)
        if not job.ended.is_set():  # its task was cancelled before the first step
            job.fail(make_error(job.cancel_code))
        if not job.end_is_journalled:
            self._unwritten[job.id] = job.migration
        if job.migration.ended_at is None or job.migration.state not in ENDED:
            self._left_over[job.id] = job.migration
        self._observer.ended(job.migration)
        self.queue.leave(job.id)
        self._tell_places()

    # What is there

    @property
    def live(self) -> list[Job]:
        """The jobs that run now."""
        return list(self._live.values())

    @property
    def under_way(self) -> list[Migration]:
        """The migrations that have not ended, in-doubt ones included."""
        return [*(job.migration for job in self._live.values()), *self._left_over.values()]

    @property
    def active_count(self) -> int:
        """How many migrations have not ended, in-doubt ones included."""
        return len(self._live) + len(self._left_over)

    def active_for(self, vm: str) -> Migration | None:
        """The migration that holds this VM now, if any."""
        live = (job.migration for job in self._live.values())
        return next((m for m in (*live, *self._left_over.values()) if m.vm == vm), None)

    def job_for(self, vm: str) -> Job | None:
        """The running job that holds this VM, if any."""
        return next((job for job in self._live.values() if job.migration.vm == vm), None)

    def is_under_way(self, migration_id: str) -> bool:
        """Whether a job runs it, or something of it is still to be done."""
        return migration_id in self._live or migration_id in self._left_over

    def job(self, migration_id: str) -> Job | None:
        """The running job with that id, if any."""
        return self._live.get(migration_id)

    def find(self, reference: str) -> Migration:
        """A migration by its id, its number, or an unambiguous beginning of its id; raises `migration.unknown`."""
        entries = self._store.find(reference) if reference else []
        if not entries:
            raise make_error("migration.unknown", f"no migration {reference!r}")
        if len(entries) > 1:
            raise make_error("migration.unknown", f"more than one migration begins with {reference!r}")
        return self._newest(entries[0].migration)

    def list(self, *, vm: str | None = None, active: bool = False) -> list[Migration]:
        """The newest first; with `active` only those that have not ended."""
        found = [self._newest(migration) for migration in self._store.migrations(vm=vm)]
        return [m for m in found if not active or m.id in self._live or m.id in self._left_over]

    def _newest(self, journalled: Migration) -> Migration:
        job = self._live.get(journalled.id)
        if job:
            return job.migration
        return self._left_over.get(journalled.id) or self._unwritten.get(journalled.id, journalled)

    async def events(self, reference: str) -> AsyncIterator[Event]:
        """The events of a migration to its end. Of one that no job runs: its state, and that this is all; where a
        previous agent left it, after recovery has looked at it once."""
        job = self.job(self.find(reference).id)
        if job is None:
            migration = self.find(reference)
            yield Event(type="state", migration=migration)
            if (attempt := self._awaiting_recovery.get(migration.id)) is not None:
                await attempt.wait()
            yield Event(type="end", migration=self.find(migration.id))
            return
        subscription = job.subscribe()
        try:
            async for event in subscription:
                yield event
        finally:
            job.unsubscribe(subscription)

    async def events_of_group(self, group: str) -> AsyncIterator[Event]:
        """The events of all migrations of a group, until each that is live has ended; first those that no job runs."""
        jobs = [job for job in self.live if job.migration.group == group]
        subscription = Subscription(ends=len(jobs))
        for job in jobs:
            job.subscribe(subscription)
        try:
            for migration in self.list():
                if migration.group == group and migration.id not in self._live:
                    yield Event(type="end", migration=migration)
            async for event in subscription:
                yield event
        finally:
            for job in jobs:
                job.unsubscribe(subscription)

    def cancel(self, reference: str) -> Migration:
        """Ask a migration to end; raises `migration.over`, `migration.too-late`."""
        migration = self.find(reference)
        job = self.job(migration.id)
        if job is None:
            code = "migration.over" if migration.state in ENDED else "migration.too-late"
            raise ControlError(code, f"migration {migration.number} is {migration.state}")
        job.cancel()
        return job.migration

    # What a previous agent left (see recovery.py)

    def adopt(self, entry: JournalEntry) -> None:
        """Hold the VM of an unfinished migration that no job runs."""
        self._left_over[entry.migration.id] = entry.migration
        self._awaiting_recovery[entry.migration.id] = asyncio.Event()

    def left_over(self) -> Sequence[JournalEntry]:
        """What no job runs and nobody has ended: of a previous agent, and what jobs of this one left. The oldest first."""
        entries = []
        for migration in sorted(self._left_over.values(), key=lambda each: each.number):
            known = self._store.find(migration.id)
            entries.append(replace(known[0], migration=migration) if known else JournalEntry(migration))
        return entries

    def take_up(self, migration_id: str, make_job: Callable[[Migration], Job]) -> Job:
        """Let a job go on with what no job runs; raises `vm.busy` before recovery has looked at it, `migration.unknown`."""
        if self._stopping:
            raise make_error("agent.stopping")
        migration = self._left_over.get(migration_id)
        if migration is None:
            raise make_error("migration.unknown", "no migration of that id waits here")
        if migration_id in self._awaiting_recovery:
            raise make_error("vm.busy", "recovery has not looked at it yet")
        job = make_job(migration)
        job.issue, job.observer = self._issue, self._observer
        del self._left_over[migration_id]
        self._live[migration_id] = job
        job.task = asyncio.create_task(job.supervise(), name=f"migration {migration.number}, taken up")
        job.task.add_done_callback(lambda _task: self._forget(job))
        return job

    def looked_at(self, migration_id: str) -> None:
        """Recovery has tried once; whoever follows the migration is told how it stands."""
        if (attempt := self._awaiting_recovery.pop(migration_id, None)) is not None:
            attempt.set()

    def note(self, migration: Migration) -> None:
        """Tell more of one that is left over; not journalled."""
        if migration.id in self._left_over:
            self._left_over[migration.id] = migration

    def decide(self, migration: Migration) -> Migration:
        """Journal how a doubt ends, durably, before anything is done about it; recovery does it, and then it is settled."""
        self._store.journal(migration)
        self._unwritten.pop(migration.id, None)
        self._left_over[migration.id] = migration
        return migration

    def settle(self, migration: Migration) -> Migration:
        """Journal what became of an adopted migration; once it has ended, its VM is free."""
        self._store.journal(migration)
        self._unwritten.pop(migration.id, None)
        migration = self._receipted(migration)
        if migration.ended_at is not None and migration.state in ENDED:
            self._left_over.pop(migration.id, None)
        else:
            self._left_over[migration.id] = migration
        return migration

    def _receipted(self, migration: Migration) -> Migration:
        try:
            return self._issue(migration)
        except SealaneError as error:
            _log.error("the receipt was not written", migration=migration.id[:8], code=error.code)
            return migration

    # The end

    async def stop(self, grace_s: float) -> None:
        """Take no more migrations, wait `grace_s` for those that run, cancel the rest and wait for their ends.

        Those that wait in the queue are cancelled at once: nothing was done for them yet.

        Those that are handing over are waited for another `grace_s`: cancelling cannot help them.
        """
        self._stopping = True
        for job in self.live:
            if job.migration.state == "queued":
                job.cancel("agent.stopping")
        tasks = {job.task for job in self.live if job.task}
        if tasks and grace_s > 0:
            _, tasks = await asyncio.wait(tasks, timeout=grace_s)
        for job in self.live:
            with contextlib.suppress(ControlError):
                job.cancel("agent.stopping")
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=max(grace_s, 1.0))
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=max(grace_s, 1.0))
        with contextlib.suppress(SealaneError):
            self.write_ends()
