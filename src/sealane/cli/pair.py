"""`sealane pair`: two hosts learn to trust each other by a short code, without files."""

import sys
import time
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.output import Output, command, is_terminal
from sealane.errors import UsageError, make_error
from sealane.host.models import PairingRequest, PairingStatus

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_LOOK_EVERY_S: Final = 0.3
_INTERRUPTED: Final = 130


@app.command()
@command
def pair(
    host: Annotated[
        str | None, typer.Argument(metavar="[HOST[:PORT]", help="Where the other agent listens, which shows a code.")
    ] = None,
    code: Annotated[str | None, typer.Argument(metavar="CODE]", help="The code that is shown there.")] = None,
    *,
    out: Output,
) -> None:
    """Let this host and another one trust each other.

    Without arguments: show a code, and wait ten minutes for the host that is given it. With HOST and CODE: use the code that
    is shown there. Afterwards both screens show the same words; where they differ, somebody stands in between.

    \b
    Example, on the first host and then on the second:
      sealane pair
      sealane pair host-a 7-orchid-tempo
    """
    if host is not None and code is None:
        raise UsageError("usage.argument", "the code is missing", mend="run `sealane pair` there; it shows one")
    with AgentClient() as agent:
        if host is None:
            status = show_code(agent, out, agent.invite(), "sealane pair")
        else:
            out.detail(f"asking {host}")
            status = agent.join(pairing_request(host, code or ""))
        out.object(status.model_dump(mode="json"))
        if status.problem is not None or status.peer is None:
            problem = status.problem
            raise make_error(problem.code, problem.detail, mend=problem.mend) if problem else make_error("pairing.over")
        out.line(f"✓ paired with {status.peer.name}   both screens must show:  {status.words}")
        out.detail(f"  {status.peer.fingerprint}")
        out.detail(f"  at {words.show_address(status.peer.address or '-', status.peer.port)}")
        compare_words(agent, status.peer.name, out, asks=out.live and is_terminal(sys.stdin))


def compare_words(agent: AgentClient, name: str, out: Output, *, asks: bool) -> None:
    """Have somebody at a terminal compare the words; raises `pairing.mismatch`, once nothing of the other host is kept."""
    if not asks:
        out.line(f"  If the other screen shows anything else: sealane trust remove {name}")
        return
    if not typer.confirm("  Does the other screen show the same words?"):
        agent.remove_peer(name)
        raise make_error(
            "pairing.mismatch", f"the words differ; {name} is not trusted, and what it showed is forgotten"
        )


def show_code(agent: AgentClient, out: Output, status: PairingStatus, words_there: str) -> PairingStatus:
    """Show the code that the agent made, and wait for what becomes of it; Ctrl-C voids it."""
    own = agent.host()
    out.object(status.model_dump(mode="json"))
    say = out.note if out.quiet else out.line
    say(f"On the other host:  {words_there} {own.name} {status.code}      (waits 10 minutes)")
    out.detail(
        f"  {own.name} stands for this host's address, with its port where it is not the usual one: {own.listen}"
    )
    try:
        while status.state == "waiting":
            time.sleep(_LOOK_EVERY_S)
            left, status = status.tries_left, agent.pairing()
            if status.state == "waiting" and status.tries_left != left:
                out.line(f"! a wrong code was tried; {status.tries_left} tries left")
    except KeyboardInterrupt:
        agent.cancel_pairing()
        out.note("✗ interrupted; the code is void")
        raise typer.Exit(_INTERRUPTED) from None
    return status


def pairing_request(host: str, code: str) -> PairingRequest:
    """What the agent is asked; raises `usage.argument`."""
    address, port = words.parse_address(host)
    try:
        return PairingRequest(host=address, port=port, code=code)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("usage.argument", f"{first['loc'][0]} does not fit: {first['msg']}") from error
