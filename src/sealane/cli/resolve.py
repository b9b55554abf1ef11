"""`sealane resolve`: end the doubt about a VM that is paused here and may run at its destination, or see to parted halves."""

import sys
from typing import Annotated, Literal

import typer

from sealane.cli.client import AgentClient
from sealane.cli.completion import moving_names
from sealane.cli.output import Output, command, is_terminal
from sealane.cli.status import find_migration
from sealane.cli.words import ENDED, where
from sealane.errors import ControlError, SealaneError, UsageError
from sealane.host.models import Migration, ResolveRequest

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Decision = Literal["ask", "own-here", "drop-here"]


@app.command()
@command
def resolve(
    which: Annotated[
        str,
        typer.Argument(metavar="VM|ID", help="The VM, or the migration's number or id.", autocompletion=moving_names),
    ],
    *,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask the destination now, and do as its journal says; or join the halves.")
    ] = False,
    own_here: Annotated[
        bool, typer.Option("--own-here", help="The VM is this host's: it runs on here, as of the switch-over.")
    ] = False,
    drop_here: Annotated[
        bool, typer.Option("--drop-here", help="The VM is the destination's, or lost: the copy or half here is ended.")
    ] = False,
    i_have_looked: Annotated[
        bool,
        typer.Option(
            "--i-have-looked",
            help="Needed where the other host cannot tell: somebody made sure of it on that host itself.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    out: Output,
) -> None:
    """End the doubt about a VM that is paused here and may run at its destination, or see to halves that stay parted.

    The link broke between the ticket, which gave the VM away, and its receipt. The agent keeps the paused
    copy and goes on asking the destination by itself; it never runs the VM again on a guess.

    \b
    --ask        asks now. Did the VM run there, the paused copy here is ended; did it not, and the
                 destination has promised that it never will, the VM goes on here.
    --own-here   for when the destination cannot tell, or is gone for good: the VM goes on here. Refused
                 where the destination says that the VM ran there: there would be two.
    --drop-here  for when the destination cannot be asked, and the VM was seen to run there: the paused
                 copy here is ended. Refused where this copy is the last one.

    The destination is asked before either word is followed, and its answer counts for more. Where it gives
    none, --i-have-looked says that somebody made sure on the destination itself: before --own-here, that its
    QEMU is gone and will not be started (power the host off); before --drop-here, that the VM runs there.
    What was decided, by whom and why, is kept in the journal and in the migration's receipt.

    A postcopy that was cut (`postcopy-paused`) has the VM's memory in two halves, and each host keeps its own:

    \b
    --ask        at the source: the halves are joined again now, also where the agent has given up trying.
    --own-here   only at a source whose QEMU has made no switch, or failed to: then it has the VM whole. Where
                 the destination is lost for good, the VM goes on here as it was at the switch. Else it is
                 refused: half a memory cannot run.
    --drop-here  on either host, for when the other half is lost for good: the half here is ended, and with
                 it the VM, which then runs nowhere. At the source the destination is asked before, and where
                 it keeps its half this is refused. At the destination nobody is asked. --i-have-looked
                 says that somebody made sure on the other host that its QEMU is gone.

    \b
    Example:
      sealane resolve web01 --ask
      sealane resolve web01 --own-here --i-have-looked
    """
    decision = _one_of(ask=ask, own_here=own_here, drop_here=drop_here)
    with AgentClient() as agent:
        found = find_migration(agent, which, active=True)
        if found.state not in {"in-doubt", "postcopy-paused"}:
            raise ControlError("resolve.not-in-doubt", f"migration {found.number} of {found.vm} is {found.state} here")
        if not (decision == "ask" or yes):
            _confirm(found, decision, out)
        try:
            migration = agent.resolve(found.id, ResolveRequest(decision=decision, i_have_looked=i_have_looked))
        except SealaneError as error:
            stays = where(agent.migration(found.id))
            out.error(error, headline=f"not resolved: {stays}")
            raise typer.Exit(error.exit_status) from error
    out.object(migration.model_dump(mode="json"))
    done = "is resolved" if migration.state in ENDED else "goes on, its halves joined again"
    out.line(f"✓ migration {migration.number} {done}; {where(migration)}")
    if migration.resolution is not None:
        out.line(f"  {migration.resolution.words}")


def _one_of(*, ask: bool, own_here: bool, drop_here: bool) -> Decision:
    words: dict[Decision, bool] = {"ask": ask, "own-here": own_here, "drop-here": drop_here}
    chosen = [word for word, is_meant in words.items() if is_meant]
    if len(chosen) != 1:
        raise UsageError(
            "usage.argument", "say one of --ask, --own-here, --drop-here", mend="see `sealane resolve --help`"
        )
    return chosen[0]


def _confirm(migration: Migration, decision: Decision, out: Output) -> None:
    vm, peer = migration.vm, migration.peer
    what = {
        "own-here": f"{vm} will go on here as it was at the switch-over. If it runs on {peer}, there are two of it.",
        "drop-here": f"The paused copy of {vm} here will be ended. If it does not run on {peer}, it is lost.",
    }[decision]
    if (migration.state, decision) == ("postcopy-paused", "drop-here"):
        what = f"The half of {vm}'s memory here will be ended. If the other half is on {peer}, {vm} is lost with it."
    if out.as_json or not is_terminal(sys.stdin):
        raise UsageError("usage.argument", what, mend="say --yes, if that is what is meant")
    out.note(what)
    typer.confirm("Go on?", abort=True)
