"""`sealane cancel`: end a migration that is under way; the VM goes on where it runs."""

from typing import Annotated

import typer

from sealane.cli.client import AgentClient
from sealane.cli.completion import moving_names
from sealane.cli.output import Output, command
from sealane.cli.status import find_migration
from sealane.cli.words import where

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def cancel(
    which: Annotated[
        str,
        typer.Argument(metavar="VM|ID", help="The VM, or the migration's number or id.", autocompletion=moving_names),
    ],
    *,
    out: Output,
) -> None:
    """Cancel a migration; the VM goes on at the source.

    A hand-over that has begun can no longer be cancelled.

    \b
    Example:
      sealane cancel web01
    """
    with AgentClient() as agent:
        found = find_migration(agent, which, active=True)
        agent.cancel(found.id)
        migration = agent.migration(found.id)
    out.object(migration.model_dump(mode="json"))
    if migration.state == "aborted":
        out.line(f"✓ migration {migration.number} is cancelled; {where(migration)}")
    else:
        out.line(f"migration {migration.number} is being cancelled ({migration.state}): sealane status {migration.vm}")
