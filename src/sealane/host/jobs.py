"""All migrations of this host: those that jobs run, those that nobody has ended, and the history."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from sealane.errors import ControlError, PeerError, SealaneError, make_error
from sealane.host.config import LimitSettings
from sealane.host.job import Clock, Issue, Job, no_receipt
from sealane.host.models import Event, Migration, Protection, Role
from sealane.host.observer import Observer, Unobserved
from sealane.host.queue import NOW, Queue, Turn, Wish, place_words
from sealane.host.refusals import Refusals
from sealane.host.store import JournalEntry, Store, utc_now
from sealane.host.subscription import Subscription
from sealane.limits import CLEAR_UP_TIMEOUT_S
from sealane.seal.protect import readable_words
from sealane.session.handover import ENDED

_log = structlog.get_logger()
# What a job does without being interrupted swallows a cancellation that comes meanwhile.
_CANCEL_AGAIN_S: Final = 0.5


class Jobs:
    """All migrations of this host: the live ones, those a previous agent left, and the history."""

    def __init__(
        self,
        store: Store,
        *,
        limits: LimitSettings | None = None,
        clock: Clock = utc_now,
        issue: Issue = no_receipt,
        observer: Observer | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or LimitSettings()
        self.queue = Queue(self._limits, self._admit)
        self._observer: Observer = observer or Unobserved()
        self._store = store
        self._issue = issue
        self._clock = clock
        most = self._limits.refusals_per_peer_per_hour
        self.refusals = Refusals(store, most, issue=issue, observer=self._observer, clock=clock, monotonic=monotonic)
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
        turn: Turn = NOW,
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

    async def let_go(self, vm: str) -> None:
        """Wait for a job of this VM whose end was told and which still clears up; whoever heard of the end may begin the next.

        At most CLEAR_UP_TIMEOUT_S: `begin` then says `vm.busy`.
        """
        job = self.job_for(vm)
        if job is not None and job.ended.is_set() and job.task is not None:
            await asyncio.wait({job.task}, timeout=CLEAR_UP_TIMEOUT_S)

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

    async def put_down(self, migration_id: str) -> None:
        """Have the job of a postcopy whose halves are parted leave it as it is, so that something else can be done about it.

        Raises `resolve.not-in-doubt` where the halves are not parted.
        """
        job = self._live.get(migration_id)
        while job is not None and job.task is not None and not job.task.done():
            if job.migration.state != "postcopy-paused":
                raise make_error(
                    "resolve.not-in-doubt", f"migration {job.migration.number} is {job.migration.state} here"
                )
            job.cancel_code = "migration.postcopy-paused"
            job.task.cancel()
            await asyncio.wait({job.task}, timeout=_CANCEL_AGAIN_S)

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
                job.cancel("queue.lost")
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
