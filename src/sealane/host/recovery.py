"""What an agent does with the migrations that no job runs and nobody has ended.

A previous agent left them, or a job of this one that could not do its last step (`Job.leave`).

    role         journalled state                        what is done
    source       queued                                  nothing was done for it: aborted
    source       preparing, copying, switching-over      reclaim: cancel in QEMU, let the VM run again, aborted
    source       aborted, but not ended                  the same: QEMU did not let the VM run again when it was asked; one that
                                                         believes in postcopy is asked only where the destination refused
    source       handing-over, in-doubt                  the VM stays paused: in-doubt; one that runs was refused: aborted
    source       completed, but not ended                the receipt came: end the copy that QEMU says it sent away, or its half
                 (`doubts` and `halves` journal `aborted` and `completed` so, when it is known how it ends)
    source       postcopy, postcopy-paused               join the halves again (`rejoin`); QEMU keeps its own meanwhile;
                                                         one that runs was refused: aborted
    destination  preparing, copying, switching-over      destroy the launched QEMU, aborted; but where a ticket to switch to
                                                         postcopy is held and QEMU has switched: as postcopy
    destination  postcopy, postcopy-paused               keep the half, until the source joins the other one; the VM runs on
                                                         it where it did, where its lanes hold without an agent, and as soon
                                                         as all of it is here
    destination  aborted, but not ended                  the same: the launched QEMU could not be destroyed
    destination  handing-over                            the ticket is ours: resume, completed
    destination  completed, but not ended                an operator gave its half up (`halves`): destroy the launched QEMU

What cannot be settled now (a QEMU that does not answer) keeps its state and holds its VM; `recover` is then called again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Final, cast

import structlog

from sealane.errors import SealaneError, make_error
from sealane.host.jobs import Jobs
from sealane.host.migration import settings
from sealane.host.migration.postcopy_destination import ANSWERS_WITHIN_S, has_switched
from sealane.host.migration.refused import run_where_refused
from sealane.host.migration.volumes import remove_volumes
from sealane.host.models import Migration, RunsAt
from sealane.host.problems import problem_of
from sealane.host.registry import is_absent
from sealane.host.store import JournalEntry, Store, utc_now
from sealane.hypervisor.launch import destroy
from sealane.hypervisor.process import start_time_ticks
from sealane.hypervisor.qmp import QmpMachine
from sealane.hypervisor.stranded import is_stranded
from sealane.hypervisor.unshared import IN_POSTCOPY as KEEPS_HALF
from sealane.libvirt.domains import is_domain
from sealane.libvirt.machine import DomainMachine, MigrationDirectory, destroy_incoming_domain, open_domain
from sealane.limits import QMP_TIMEOUT_S
from sealane.session.handover import ENDED, IN_POSTCOPY

_log = structlog.get_logger()

# Where QEMU itself stopped the guest for a migration; `paused` is ours only if we journalled the switch-over.
STOPPED_BY_MIGRATION: Final = frozenset({"finish-migrate", "postmigrate"})
# What a QEMU says of its migration that was never told to switch to postcopy, or could not.
_NOT_SWITCHED: Final = frozenset({"pre-switchover", "failed", "cancelled"})


class Recovery:
    """Settles what a previous agent left; `find_qmp` gives a VM's socket where the journal does not."""

    def __init__(
        self,
        store: Store,
        jobs: Jobs,
        find_qmp: Callable[[str], str | None],
        *,
        qmp_timeout_s: float = QMP_TIMEOUT_S,
        rejoin: Callable[[Migration], object] = lambda migration: None,
    ) -> None:
        """`rejoin` is given a source's postcopy that an earlier agent left, to go on with it."""
        self._rejoin = rejoin
        self._store, self._jobs = store, jobs
        self._find_qmp = find_qmp
        self._qmp_timeout_s = qmp_timeout_s
        self._settled: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._inherited = {entry.migration.id for entry in store.unfinished()}
        for entry in store.unfinished():
            jobs.adopt(entry)
            MigrationDirectory.remove(entry.migration.id)

    def _open(self) -> list[JournalEntry]:
        """All but what is in doubt, or in two halves, and was looked at: of that only the peer or a person knows more."""
        return [entry for entry in self._jobs.left_over() if not self._is_settled(entry.migration)]

    def _is_settled(self, migration: Migration) -> bool:
        return migration.state in {"in-doubt", *IN_POSTCOPY} and migration.id in self._settled

    def lock(self, migration_id: str) -> asyncio.Lock:
        """Held by whoever changes where this migration stands."""
        return self._locks.setdefault(migration_id, asyncio.Lock())

    @property
    def is_done(self) -> bool:
        """Whether everything has been settled."""
        return not self._open()

    async def recover(self) -> list[Migration]:
        """One attempt at all that is open, all at once; returns what was settled. Never raises for one of them."""
        settled = await asyncio.gather(*(self.settle(entry.migration.id) for entry in self._open()))
        return [migration for migration in settled if migration is not None]

    async def settle(self, migration_id: str) -> Migration | None:
        """One attempt at this migration, if it is open; None where it is not, or could not be settled yet."""
        async with self.lock(migration_id):
            entry = next((each for each in self._open() if each.migration.id == migration_id), None)
            settled = None if entry is None else await self._settle(entry)
        if settled is not None and settled.state in ENDED:
            self._locks.pop(migration_id, None)
        return settled

    async def look_again(self, migration_id: str) -> None:
        """Settle what may have been looked at before, and rests in doubt or in two halves; nothing is begun again for it."""
        self._settled.discard(migration_id)
        self._inherited.discard(migration_id)
        await self.settle(migration_id)

    async def is_whole(self, entry: JournalEntry, *, is_promised: bool = False) -> bool:
        """Whether this source of a parted postcopy has the whole VM: its QEMU has made no switch, and can run the VM again; or
        has made one that nothing came of, `is_promised` by the destination (`refused`).

        Not where that QEMU is gone; raises `vm.unreachable` where it does not say.
        """
        try:
            async with self._machine(entry) as machine:
                return await _is_whole(machine) or (is_promised and await _keeps_half(machine))
        except SealaneError as error:
            if not is_absent(error):
                raise
            return False

    async def _settle(self, entry: JournalEntry) -> Migration | None:
        log = _log.bind(migration=entry.migration.id[:8], vm=entry.migration.vm, role=entry.migration.role)
        try:
            action = _ACTIONS[entry.migration.role, entry.migration.state]
            looked = await action(self, entry)
            if self._jobs.job(entry.migration.id) is not None:
                return None  # its source came back meanwhile, and a job goes on with it
            migration = self._jobs.settle(looked)
        except SealaneError as error:
            log.warning("not recovered yet", code=error.code, detail=error.detail)
            return None
        except Exception:
            log.exception("not recovered yet")
            return None
        finally:
            self._jobs.looked_at(entry.migration.id)
        if migration.state not in ENDED:
            self._settled.add(migration.id)
        if migration.role == "source" and migration.state in IN_POSTCOPY and migration.id in self._inherited:
            self._begin_again(migration, log)
        log.info("recovered", state=migration.state, runs_at=migration.runs_at, detail=migration.detail)
        return migration

    def _machine(self, entry: JournalEntry) -> AbstractAsyncContextManager[QmpMachine]:
        path = entry.qmp or self._find_qmp(entry.migration.vm)
        if path is None:
            missing = make_error("vm.unreachable", f"{entry.migration.vm} is not known here any more")
            missing.__cause__ = FileNotFoundError()
            raise missing
        if is_domain(path):
            return cast(AbstractAsyncContextManager[QmpMachine], open_domain(path))  # as far as it is used here
        return QmpMachine.take_up(path, entry.launched, self._qmp_timeout_s)

    async def _reclaim(self, entry: JournalEntry) -> Migration:
        ours = STOPPED_BY_MIGRATION | ({"paused"} if entry.migration.state in {"switching-over", "aborted"} else set())
        try:
            async with self._machine(entry) as machine:
                if await run_where_refused(machine, self._store, entry.migration.id):
                    return _aborted(entry, "source", "the VM runs here again")
                await machine.cancel_migration()
                run_state = await machine.run_state()
                if run_state in ours:
                    await machine.resume()
                    run_state = await machine.run_state()
                await settings.restore(machine, entry.qemu_before)
        except SealaneError as error:
            if not is_absent(error):
                raise
            return _aborted(entry, "nowhere", "its QEMU is gone")
        return _aborted(entry, "source", f"the VM is {run_state}")

    def _begin_again(self, migration: Migration, log: Any) -> None:
        """Once for each agent: what a job of this one could not join waits for the next agent, or a person."""
        self._inherited.discard(migration.id)
        try:
            self._rejoin(migration)
        except SealaneError as error:
            log.warning("nobody joins the halves again", code=error.code, detail=error.detail)

    async def _keep_half(self, entry: JournalEntry) -> Migration:
        """Ended or run again, the VM would be lost, or there twice: what runs at the destination lacks what is here.

        One that runs was refused by the destination, and taken back, and that could not be journalled.
        """
        if await self._runs_again(entry):
            return _aborted(entry, "source", "the VM runs here again")
        problem = entry.migration.problem or problem_of(
            make_error("migration.postcopy-paused", "the agent was restarted")
        )
        return _changed(entry, state="postcopy-paused", runs_at="destination", problem=problem)

    async def _run_on_half(self, entry: JournalEntry) -> Migration:
        """A VM that was not yet let run waits for the other half, unless its lanes hold (`Outlive`): at the first page that does
        not come QEMU itself might stand still.
        """
        problem = entry.migration.problem or problem_of(
            make_error("migration.postcopy-paused", "the agent was restarted")
        )
        try:
            async with self._machine(entry) as machine:
                status = await _status_of(machine)
                if status in {"completed", "postcopy-active"} and await machine.run_state() != "running":
                    await machine.resume()
                if status == "completed":
                    await machine.end_loan()
                    await settings.restore(machine, entry.qemu_before)
                    detail = "all of its memory is here"
                    return _changed(entry, state="completed", runs_at="destination", problem=None, detail=detail)
        except SealaneError as error:
            if not is_absent(error):
                raise
            detail = "the VM was ours, and its QEMU is gone"
            return _changed(entry, state="completed", runs_at="nowhere", problem=problem_of(error), detail=detail)
        detail = "a part of the VM's memory is still at the source, which joins it again"
        if status == "postcopy-active":
            detail = "the rest of the VM's memory comes in by lanes that held without the agent; then the source asks"
        return _changed(entry, state="postcopy-paused", runs_at="destination", problem=problem, detail=detail)

    async def _destroy_or_switch(self, entry: JournalEntry) -> Migration:
        """A ticket to switch to postcopy is in the entry; whether QEMU has switched, only QEMU knows."""
        if entry.migration.epoch is not None and await self._has_switched(entry):
            # the journal first, and the VM's epoch with it
            switched = _changed(entry, state="postcopy", runs_at="destination")
            self._store.journal(switched, epoch=entry.migration.epoch)
            return await self._run_on_half(replace(entry, migration=switched))
        return await self._destroy(entry)

    async def _has_switched(self, entry: JournalEntry) -> bool:
        try:
            async with self._machine(entry) as machine:
                return await has_switched(machine)
        except SealaneError as error:
            if not is_absent(error):
                raise
            return False

    async def _unqueue(self, entry: JournalEntry) -> Migration:
        problem = problem_of(make_error("queue.lost"))
        return _changed(entry, state="aborted", runs_at="source", problem=problem, queue=None, detail="")

    async def _keep_in_doubt(self, entry: JournalEntry) -> Migration:
        """Only the destination's refusal, or a person, makes a released VM run here: then there is no doubt left."""
        if await self._runs_again(entry):
            return _aborted(entry, "source", "the VM runs here again")
        problem = entry.migration.problem or problem_of(make_error("handover.in-doubt"))
        return _changed(entry, state="in-doubt", runs_at="in-doubt", problem=problem)

    async def _runs_again(self, entry: JournalEntry) -> bool:
        """Whether the copy that was sent away runs; a VM that was started anew on its socket is not that, and settles nothing."""
        with contextlib.suppress(SealaneError):
            async with self._machine(entry) as machine:
                if await machine.run_state() == "running":
                    if await _was_started_anew(machine):
                        _log.warning(
                            "a VM was started anew where a copy was kept that may run elsewhere",
                            migration=entry.migration.id[:8],
                            vm=entry.migration.vm,
                        )
                        return False
                    await settings.restore(machine, entry.qemu_before)
                    return True
        return False

    async def _end_copy(self, entry: JournalEntry) -> Migration:
        """Whatever else was started on the VM's socket meanwhile is left alone."""
        detail = entry.migration.detail
        try:
            async with self._machine(entry) as machine:
                is_given_up = entry.migration.resolution is not None and await _is_whole(machine)
                if is_given_up or await machine.run_state() == "postmigrate" or await _keeps_half(machine):
                    await machine.quit()
                elif entry.migration.runs_at == "nowhere":
                    detail = f"{detail}; but the QEMU that is here keeps no half, and was left alone"
        except SealaneError as error:
            if not is_absent(error):
                raise
        return _changed(entry, state="completed", detail=detail)

    async def _end_half(self, entry: JournalEntry) -> Migration:
        await self._destroy_launched(entry)
        return _changed(entry, state="completed")

    async def _destroy(self, entry: JournalEntry) -> Migration:
        await self._destroy_launched(entry)
        return _aborted(entry, "source", "what was launched here is gone")

    async def _destroy_launched(self, entry: JournalEntry) -> None:
        path = entry.qmp or self._find_qmp(entry.migration.vm)
        if path and is_domain(path):
            await destroy_incoming_domain(path, entry.migration.state)
            await asyncio.to_thread(remove_volumes, entry.migration.volumes)
        elif entry.launched:
            await destroy(entry.launched.pid, entry.launched.start_time_ticks, qmp_path=path)
        elif path:
            await self._destroy_unjournalled(path)

    async def _destroy_unjournalled(self, path: str) -> None:
        """The agent died between the launch and its journalling: what waits on the VM's socket for a migration is it."""
        try:
            async with QmpMachine.connect(path, self._qmp_timeout_s) as machine:
                waits = await machine.run_state() == "inmigrate"
                pid, ticks = machine.pid, start_time_ticks(machine.pid)
        except SealaneError as error:
            if not is_absent(error):
                raise
            return
        if waits and pid and ticks is not None:
            await destroy(pid, ticks, qmp_path=path)

    async def _take_over(self, entry: JournalEntry) -> Migration:
        try:
            async with self._machine(entry) as machine:
                if await machine.run_state() != "running":
                    await machine.resume()
                await settings.restore(machine, entry.qemu_before)
        except SealaneError as error:
            if not is_absent(error):
                raise
            detail = "the VM was ours, and its QEMU is gone"
            return _changed(entry, state="completed", runs_at="nowhere", problem=problem_of(error), detail=detail)
        return _changed(entry, state="completed", runs_at="destination", detail="resumed after the agent's restart")


async def _status_of(machine: QmpMachine) -> str:
    """What QEMU says of its migration; "" where it waits for a page itself, and says nothing."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            return (await machine.migration_status()).status
    except TimeoutError:
        return ""


async def _was_started_anew(machine: QmpMachine | DomainMachine) -> bool:
    """Whether this QEMU has never sent a VM away, or this domain of libvirt was not paused since its start."""
    if isinstance(machine, DomainMachine):
        return await machine.was_started_anew()
    return (await machine.migration_status()).status == "none"


async def _keeps_half(machine: QmpMachine) -> bool:
    """No domain of libvirt goes by postcopy; and a VM that runs is no half, whatever its QEMU believes (`unshared`)."""
    if not isinstance(machine, QmpMachine) or (await machine.migration_status()).status not in KEEPS_HALF:
        return False
    return await machine.run_state() != "running"


async def _is_whole(machine: QmpMachine) -> bool:
    """Whether QEMU has made no switch, and has the VM paused; a VM that was started anew is not that."""
    if not isinstance(machine, QmpMachine):
        return False
    if (await machine.migration_status()).status not in _NOT_SWITCHED and not await is_stranded(machine):
        return False
    return await machine.run_state() in STOPPED_BY_MIGRATION | {"paused"}


def _changed(entry: JournalEntry, **changes: Any) -> Migration:
    migration = Migration.model_validate({**entry.migration.model_dump(), **changes})
    return migration.model_copy(update={"ended_at": utc_now()}) if migration.state in ENDED else migration


def _aborted(entry: JournalEntry, runs_at: RunsAt, detail: str) -> Migration:
    problem = entry.migration.problem or problem_of(make_error("agent.restarted"))
    return _changed(entry, state="aborted", runs_at=runs_at, problem=problem, detail=detail)


_ACTIONS: Final[Mapping[tuple[str, str], Callable[[Recovery, JournalEntry], Awaitable[Migration]]]] = {
    ("source", "queued"): Recovery._unqueue,
    **{("source", state): Recovery._reclaim for state in ("preparing", "copying", "switching-over", "aborted")},
    **{("source", state): Recovery._keep_in_doubt for state in ("handing-over", "in-doubt")},
    ("source", "completed"): Recovery._end_copy,
    **{("source", state): Recovery._keep_half for state in IN_POSTCOPY},
    **{("destination", state): Recovery._destroy for state in ("preparing", "copying", "aborted")},
    ("destination", "switching-over"): Recovery._destroy_or_switch,
    **{("destination", state): Recovery._run_on_half for state in IN_POSTCOPY},
    **{("destination", state): Recovery._take_over for state in ("handing-over", "in-doubt")},
    ("destination", "completed"): Recovery._end_half,
}
