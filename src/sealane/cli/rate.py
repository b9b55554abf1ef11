"""`sealane rate`: how fast all copies from this host may be together."""

from typing import Annotated

import typer

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.output import Output, command
from sealane.host.models import TotalRate

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def rate(
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="[RATE]", help="As 5Gb/s or 600MB/s, or `unlimited`; shows it where left out."),
    ] = None,
    *,
    out: Output,
) -> None:
    """Show or change the rate that all moves from this host share, those under way too.

    Each has an equal part; what one with a lower rate of its own leaves, the others have. A change holds until the agent
    ends; `limits.total_rate_max_bytes_per_s` in agent.toml holds longer.

    \b
    Example:
      sealane rate 5Gb/s
    """
    with AgentClient() as agent:
        change = None if wanted is None else TotalRate(max_bytes_per_s=words.parse_rate(wanted))
        now = agent.total_rate() if change is None else agent.change_total_rate(change)
    out.object(now.model_dump(mode="json"))
    shown = words.rate(now.max_bytes_per_s) if now.max_bytes_per_s else "unlimited"
    out.line(f"{'' if wanted is None else '✓ '}all moves together  {shown}")
