"""`sealane status`: the migrations under way and the last ones, why each ended, and where the VM runs."""

import re
from typing import Annotated, Final

import typer

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.completion import vm_names
from sealane.cli.output import Output, command
from sealane.cli.words import ENDED, channel_parts, headline, outcome, progress_parts, success_parts, warning, where
from sealane.errors import ControlError, SealaneError
from sealane.host.models import Migration

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# As many of the ended ones as fit a terminal; the agent remembers more, and --json shows them.
_ENDED_SHOWN: Final = 10


@app.command()
@command
def status(
    which: Annotated[
        str | None,
        typer.Argument(metavar="[VM|ID]", help="One VM, or one migration's number or id.", autocompletion=vm_names),
    ] = None,
    *,
    out: Output,
) -> None:
    """Show the migrations under way and the last ones, and where each VM runs.

    \b
    Example:
      sealane status
      sealane status web01
    """
    with AgentClient() as agent:
        chosen = agent.migrations() if which is None else _chosen(agent, which)
    for migration in chosen:
        out.object(migration.model_dump(mode="json"))
    if which is not None and chosen:
        _show_one(chosen[-1], out)
        chosen = chosen[:-1]
    _show_table(chosen, out, alone=which is None)


def find_migration(agent: AgentClient, which: str, *, active: bool) -> Migration:
    """The one migration that is meant; of a VM the newest, or with `active` the one under way. Raises ControlError."""
    found = _chosen(agent, which)
    under_way = [one for one in found if one.state not in ENDED]
    if active and under_way:
        return under_way[-1]
    if active and found:
        raise ControlError("migration.over", f"no migration of {found[-1].vm} is under way; {where(found[-1])}")
    if not found:
        raise ControlError("migration.unknown", f"no migration of {which} is under way")
    return found[-1]


def _chosen(agent: AgentClient, which: str) -> list[Migration]:
    """The migrations of a VM, oldest first, or the one of that number, id or beginning of an id."""
    of_vm = agent.migrations(vm=which)
    if of_vm:
        return sorted(of_vm, key=lambda one: one.number)
    try:
        return [agent.migration(which)]
    except SealaneError as error:
        if error.code != "migration.unknown" or re.fullmatch(r"[0-9]+|[0-9a-f]{32}", which):
            raise
    agent.vm(which)  # raises vm.unknown
    return []


def _show_one(migration: Migration, out: Output) -> None:
    direction = "to" if migration.role == "source" else "from"
    out.line(f"{migration.vm} {direction} {migration.peer}, migration {migration.number}")
    ended = migration.ended_at
    facts = {
        "runs": where(migration),
        "state": migration.state,
        "started": words.ago(migration.started_at),
        "took": None if ended is None else words.duration((ended - migration.started_at).total_seconds()),
        "copy": " · ".join(progress_parts(migration)) if ended is None else None,
        "figures": " · ".join(success_parts(migration)) if migration.state == "completed" else None,
        "readable": None if migration.readable == "nothing" else warning(migration),
        "channel": " · ".join([migration.protection, *channel_parts(migration)]),
        "ended": None if migration.state == "completed" or migration.problem is None else headline(migration),
        "why": None if migration.problem is None else f"{migration.problem.detail} ({migration.problem.code})",
        "mend": None if migration.problem is None else migration.problem.mend,
        "now": migration.detail if ended is None else None,
        "id": migration.id,
    }
    for label, value in facts.items():
        if value:
            out.line(f"  {label:<9} {value}")


def _show_table(migrations: list[Migration], out: Output, *, alone: bool) -> None:
    ordered = sorted(migrations, key=lambda one: one.number, reverse=True)
    under_way = [one for one in ordered if one.state not in ENDED]
    over = [one for one in ordered if one.state in ENDED]
    if not ordered:
        if alone:
            out.line("no migration is remembered here")
        return
    if not alone:
        out.line("before it")
    rows = [_row(one) for one in [*under_way, *over[:_ENDED_SHOWN]]]
    out.table(["NO", "VM", "HOST", "STARTED", "VM RUNS", "STATE"], rows)
    if len(over) > _ENDED_SHOWN:
        out.line(f"and {len(over) - _ENDED_SHOWN} before (--json shows all)")


def _row(migration: Migration) -> list[str]:
    arrow = "→" if migration.role == "source" else "←"
    if migration.runs_at in {"nowhere", "in-doubt"}:
        place: str = migration.runs_at
    else:
        place = "here" if migration.runs_at == migration.role else f"on {migration.peer}"
    if migration.problem is not None and migration.problem.code == "vm.unreachable" and place == "here":
        place = "no answer"
    return [
        str(migration.number),
        migration.vm,
        f"{arrow} {migration.peer}",
        words.ago(migration.started_at),
        place,
        outcome(migration),
    ]
