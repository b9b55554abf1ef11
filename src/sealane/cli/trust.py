"""`sealane trust`: the hosts whose certificates are accepted."""

from typing import Annotated

import typer
from pydantic import ValidationError

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.completion import host_names
from sealane.cli.output import Output, command
from sealane.errors import UsageError
from sealane.host.models import Peer

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""Say which hosts are trusted, by the fingerprints of their certificates.

\b
Example, on both hosts with the other's fingerprint from `sealane init`:
  sealane trust add host-b SHA256:7d1f… --address 192.0.2.7
""",
)

HostArgument = Annotated[str, typer.Argument(metavar="NAME", help="The host's name.", autocompletion=host_names)]


@app.command()
@command
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="How this host shall call the other.")],
    fingerprint: Annotated[str, typer.Argument(metavar="FINGERPRINT", help="What `sealane init` shows there.")],
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST[:PORT]", help="Where its agent listens.")
    ] = None,
    *,
    out: Output,
) -> None:
    """Trust a host. Without --address it can send VMs here, and none can be sent to it.

    \b
    Example:
      sealane trust add host-b SHA256:7d1f… --address 192.0.2.7:48217
    """
    host, port = (None, None) if address is None else words.parse_address(address)
    try:
        wanted = Peer(name=name, fingerprint=normal_fingerprint(fingerprint), address=host, port=port)
    except ValidationError as error:
        raise UsageError("usage.argument", _misfit(error)) from error
    with AgentClient() as agent:
        peer = agent.add_peer(wanted)
    out.object(peer.model_dump(mode="json"))
    out.line(f"✓ {peer.name} is trusted   {peer.fingerprint}")
    if peer.address is None:
        out.line("  no address: VMs can come from it, none can be sent to it")


@app.command("list")
@command
def list_(*, out: Output) -> None:
    """List the hosts that are trusted.

    \b
    Example:
      sealane trust list
    """
    with AgentClient() as agent:
        peers = agent.peers()
    for peer in peers:
        out.object(peer.model_dump(mode="json"))
    if not peers:
        out.line("no host is trusted; add one: sealane trust add NAME FINGERPRINT --address HOST")
        return
    rows = [[peer.name, _address(peer), peer.fingerprint] for peer in peers]
    out.table(["HOST", "ADDRESS", "FINGERPRINT"], rows)


@app.command()
@command
def remove(name: HostArgument, *, out: Output) -> None:
    """Trust a host no longer.

    \b
    Example:
      sealane trust remove host-b
    """
    with AgentClient() as agent:
        agent.remove_peer(name)
    out.object({"removed": name})
    out.line(f"✓ {name} is no longer trusted")


def normal_fingerprint(text: str) -> str:
    """`SHA256:` and 64 small hexadecimal digits; colons between bytes, capitals and a missing prefix are forgiven."""
    digits = text.strip()
    if digits[:7].upper() == "SHA256:":
        digits = digits[7:]
    digits = digits.replace(":", "").lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise UsageError(
            "usage.argument",
            f"{text!r} is not a fingerprint",
            mend="copy the whole of it, SHA256: and 64 digits, from `sealane init` on that host",
        )
    return f"SHA256:{digits}"


def _address(peer: Peer) -> str:
    return "-" if peer.address is None else words.show_address(peer.address, peer.port)


def _misfit(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{first['loc'][0] if first['loc'] else 'it'} does not fit: {first['msg']}"
