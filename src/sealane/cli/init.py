"""`sealane init`: this host's identity."""

import socket
from datetime import UTC, datetime
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from sealane.cli import format as words
from sealane.cli.output import Output, command
from sealane.crypto.identity import Identity, create_identity, load_identity, save_identity
from sealane.errors import ControlError, SealaneError, UsageError
from sealane.host.config import load_settings
from sealane.host.models import Name
from sealane.host.quoting import place_of_roots
from sealane.paths import Paths
from sealane.quoting.roots import describe_roots

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def init(
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The host's name [default: its short host name].")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Make a new key and certificate in place of these.")] = False,
    *,
    out: Output,
) -> None:
    """Make this host's identity, or show the one that it has.

    Other hosts trust the fingerprint that is shown. With --renew it changes, and the other hosts have to be told.

    \b
    Example:
      sealane init --name host-a
    """
    paths = Paths.from_environment()
    present = _present(paths)
    if present is not None and not renew:
        if name is not None and name != present.name:
            raise ControlError("identity.exists", f"this host has an identity already, as {present.name}")
        _show(present, out, made=False)
        return
    identity = create_identity(_name(name, present), now=datetime.now(UTC))
    save_identity(paths, identity, replace=renew)
    _show(identity, out, made=True)
    if present is not None:
        out.line("  the fingerprint is a new one: on the other hosts, `sealane trust remove` and `add` this host;")
        out.line("  an agent that runs here has to be restarted")


def _present(paths: Paths) -> Identity | None:
    try:
        return load_identity(paths)
    except SealaneError as error:
        if error.code == "host.identity-missing":
            return None
        raise


def _name(wanted: str | None, present: Identity | None) -> str:
    if wanted is None and present is not None:
        return present.name
    name = socket.gethostname().split(".")[0] if wanted is None else wanted
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise UsageError(
            "usage.argument",
            f"{name!r} cannot be a host's name",
            mend="give one with --name: up to 64 of A-Z a-z 0-9 . _ -, with a letter or digit first",
        ) from error


def _show(identity: Identity, out: Output, *, made: bool) -> None:
    now = datetime.now(UTC)
    root = root_of_trust(Paths.from_environment())
    out.object(
        {
            "name": identity.name,
            "fingerprint": identity.fingerprint,
            "not_before": identity.not_before.isoformat(),
            "not_after": identity.not_after.isoformat(),
            "root_of_trust": root,
            "created": made,
        }
    )
    out.line(f"identity   {identity.name}  {identity.fingerprint} (Ed25519)      root of trust  {root}")
    left = (identity.not_after - now).total_seconds()
    if left <= 0:
        out.line("! it has expired: make a new one with `sealane init --renew`")
    out.detail(
        f"valid      {identity.not_before:%Y-%m-%d} to {identity.not_after:%Y-%m-%d}, {words.duration(left)} left"
    )


def root_of_trust(paths: Paths) -> str:
    """What signs for this host by its settings, a simulation as such; the identity's own key is one in a file in any case."""
    try:
        settings = load_settings(paths.config).attestation
    except SealaneError as error:
        return f"not known: {error.detail}"
    return ", ".join(one.sentence for one in describe_roots(settings.drivers, place_of_roots(settings)))
