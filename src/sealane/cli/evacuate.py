"""`sealane evacuate`: move all VMs of this host, or those that are named, to others, with one view of them all.

Ctrl-C keeps here what waits and lets what moves arrive; a second one cancels what moves too and waits for the outcomes; a third
one leaves it to the agent.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import typer

from sealane.cli.client import AgentClient, AgentGone
from sealane.cli.completion import host_names, vm_names
from sealane.cli.evacuation_screen import Screen, make_screen
from sealane.cli.output import Output, command
from sealane.cli.words import ENDED, headline, reason
from sealane.errors import ControlError, SealaneError, UsageError, make_error
from sealane.host.models import Migration, MigrationRequest, PeerView, Vm

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# An agent that is restarted is there again within a second; one that is upgraded may take longer.
REATTACH_TRIES: Final = 20
REATTACH_PAUSE_S: Final = 0.5
# What was refused for a reason that passes is asked for again, after a pause that grows.
ROUNDS_MAX: Final = 5
ROUND_PAUSE_S: Final = 1.0
PASSING: Final = frozenset(
    {"peer.busy", "peer.rate", "queue.full", "agent.stopping", "agent.restarted", "queue.changed", "queue.lost"}
)
_INTERRUPTED: Final = 130
_INTERRUPTS_MAX: Final = 2

Outcome = Literal["going", "arrived", "stayed", "in-doubt", "unknown"]


@dataclass
class Departure:
    """One VM of an evacuation: where to, and how far it has come. Without a migration it never left, for `error`."""

    vm: Vm
    host: str | None
    migration: Migration | None = None
    error: SealaneError | None = None
    rounds: int = 0

    @property
    def outcome(self) -> Outcome:
        """How it stands; `stayed` says that the VM was not moved, not that it is well."""
        migration = self.migration
        if migration is None:
            return "going" if self.error is None else "stayed"
        if migration.state == "in-doubt" or migration.runs_at == "in-doubt":
            return "in-doubt"
        if migration.state == "completed" and migration.runs_at == "destination":
            return "arrived"
        if migration.state in ENDED:
            return "stayed"
        return "going" if self.error is None else "unknown"

    @property
    def why(self) -> str:
        """Why the VM did not arrive, with the code."""
        if self.migration is not None and self.migration.problem is not None:
            return reason(self.migration.problem)
        return "" if self.error is None else f"{self.error.detail} ({self.error.code})"

    @property
    def code(self) -> str | None:
        """The code of what kept it."""
        if self.migration is not None and self.migration.problem is not None:
            return self.migration.problem.code
        return None if self.error is None else self.error.code

    def as_dict(self) -> dict[str, Any]:
        """Its line of the summary."""
        migration, result = self.migration, None if self.migration is None else self.migration.result
        return {
            "vm": self.vm.name,
            "host": self.host,
            "outcome": self.outcome,
            "runs_at": "source" if migration is None else migration.runs_at,
            "migration": None if migration is None else migration.id,
            "code": self.code,
            "detail": self.why or None,
            "total_ms": None if result is None else result.total_ms,
            "downtime_ms": None if result is None else result.downtime_ms,
        }


@app.command()
@command
def evacuate(
    hosts: Annotated[
        list[str],
        typer.Argument(
            metavar="HOST...",
            help="Where to; of several, each VM goes where policy and room let it.",
            autocompletion=host_names,
        ),
    ],
    *,
    vms: Annotated[
        list[str] | None,
        typer.Option("--vm", metavar="VM", help="This VM; may stand several times.", autocompletion=vm_names),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All VMs that run here.")] = False,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", metavar="N", min=1, max=256, help="How many move at once [default: as agent.toml]."),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority", metavar="N", min=-100, max=100, help="In the queue [default: each VM's in agent.toml, or 0]."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", metavar="S", min=1, max=604_800, help="Seconds each may take, the queue left out."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say who would go where, and move nothing.")] = False,
    out: Output,
) -> None:
    """Move VMs away from this host, several at once.

    Exits with 0 only when all of them run at their destinations. What cannot go runs on here, and the summary says why.
    Ctrl-C keeps here what waits, a second one cancels what moves, a third one leaves it to the agent.

    \b
    Example:
      sealane evacuate host-b --all
      sealane evacuate host-b host-c --vm web01 --vm db02 --parallel 2
    """
    if everything == bool(vms):
        raise UsageError("usage.argument", "say which VMs: either --all, or --vm VM as often as needed")
    with AgentClient() as agent:
        departures = plan(agent, hosts, None if everything else vms or [])
        for each in departures:
            out.object({"type": "plan", "vm": each.vm.name, "host": each.host, "code": each.code})
        if dry_run:
            status = _show_plan(departures, out)
        else:
            options = {"group_max": parallel or 0, "priority": priority, "time_limit_s": time_limit}
            with make_screen(out) as screen:
                status = Evacuation(agent, departures, screen, out, options=options).run()
    raise typer.Exit(status)


def plan(agent: AgentClient, hosts: Sequence[str], names: Sequence[str] | None) -> list[Departure]:
    """Who goes where: each VM to the host that policy allows and that is given the least memory so far.

    Without names: all VMs that are here. Raises `trust.unknown`, `vm.unknown`.
    """
    known = {view.name for view in agent.hosts()}  # those of a CA's fleet too
    for host in hosts:
        if host not in known:
            raise make_error("trust.unknown", f"{host} is not trusted")
    found = {vm.name: vm for vm in agent.vms()}
    if names is None:
        chosen = [vm for vm in found.values() if vm.state not in {"absent", "incoming"}]
    else:
        for name in names:
            if name not in found:
                raise make_error("vm.unknown", f"no VM is called {name}")
        chosen = [found[name] for name in dict.fromkeys(names)]
    given = dict.fromkeys(hosts, 0)
    return [_assign(agent, vm, given) for vm in chosen]


def _assign(agent: AgentClient, vm: Vm, given: dict[str, int]) -> Departure:
    if vm.state != "running":
        return Departure(vm, None, error=ControlError("vm.not-running", f"{vm.name} is {vm.state} here"))
    try:
        views = {view.name: view for view in agent.hosts(vm.name)}
    except SealaneError as error:
        return Departure(vm, None, error=error)
    refusals = {host: _why_not(views.get(host), host) for host in given}
    allowed = [host for host, refusal in refusals.items() if refusal is None]
    if not allowed:
        return Departure(vm, None, error=next(iter(refusals.values())))
    host = min(allowed, key=lambda each: given[each])  # the first named, where they are equal
    given[host] += vm.memory_bytes or 0
    return Departure(vm, host)


def _why_not(view: PeerView | None, host: str) -> SealaneError | None:
    if view is None:
        return make_error("trust.unknown", f"{host} is not trusted any more")
    if view.address is None:
        return make_error("trust.no-address", f"{host} has no address")
    decision = view.decision
    if decision is not None and decision.decision != "allow":
        return make_error(decision.code or "policy.denied", f"{host}: {decision.words}")
    return None


def _show_plan(departures: Sequence[Departure], out: Output) -> int:
    rows = [[each.vm.name, each.host or "-", each.why or "would go"] for each in departures]
    out.table(["VM", "HOST", "WHAT"], rows)
    return 0 if all(each.error is None for each in departures) else ControlError.exit_status


class Evacuation:
    """Several migrations from their start to their known ends, through a restarted agent and the user's Ctrl-C."""

    def __init__(
        self,
        agent: AgentClient,
        departures: Sequence[Departure],
        screen: Screen,
        out: Output,
        *,
        options: dict[str, Any] | None = None,
        pause_s: float = ROUND_PAUSE_S,
    ) -> None:
        self.agent, self.departures, self.screen, self.out = agent, list(departures), screen, out
        self.group = f"evacuation-{secrets.token_hex(4)}"
        self.options = options or {}
        self.interrupts = 0
        self._carried_out = 0
        self._pause_s = pause_s
        self._begun = time.monotonic()
        self._left = False
        self._lost = REATTACH_TRIES

    def run(self) -> int:
        """Begin all, follow all, sum up; gives the exit status."""
        while not self._left:
            try:
                self._carry_out_interrupt()
                if self._round():
                    break
            except KeyboardInterrupt:
                self.interrupts += 1
                self._left = self.interrupts > _INTERRUPTS_MAX
            except SealaneError as error:
                self._lose_sight(error)
        return self._finish()

    def _round(self) -> bool:
        """Ask for what is not asked for, and follow what is under way; True where nothing is left to do."""
        for departure in self.departures:
            if departure.migration is None and departure.error is None:
                self._begin(departure)
        self.screen.show(self.departures)
        if any(each.outcome == "going" for each in self.departures):
            self._follow()
        return not self._take_up_again()

    def _begin(self, departure: Departure) -> None:
        if self.interrupts:
            departure.error = make_error("migration.cancelled", "the evacuation was interrupted before it began")
            return
        try:
            departure.rounds += 1
            departure.migration = self.agent.start_migration(
                MigrationRequest.model_validate(
                    {"vm": departure.vm.name, "host": departure.host, "group": self.group, **self.options}
                )
            )
        except AgentGone:
            raise  # whether it began is found out when the agent is there again
        except SealaneError as error:
            if error.code == "agent.unreachable":
                raise
            departure.error = error

    def _follow(self) -> None:
        by_id = {each.migration.id: each for each in self.departures if each.migration is not None}
        for event in self.agent.group_events(self.group):
            departure = by_id.get(event.migration.id)
            if departure is None or departure.outcome != "going":
                continue
            self._lost = REATTACH_TRIES
            departure.migration = event.migration
            self.out.object(event.model_dump(mode="json"))
            self.screen.show(self.departures, changed=departure if event.type != "progress" else None)
        self._look_again()

    def _look_again(self) -> None:
        """What the agent says of each that was under way: an end may have come between two looks."""
        seen = {one.vm: one for one in self.agent.migrations() if one.group == self.group}
        for departure in self.departures:
            if departure.migration is None and departure.error is None:
                departure.migration = seen.get(departure.vm.name)  # its beginning was not answered
            elif departure.migration is not None and departure.outcome == "going":
                departure.migration = self.agent.migration(departure.migration.id)
                if departure.outcome != "going":
                    event = {"type": "end", "migration": departure.migration.model_dump(mode="json")}
                    self.out.object(event)
                    self.screen.show(self.departures, changed=departure)

    def _take_up_again(self) -> bool:
        """Whether some are to be asked for once more: what ended them passes."""
        again = [each for each in self.departures if self._may_try_again(each)]
        if not again:
            going = any(each.outcome == "going" for each in self.departures)
            if going:  # no job runs it, and the agent's recovery has not settled it yet
                time.sleep(self._pause_s)
            return going
        self.screen.say(f"{len(again)} are asked for again: {again[0].vm.name}: {again[0].why}")
        time.sleep(self._pause_s * max(each.rounds for each in again))
        for departure in again:
            departure.migration = departure.error = None
        return True

    def _may_try_again(self, departure: Departure) -> bool:
        return (
            departure.outcome == "stayed"
            and departure.code in PASSING
            and departure.rounds < ROUNDS_MAX
            and not self.interrupts
            and (departure.migration is None or departure.migration.runs_at == "source")
        )

    # Ctrl-C, and an agent that goes away

    def _carry_out_interrupt(self) -> None:
        """Cancel what the last Ctrl-C means; tried until the agent has heard it."""
        if self._carried_out == self.interrupts:
            return
        if self.interrupts == 1:
            self.screen.say("what waits stays here; what moves goes on (Ctrl-C again cancels it)")
        else:
            self.screen.say("cancelling what moves; waiting for where each runs (Ctrl-C again leaves it to the agent)")
        self._look_again()
        level = self.interrupts
        for departure in self.departures:
            self._cancel(departure, waiting_only=level == 1)
        self._carried_out = level

    def _cancel(self, departure: Departure, *, waiting_only: bool) -> None:
        migration = departure.migration
        if migration is None or departure.outcome != "going":
            return
        try:
            migration = self.agent.migration(migration.id)
            if migration.state == "queued" or not waiting_only:
                self.agent.cancel(migration.id)
        except SealaneError as error:
            if error.code not in {"migration.over", "migration.too-late"}:
                self.screen.say(f"{departure.vm.name} is not cancelled: {error.detail} ({error.code})")

    def _lose_sight(self, error: SealaneError) -> None:
        """An agent that stopped may be there again soon (an upgrade); it knows then what became of each VM."""
        while self._lost:
            self._lost -= 1
            try:
                time.sleep(REATTACH_PAUSE_S)
                self._look_again()
            except SealaneError as again:
                error = again
                continue
            self.screen.say("the agent was away and is there again; following on")
            return
        for departure in self.departures:
            if departure.outcome == "going":
                departure.error = error
        self._left = True

    # The end

    def _finish(self) -> int:
        self.screen.stop()
        by_outcome: dict[str, list[Departure]] = {}
        for each in self.departures:
            by_outcome.setdefault(each.outcome, []).append(each)
        counts = {name: len(by_outcome.get(name, [])) for name in ("arrived", "stayed", "in-doubt", "unknown", "going")}
        took = time.monotonic() - self._begun
        self.out.object(
            {"type": "summary", **counts, "took_s": round(took, 3), "vms": [each.as_dict() for each in self.departures]}
        )
        self.screen.summary(self.departures, took)
        for each in self.departures:
            if each.outcome == "in-doubt" and each.migration is not None:
                self.out.note(f"? {headline(each.migration)}")
        total = len(self.departures)
        if counts["arrived"] == total:
            return 0
        if counts["going"]:
            self.out.note(f"? {counts['going']} of {total} are left to the agent: sealane status")
            return _INTERRUPTED
        error = self._error(counts, total)
        words = f"{counts['arrived']} of {total} arrived; {counts['stayed']} stayed here"
        self.out.error(error, headline=words, more=counts)
        return error.exit_status

    def _error(self, counts: dict[str, int], total: int) -> SealaneError:
        if counts["in-doubt"]:
            return make_error("handover.in-doubt", f"{counts['in-doubt']} of {total} are in doubt")
        lost = next((each.error for each in self.departures if each.outcome == "unknown"), None)
        if lost is not None:
            return error_of_loss(lost)
        return make_error("evacuation.incomplete", "see the reason of each above; what did not go was not stopped")


def error_of_loss(error: SealaneError) -> SealaneError:
    """The agent cannot say what became of some."""
    detail = f"{error.detail}; what was under way may go on without this command"
    return make_error(error.code, detail, mend="start the agent if it is down, then `sealane status`")
