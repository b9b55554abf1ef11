"""A postcopy whose halves stay parted: a person has them joined again, or gives up what is here, the other half being lost.

    --ask         at the source: try to join them now, by a new job where none tries any more
    --own-here    only at a source whose QEMU has made no switch, or failed to, or where the destination promises that it came
                  to nothing: the VM is whole here, as of the switch, and no half can be joined any more. Else refused: half a
                  memory cannot run
    --drop-here   ends the half here, and the VM with it

At the source the destination is asked before either word is followed, and its answer goes before the word:

        the destination says     --own-here                   --drop-here
        ran                      refused                      ends what is here: all had arrived, the VM runs there
        promise                  takes the VM back            refused: the switch failed, and the VM is whole here
        unsettled: under-way     refused: it keeps its half   refused: it keeps its half
        unsettled: gone          takes the VM back            ends the half here; a VM that is whole needs --i-have-looked
        unsettled: unknown       needs --i-have-looked        needs --i-have-looked
        nothing: unreachable …   needs --i-have-looked        needs --i-have-looked

At the destination nobody is asked, a source answers no questions: --drop-here always needs --i-have-looked; but where all of the
memory is here after all, it is refused.

What is decided is journalled first, `completed` or `aborted` without an end, and then done by recovery, by the next agent where
this one dies. A job that still tries to join the halves lets go of them before, and no sooner than the word is allowed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import structlog

from sealane.errors import ControlError, InDoubtError, SealaneError, make_error
from sealane.host.doubts import AskPeer, because, hear, resolution_of
from sealane.host.job import Job
from sealane.host.jobs import Jobs
from sealane.host.migration import messages
from sealane.host.migration.postcopy_source import NOT_JOINED
from sealane.host.models import Migration, Resolution, ResolveRequest
from sealane.host.problems import problem_of
from sealane.host.recovery import Recovery
from sealane.host.store import JournalEntry
from sealane.limits import REJOIN_TOLD_WITHIN_S
from sealane.session.handover import ENDED, Handover, Input, Role, State

_log = structlog.get_logger()
# What the journal says of a migration that ended so.
_CODES: Final = {
    Input.ARRIVED: None,
    Input.DROP_HERE: "handover.half-lost",
    Input.OWN_HERE: "handover.operator",
}
_WHOLE_MEND: Final = "say --own-here, and it goes on; or --drop-here --i-have-looked, should it be lost"
_LOOKED_MEND: Final = "make sure that the other half is lost for good, its QEMU gone, then say --i-have-looked"


class Halves:
    """The operator's way to migrations that are `postcopy-paused` here; `rejoin` begins the job that joins one again."""

    def __init__(
        self,
        jobs: Jobs,
        recovery: Recovery,
        ask: AskPeer,
        rejoin: Callable[[Migration], Job],
        *,
        told_within_s: float = REJOIN_TOLD_WITHIN_S,
    ) -> None:
        self._jobs, self._recovery, self._ask, self._rejoin = jobs, recovery, ask, rejoin
        self._told_within_s = told_within_s

    async def resolve(self, migration: Migration, request: ResolveRequest, user: str | None) -> Migration:
        """Do as the operator says; the migration as it is then.

        Raises `resolve.parted` (`ask`, and the halves are not joined yet), `resolve.half`, `resolve.could-lose-it`,
        `resolve.could-make-two`, `resolve.against-the-answer`, and `resolve.not-in-doubt` where the halves are not parted any
        more.
        """
        if request.decision == "ask":
            return await self._join(migration)
        if migration.role == "source":
            return await self._end_source(migration, request, user)
        if request.decision == "own-here":
            raise make_error("resolve.half")
        return await self._drop_destination(migration, request, user)

    # ---- joining

    async def _join(self, migration: Migration) -> Migration:
        if migration.role == "destination":
            raise InDoubtError("resolve.parted", f"it is the source that joins them: say it on {migration.peer}")
        await self._recovery.look_again(migration.id)
        if (now := self._jobs.find(migration.id)).state in ENDED:
            return now
        async with self._recovery.lock(migration.id):
            job = self._jobs.job(migration.id)
            how = "no job tried any more, and one tries again"
            if job is None:
                job = self._rejoin(self._parted(migration.id).migration)
            else:
                how = "a job was at it, and was told to try now"
                job.hurry.set()
        await self._first_try(job)
        now = self._jobs.find(migration.id)
        if now.state != "postcopy-paused":
            return now
        if job.ended.is_set() and now.problem is not None:
            raise InDoubtError("resolve.parted", f"{how}, and gave up: {now.problem.detail}")
        raise InDoubtError("resolve.parted", f"{how}: {now.detail}; it goes on trying")

    async def _first_try(self, job: Job) -> None:
        """Wait until the job has joined the halves, failed to, or ended, but not for ever."""
        subscription = job.subscribe()
        try:
            async with asyncio.timeout(self._told_within_s):
                await anext(subscription)  # how it stands, before the try
                async for event in subscription:
                    now = event.migration
                    if event.type == "end" or now.state != "postcopy-paused" or now.detail.startswith(NOT_JOINED):
                        return
        except (TimeoutError, StopAsyncIteration):
            return
        finally:
            job.unsubscribe(subscription)

    # ---- an operator's word

    async def _end_source(self, migration: Migration, request: ResolveRequest, user: str | None) -> Migration:
        said, digest, why = await hear(self._ask, self._entry(migration.id), _words)
        owns = request.decision == "own-here"
        check_own(request, said, why) if owns else check_drop(request, said, why)
        async with self._put_down(migration.id):
            if isinstance(said, messages.Ran):
                resolution = resolution_of("drop-here", "destination", said, why)
                return await self._end(migration.id, Input.ARRIVED, resolution, digest)
            parted = self._parted(migration.id)
            is_promised = isinstance(said, messages.Promise)
            if owns and not await self._recovery.is_whole(parted, is_promised=is_promised):
                raise make_error("resolve.half")
            if not owns and not request.i_have_looked and await self._recovery.is_whole(parted):
                raise ControlError("resolve.could-lose-it", f"the VM is whole here; {why}", mend=_WHOLE_MEND)
        if owns:
            words = f"{because(request, why)}; the VM is whole here, and goes on as it was at the switch"
            return await self._end(
                migration.id, Input.OWN_HERE, resolution_of("own-here", "operator", said, words, user)
            )
        return await self._end(migration.id, Input.DROP_HERE, _given_up(request, said, why, user))

    @contextlib.asynccontextmanager
    async def _put_down(self, migration_id: str) -> AsyncIterator[None]:
        """The job that tries to join the halves lets go of them; where the word is refused after all, another begins."""
        tried = self._jobs.job(migration_id) is not None
        await self._jobs.put_down(migration_id)
        try:
            yield
        except SealaneError:
            if tried:
                with contextlib.suppress(SealaneError):  # the word's error says more
                    self._rejoin(self._parted(migration_id).migration)
            raise

    async def _drop_destination(self, migration: Migration, request: ResolveRequest, user: str | None) -> Migration:
        why = f"{migration.peer} has the other half, and is not asked"
        check_drop(request, None, why)
        return await self._end(migration.id, Input.DROP_HERE, _given_up(request, None, why, user))

    async def _end(
        self, migration_id: str, happened: Input, resolution: Resolution, peer_receipt: str | None = None
    ) -> Migration:
        """Journal how it ends, and then end the half; raises the store's errors, and then nothing was done."""
        await self._jobs.put_down(migration_id)
        await self._recovery.look_again(migration_id)
        async with self._recovery.lock(migration_id):
            now = self._parted(migration_id).migration
            state = Handover(Role(now.role), State(now.state)).step(happened)
            code = _CODES[happened]
            changes: dict[str, Any] = {
                "state": state.value,
                "runs_at": "destination" if happened is Input.ARRIVED else "nowhere",
                "ended_at": None,
                "problem": None if code is None else problem_of(make_error(code, resolution.words)),
                "detail": resolution.words,
                "resolution": resolution,
                "peer_receipt": peer_receipt,
            }
            self._jobs.decide(Migration.model_validate({**now.model_dump(), **changes}))
        _log.warning("halves are resolved", migration=migration_id[:8], **resolution.model_dump(mode="json"))
        await self._recovery.settle(migration_id)
        return self._jobs.find(migration_id)

    # ---- small things

    def _entry(self, migration_id: str) -> JournalEntry:
        """What to ask about; a job may still be at it."""
        with contextlib.suppress(ControlError):
            return self._parted(migration_id)
        return JournalEntry(self._jobs.find(migration_id))

    def _parted(self, migration_id: str) -> JournalEntry:
        """Its entry, where no job is at it and the halves are parted; raises `resolve.not-in-doubt`."""
        for entry in self._jobs.left_over():
            if entry.migration.id == migration_id and entry.migration.state == "postcopy-paused":
                return entry
        now = self._jobs.find(migration_id)
        raise make_error("resolve.not-in-doubt", f"migration {now.number} of {now.vm} is {now.state} here")


def check_drop(request: ResolveRequest, said: messages.Answer | None, why: str) -> None:
    """Raise where ending the half here could lose a VM that is not lost yet."""
    if isinstance(said, messages.Promise) or (isinstance(said, messages.Unsettled) and said.reason == "under-way"):
        raise make_error("resolve.against-the-answer", f"{why}: ending the half here would end the VM")
    is_gone = isinstance(said, messages.Unsettled) and said.reason == "gone"
    if not (isinstance(said, messages.Ran) or is_gone or request.i_have_looked):
        words = f"the VM's memory is in two halves, and ending one ends the VM; {why}"
        raise ControlError("resolve.could-lose-it", words, mend=_LOOKED_MEND)


def check_own(request: ResolveRequest, said: messages.Answer | None, why: str) -> None:
    """Raise where letting the VM run here could make two of it."""
    if isinstance(said, messages.Ran) or (isinstance(said, messages.Unsettled) and said.reason == "under-way"):
        raise make_error("resolve.against-the-answer", f"{why}: letting it run here could make two of it")
    is_gone = isinstance(said, messages.Unsettled) and said.reason == "gone"
    if not (isinstance(said, messages.Promise) or is_gone or request.i_have_looked):
        raise make_error("resolve.could-make-two", why)


def _words(said: messages.Answer, peer: str) -> str:
    """What the destination's answer means for a half."""
    match said:
        case messages.Ran():
            return f"{peer} has all of the VM's memory, and the VM ran there"
        case messages.Promise():
            return f"{peer} never ran its copy, and has destroyed it: the VM is whole here"
        case messages.Unsettled(reason="gone"):
            return f"{peer} has lost the VM's QEMU, and its half of the memory"
        case messages.Unsettled(reason="under-way"):
            return f"{peer} keeps the other half" + (f": {said.detail}" if said.detail else "")
        case _:
            return f"{peer} does not know this migration"


def _given_up(request: ResolveRequest, said: messages.Answer | None, why: str, user: str | None) -> Resolution:
    words = f"{because(request, why)}; the half here was ended, and the VM with it"
    return resolution_of("drop-here", "operator", said, words, user)
