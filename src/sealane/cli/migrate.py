"""`sealane migrate`: move a running VM, and follow it until it is known where it runs.

Ctrl-C asks the agent to cancel and waits for the outcome; a second Ctrl-C leaves the migration to the agent.
"""

import shlex
import time
from typing import Final, cast

import typer
from pydantic import ValidationError

from sealane.cli import format as words
from sealane.cli import migrate_options as options
from sealane.cli.client import AgentClient, AgentGone, error_of
from sealane.cli.migrate_options import CopyChoice, StallPolicy
from sealane.cli.output import Output, command
from sealane.cli.screen import Screen, make_screen
from sealane.cli.words import copied, headline, where
from sealane.errors import SealaneError, UsageError, make_error
from sealane.host.models import Migration, MigrationRequest, Problem, Protection
from sealane.limits import GIVE_UP_AFTER_S, THROTTLE_MAX_PERCENT
from sealane.seal.protect import SEALED

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# How long an agent that went away is waited for: systemd restarts one within a second.
REATTACH_TRIES: Final = 6
REATTACH_PAUSE_S: Final = 0.5
_INTERRUPTED: Final = 130


@app.command()
@command
def migrate(  # noqa: PLR0913 - one parameter for each option
    vm: options.VmArgument,
    host: options.HostArgument,
    *,
    multifd: options.Multifd = None,
    no_multifd: options.NoMultifd = False,
    max_bandwidth: options.MaxBandwidth = None,
    downtime_limit: options.DowntimeLimit = None,
    switchover_hook: options.SwitchoverHook = None,
    on_stall: options.OnStall = StallPolicy.GIVE_UP,
    give_up_after: options.GiveUpAfter = GIVE_UP_AFTER_S,
    max_throttle: options.MaxThrottle = None,
    priority: options.Priority = None,
    time_limit: options.TimeLimit = None,
    undefine_source: options.UndefineSource = False,
    copy_storage: options.CopyStorage = CopyChoice.NONE,
    no_reduce: options.NoReduce = False,
    protection: options.ProtectionName = SEALED,
    i_know_this_is_weak: options.KnowsWeak = False,
    detach: options.Detach = False,
    out: Output,
) -> None:
    """Move a running VM to another host.

    Exits with 0 only when the VM runs at the destination (with --detach: when the agent has begun).
    Ctrl-C cancels and waits for the outcome; a second Ctrl-C leaves the migration to the agent.

    \b
    Example:
      sealane migrate web01 host-b
      sealane migrate web01 host-b --multifd 4 --max-bandwidth 10Gb/s
    """
    if no_multifd and multifd is not None:
        raise UsageError("usage.argument", "--multifd and --no-multifd exclude each other")
    if max_throttle is not None and on_stall is not StallPolicy.AUTO_CONVERGE:
        raise UsageError("usage.argument", "--max-throttle needs --on-stall auto-converge")
    try:
        request = MigrationRequest(
            vm=vm,
            host=host,
            multifd_channels=0 if no_multifd else multifd,
            max_bandwidth_bytes_per_s=None if max_bandwidth is None else words.parse_rate(max_bandwidth),
            downtime_limit_ms=downtime_limit,
            switchover_hook=None if switchover_hook is None else _hook(switchover_hook),
            on_stall=on_stall.value,
            give_up_after_s=give_up_after,
            throttle_max_percent=THROTTLE_MAX_PERCENT if max_throttle is None else max_throttle,
            reduce=not no_reduce,
            undefine_source=undefine_source,
            copy_storage=copy_storage.value,
            protection=cast(Protection, protection),  # the model judges it
            i_know_this_is_weak=i_know_this_is_weak,
            priority=priority,
            time_limit_s=time_limit,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("usage.argument", f"{first['loc'][0]} does not fit: {first['msg']}") from error
    with AgentClient() as agent:
        status = run(agent, request, out, detach=detach)
    raise typer.Exit(status)


def run(agent: AgentClient, request: MigrationRequest, out: Output, *, detach: bool) -> int:
    """Start the migration, follow it unless `detach`, and give the exit status."""
    try:
        migration = agent.start_migration(request)
    except SealaneError as error:
        out.error(error, headline=_refusal(agent, request.vm, error), more={"vm": request.vm, "host": request.host})
        return error.exit_status
    except KeyboardInterrupt:
        out.note(f"? interrupted while the agent was asked; whether it began is told by: sealane status {request.vm}")
        return _INTERRUPTED
    out.detail(f"migration {migration.number} ({migration.id})")
    if detach:
        out.object({"type": "state", "migration": migration.model_dump(mode="json")})
        out.line(
            f"migration {migration.number} of {migration.vm} to {migration.peer} goes on: sealane status {migration.vm}"
        )
        return 0
    with make_screen(out) as screen:
        return Follower(agent, migration, screen, out).follow()


class Follower:
    """One migration from its start to its known end, through a lost agent and the user's Ctrl-C."""

    def __init__(self, agent: AgentClient, migration: Migration, screen: Screen, out: Output) -> None:
        self.agent = agent
        self.latest = migration
        self.screen = screen
        self.out = out
        self.cancel_asked = False
        self.tries_left = REATTACH_TRIES

    def follow(self) -> int:
        """Follow to the end and give the exit status."""
        while True:
            try:
                self._watch()
                return self._finish()
            except KeyboardInterrupt:
                status = self._interrupted()
            except AgentGone as error:
                status = self._agent_gone(error)
            except SealaneError as error:
                status = self._lost_sight(error)
            if status is not None:
                return status

    def _watch(self) -> None:
        for event in self.agent.events(self.latest.id):
            self.latest = event.migration
            self.tries_left = REATTACH_TRIES
            self.out.object(event.model_dump(mode="json"))
            self.screen.show(event.migration)

    def _finish(self) -> int:
        """Say how it ended; success is only what the agent called completed with the VM at the destination."""
        migration = self.latest
        if migration.state == "completed" and migration.runs_at == "destination":
            self.screen.success(migration)
            return 0
        self.screen.stop()
        error = _ending(migration)
        self.out.error(error, headline=headline(migration), more=_facts(migration))
        return error.exit_status

    def _interrupted(self) -> int | None:
        """Ctrl-C: the first asks for the end, the second leaves; None goes on watching."""
        if self.cancel_asked:
            return self._detach()
        self.cancel_asked = True
        try:
            self.screen.say(
                f"cancelling; waiting for where {self.latest.vm} runs (Ctrl-C again leaves it to the agent)"
            )
            self.agent.cancel(self.latest.id)
        except KeyboardInterrupt:
            return self._detach()
        except SealaneError as error:
            self.screen.say(f"not cancelled: {error.detail} ({error.code})")
        return None

    def _detach(self) -> int:
        if self.latest.runs_at == "in-doubt":
            return self._finish()
        self.screen.stop()
        migration = self.latest
        self.out.object({"type": "detached", "migration": migration.model_dump(mode="json")})
        self.out.note(f"? left to the agent; when last seen, {where(migration)}: sealane status {migration.vm}")
        return _INTERRUPTED

    def _agent_gone(self, error: AgentGone) -> int | None:
        """Look for the agent for a while: it may have been restarted, and knows then what became of the VM."""
        try:
            while self.tries_left:
                self.tries_left -= 1
                try:
                    self.latest = self.agent.migration(self.latest.id)
                except SealaneError as refusal:
                    if refusal.code != "agent.unreachable":
                        return self._lost_sight(refusal)
                    time.sleep(REATTACH_PAUSE_S)
                    continue
                self.screen.say("the agent closed the connection and is there again; following on")
                time.sleep(REATTACH_PAUSE_S)
                return None
        except KeyboardInterrupt:
            pass
        return self._lost_sight(error)

    def _lost_sight(self, error: SealaneError) -> int:
        """The agent cannot say what became of the migration: neither can this."""
        self.screen.stop()
        migration = self.latest
        done = copied(migration)
        share = "" if done is None else f" at {done} %"
        line = f"? unknown{share}: {migration.vm} may run here or on {migration.peer}"
        told = make_error(
            error.code,
            f"{error.detail}; the migration was {migration.state} when last seen, and may go on without this command",
            mend=f"start the agent if it is down, then `sealane status {migration.vm}` here and on {migration.peer}",
        )
        self.out.error(told, headline=line, more={**_facts(migration), "runs_at": "unknown"})
        return told.exit_status


def _ending(migration: Migration) -> SealaneError:
    """Why it did not succeed; the state decides where the agent gave no reason."""
    if migration.state == "in-doubt" or migration.runs_at == "in-doubt":
        detail = migration.problem.detail if migration.problem is not None else migration.detail
        return make_error("handover.in-doubt", detail, mend=_mend(migration.problem))
    if migration.problem is not None:
        return error_of(migration.problem)
    detail = migration.detail or f"the migration ended as {migration.state} without a reason"
    return make_error("internal.error", detail)


def _mend(problem: Problem | None) -> str | None:
    return problem.mend or None if problem is not None and problem.code == "handover.in-doubt" else None


def _facts(migration: Migration) -> dict[str, object]:
    return {
        "vm": migration.vm,
        "host": migration.peer,
        "migration": migration.id,
        "state": migration.state,
        "runs_at": migration.runs_at,
    }


def _refusal(agent: AgentClient, vm: str, error: SealaneError) -> str:
    """The first line of a migration that was not begun: where the VM is, as far as the agent knows."""
    if isinstance(error, AgentGone):
        return f"? unknown whether it began; {vm} may run here or be on its way"
    if error.code in {"agent.unreachable", "host.permission"}:
        return f"nothing was begun; {vm} is where it was"
    try:
        state = agent.vm(vm).state
    except SealaneError:
        return f"refused before anything moved; {vm} was not touched"
    place = {
        "running": f"{vm} still runs here",
        "paused": f"{vm} is still here, paused",
        "in-doubt": f"{vm} is paused here and may run elsewhere",
        "absent": f"{vm} does not run here",
    }.get(state, f"{vm} was not touched")
    return f"refused before anything moved; {place}"


def _hook(text: str) -> list[str]:
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise UsageError("usage.argument", f"the hook's quotes do not match ({error})") from error
    if not parts:
        raise UsageError("usage.argument", "the hook is empty")
    return parts
