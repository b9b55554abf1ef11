"""`sealane hosts`: the trusted hosts, how far they are trusted, and where a VM might go."""

from typing import Annotated

import typer

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.completion import vm_names
from sealane.cli.output import Output, command
from sealane.host.models import PeerView

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def hosts(
    vm: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="VM", help="Whether this host's policy would let VM go there.", autocompletion=vm_names
        ),
    ] = None,
    *,
    out: Output,
) -> None:
    """List the trusted hosts: the level that each reached when it was last met, and what that rests on.

    Nobody is asked anew. A host that was not met yet has the level of its pinned certificate, 1.

    \b
    Example:
      sealane hosts
      sealane hosts --for web01
    """
    with AgentClient() as agent:
        found = agent.hosts(vm)
    for host in found:
        out.object(host.model_dump(mode="json"))
    if not found:
        out.line("no host is trusted; add one: sealane trust add NAME FINGERPRINT --address HOST")
        return
    heads = [
        "HOST",
        "ADDRESS",
        "LEVEL",
        "RESTS ON",
        "HARDWARE",
        "LAST MET",
        *([] if vm is None else [f"MAY {vm} GO THERE"]),
    ]
    out.table(heads, [_row(host, asked=vm is not None) for host in found])


def _row(host: PeerView, *, asked: bool) -> list[str]:
    trust = host.trust
    level = str(trust.level)
    if trust.production_level != trust.level:
        level += f" ({trust.production_level} without test roots)"
    decision = host.decision
    answer = "" if decision is None else f"{'yes' if decision.decision == 'allow' else 'no'}: {decision.words}"
    if decision is not None and decision.decision == "allow" and host.address is None:
        answer = "no: it has no address"
    return [
        host.name,
        "-" if host.address is None else words.show_address(host.address, host.port),
        level,
        trust.root if host.trusted_by == "certificate" else f"{trust.root}, by the CA",
        ", ".join(name[:19] for name in host.hardware or trust.identities) or "-",
        "never" if trust.seen_at is None else words.ago(trust.seen_at),
        *([answer] if asked else []),
    ]
