"""A source in doubt asks the destination until it hears, and follows the answer, or an operator's word.

    the destination says     the agent, by itself            --own-here                     --drop-here
    ran                      ends the paused copy            refused                        ends the paused copy
    promise                  takes the VM back               takes the VM back              refused
    unsettled: gone          asks again                      takes the VM back              refused
    unsettled: under-way     asks again                      needs --i-have-looked          needs --i-have-looked
    unsettled: unknown       asks again                      needs --i-have-looked          needs --i-have-looked
    nothing: unreachable …   asks again                      needs --i-have-looked          needs --i-have-looked

`gone`: the destination took the ticket and lost its QEMU. The copy here is the last one; what the guest did there is lost
with it, so that a person has to say it. What is decided is journalled first, `aborted` or `completed` without an end, and
then done by recovery, by the next agent where this one dies. An order is for the doubt that it was given in: it is followed
only while this migration is still in doubt.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from sealane.errors import ControlError, InDoubtError, SealaneError, make_error
from sealane.host.jobs import Jobs
from sealane.host.migration import messages
from sealane.host.models import Migration, Problem, Resolution, ResolveRequest
from sealane.host.problems import problem_of
from sealane.host.recovery import Recovery
from sealane.host.store import JournalEntry, utc_now
from sealane.limits import ASK_FIRST_PAUSE_S, ASK_LONGEST_PAUSE_S, ASK_LOOK_INTERVAL_S
from sealane.session.handover import Handover, Input, Role, State

# Asks the destination of this migration: its answer, and the digest of its receipt where that came along.
AskPeer = Callable[[JournalEntry], Awaitable[tuple[messages.Answer, str | None]]]
_RUNS_AT: Final = {State.COMPLETED: "destination", State.ABORTED: "nowhere"}
_log = structlog.get_logger()


class Doubts:
    """All migrations that are in doubt here. `run` asks for them; `resolve` is the operator's way in."""

    def __init__(
        self,
        jobs: Jobs,
        recovery: Recovery,
        ask: AskPeer,
        *,
        first_pause_s: float = ASK_FIRST_PAUSE_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs, self._recovery, self._ask, self._monotonic = jobs, recovery, ask, monotonic
        self._first_pause_s, self._longest_pause_s = first_pause_s, max(first_pause_s, ASK_LONGEST_PAUSE_S)
        self._asked: dict[str, tuple[int, float]] = {}  # how often, and when again
        self._asking: dict[str, asyncio.Lock] = {}

    async def run(self) -> None:
        """Ask about every doubt, at once and then ever more rarely; ends when it is cancelled."""
        while True:
            try:
                await self.ask_due()
            except Exception:  # the next look may do better, and nothing else would look
                _log.exception("asking failed")
            await asyncio.sleep(ASK_LOOK_INTERVAL_S)

    async def ask_due(self) -> None:
        """Ask about those whose time has come, all at once."""
        now = self._monotonic()
        doubts = self._in_doubt()
        self._asked = {key: value for key, value in self._asked.items() if key in doubts}
        self._asking = {key: value for key, value in self._asking.items() if key in doubts or value.locked()}
        due = [key for key in doubts if self._asked.get(key, (0, now))[1] <= now]
        await asyncio.gather(*(self._ask_by_itself(key) for key in due))

    def _in_doubt(self) -> dict[str, JournalEntry]:
        return {
            entry.migration.id: entry
            for entry in self._jobs.left_over()
            if (entry.migration.role, entry.migration.state) == ("source", "in-doubt")
        }

    async def _ask_by_itself(self, migration_id: str) -> None:
        count = self._asked.get(migration_id, (0, 0.0))[0] + 1
        pause_s = min(self._first_pause_s * 2 ** min(count - 1, 16), self._longest_pause_s)
        self._asked[migration_id] = (count, self._monotonic() + pause_s)  # counts also where the asking fails
        async with self._lock(migration_id):
            entry = self._in_doubt().get(migration_id)
            if entry is None:
                return
            said, digest, why = await hear(self._ask, entry, why_it_stays)
            try:
                is_over = await self._follow_answer(entry, said, digest)
            except SealaneError as error:  # the journal did not take it: nothing was done
                is_over, why = False, f"{error.detail} ({error.code})"
            if not is_over:
                again = "once" if count == 1 else f"{count} times"
                note = f"{why}; asked {again}, and again in {pause_s:.0f} s"
                self._jobs.note(entry.migration.model_copy(update={"detail": note}))
                _log.info("still in doubt", migration=migration_id[:8], why=why, again_in_s=pause_s)
        self._asked[migration_id] = (count, self._monotonic() + pause_s)

    def _lock(self, migration_id: str) -> asyncio.Lock:
        return self._asking.setdefault(migration_id, asyncio.Lock())

    async def _follow_answer(self, entry: JournalEntry, said: messages.Answer | None, digest: str | None) -> bool:
        peer = entry.migration.peer
        if isinstance(said, messages.Ran):
            words = f"{peer} journalled the ticket, and the VM ran there"
            await self._end(entry, Input.RECEIPT, resolution_of("drop-here", "destination", said, words), digest)
        elif isinstance(said, messages.Promise):
            words = f"{peer} never ran its copy, has destroyed it, and promised that it never will"
            await self._end(entry, Input.REFUSED, resolution_of("own-here", "destination", said, words))
        else:
            return False
        return True

    async def resolve(self, reference: str, request: ResolveRequest, user: str | None) -> Migration:
        """Ask now, and follow the answer or the operator's word; the migration as it is then.

        Raises `resolve.not-in-doubt`, `handover.in-doubt` (`ask` brought no answer that settles it), and for a word that
        could make two copies, or lose the last, `resolve.against-the-answer`, `resolve.could-make-two`,
        `resolve.could-lose-it`.
        """
        migration = self._jobs.find(reference)
        async with self._lock(migration.id):
            entry = self._in_doubt().get(migration.id)
            if entry is None:
                now = self._jobs.find(migration.id)
                raise ControlError("resolve.not-in-doubt", f"migration {now.number} of {now.vm} is {now.state} here")
            said, digest, why = await hear(self._ask, entry, why_it_stays)
            if request.decision != "ask":
                check_word(request, said, why)
            if not await self._follow_answer(entry, said, digest):
                if request.decision == "ask":
                    raise InDoubtError("handover.in-doubt", why)
                await self._follow_operator(entry, request, said, why, user)
        return self._jobs.find(migration.id)

    async def _follow_operator(
        self,
        entry: JournalEntry,
        request: ResolveRequest,
        said: messages.Answer | None,
        why: str,
        user: str | None,
    ) -> None:
        why = because(request, why)
        if request.decision == "own-here":
            resolution = resolution_of("own-here", "operator", said, why, user)
            await self._end(entry, Input.OWN_HERE, resolution)
        else:
            resolution = resolution_of("drop-here", "operator", said, why, user)
            await self._end(entry, Input.DROP_HERE, resolution)

    async def _end(
        self, entry: JournalEntry, happened: Input, resolution: Resolution, peer_receipt: str | None = None
    ) -> None:
        """Journal how the doubt ends, and then do it; raises the store's errors, and then nothing was done."""
        migration_id = entry.migration.id
        async with self._recovery.lock(migration_id):
            now = self._in_doubt().get(migration_id)
            if now is None:
                raise ControlError("resolve.not-in-doubt", "the doubt ended meanwhile")
            state = Handover(Role.SOURCE, State(now.migration.state)).step(happened)
            changes = {
                "state": state.value,
                "runs_at": _RUNS_AT[state],
                "ended_at": None,
                "problem": _problem(happened, resolution),
                "detail": resolution.words,
                "resolution": resolution,
                "peer_receipt": peer_receipt,
            }
            self._jobs.decide(Migration.model_validate({**now.migration.model_dump(), **changes}))
        _log.warning(
            "a doubt is resolved", migration=migration_id[:8], state=state.value, **resolution.model_dump(mode="json")
        )
        await self._recovery.settle(migration_id)


async def hear(
    ask: AskPeer, entry: JournalEntry, words: Callable[[messages.Answer, str], str]
) -> tuple[messages.Answer | None, str | None, str]:
    """The destination's answer and its receipt's digest, or None; and what the answer, or its lack, means in words."""
    peer = entry.migration.peer
    try:
        said, digest = await ask(entry)
    except SealaneError as error:
        return None, None, f"{peer} could not be asked: {error.detail} ({error.code})"
    return said, digest, words(said, peer)


def because(request: ResolveRequest, why: str) -> str:
    """What an operator's word rests on."""
    return f"{why}, and the operator has looked there" if request.i_have_looked else why


def why_it_stays(said: messages.Answer, peer: str) -> str:
    """Why an answer does not settle a doubt, in words."""
    if not isinstance(said, messages.Unsettled):
        return f"{peer} answered `{said.kind}`"
    return {
        "under-way": f"{peer} does not know yet",
        "gone": f"{peer} took the VM and lost its QEMU: the copy here is the last one, as of the switch-over",
        "unknown": f"{peer} does not know this migration",
    }[said.reason] + (f": {said.detail}" if said.detail else "")


def check_word(request: ResolveRequest, said: messages.Answer | None, why: str) -> None:
    """Raise where the operator's word could make two copies, or end the last one."""
    owns = request.decision == "own-here"
    is_last = isinstance(said, messages.Promise) or (isinstance(said, messages.Unsettled) and said.reason == "gone")
    if owns and isinstance(said, messages.Ran):
        raise ControlError("resolve.against-the-answer", f"{why}: the VM has run there, and taking it back makes two")
    if not owns and is_last:
        raise ControlError("resolve.against-the-answer", f"{why}: ending the copy here would end the VM")
    if isinstance(said, messages.Ran) or is_last or request.i_have_looked:
        return
    raise make_error("resolve.could-make-two" if owns else "resolve.could-lose-it", why)


def resolution_of(
    decision: str, by: str, said: messages.Answer | None, words: str, user: str | None = None
) -> Resolution:
    """What was decided now, by whom, and what the other end had answered."""
    answer = "none" if said is None else said.reason if isinstance(said, messages.Unsettled) else said.kind
    facts = {"decision": decision, "by": by, "answer": answer, "words": words, "user": user, "at": utc_now()}
    return Resolution.model_validate(facts)


def _problem(happened: Input, resolution: Resolution) -> Problem | None:
    if happened is Input.REFUSED:
        return problem_of(make_error("handover.refused", resolution.words))
    if happened is Input.OWN_HERE:
        return problem_of(make_error("handover.operator", resolution.words))
    return None
