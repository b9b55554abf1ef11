"""`sealane ca`: one CA for a fleet, so that hosts need not be paired one by one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.output import Output, command
from sealane.cli.pair import pairing_request, show_code
from sealane.crypto.identity import load_identity
from sealane.errors import make_error
from sealane.host.config import load_settings
from sealane.host.fleet.membership import Membership
from sealane.host.fleet.office import read_passphrase
from sealane.host.fleet.registry import FleetHost, Registry
from sealane.host.models import FleetStatus, PairingStatus
from sealane.paths import Paths

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""One CA for a fleet: it looks at each host's evidence and issues it a certificate for a day.

\b
Example, on the CA's host and then on each host:
  sealane ca init
  sealane ca invite
  sealane ca join ca-host 7-orchid-tempo
""",
)

PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Its first line encrypts the CA's key [default: what agent.toml says].",
    ),
]
HostArgument = Annotated[str, typer.Argument(metavar="NAME", help="The host's name, as `sealane ca list` shows it.")]


@app.command()
@command
def init(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What the CA is called.")] = "sealane-fleet",
    years: Annotated[int, typer.Option("--years", metavar="N", min=1, max=50, help="How long the CA is good.")] = 10,
    passphrase_file: PassphraseOption = None,
    *,
    out: Output,
) -> None:
    """Make a CA on this host: a key that signs for all hosts of the fleet. Keep a copy of it off-line.

    Without a passphrase the key lies in a file that its owner alone can read. With one, `authority.passphrase_file` in
    agent.toml has to say where the agent finds it.

    \b
    Example:
      sealane ca init --name rack-2 --passphrase-file /etc/sealane/ca.passphrase
    """
    paths = Paths.from_environment()
    registry = Registry(paths.authority)
    passphrase = _passphrase(paths, passphrase_file)
    made = registry.create(name, passphrase, now=datetime.now(UTC), lifetime=timedelta(days=366 * years))
    facts = {"name": made.name, "fingerprint": made.fingerprint, "not_after": made.not_after.isoformat()}
    out.object({**facts, "encrypted": passphrase is not None})
    out.line(f"✓ CA {made.name}   {made.fingerprint}")
    out.line(f"  key        {paths.authority / 'ca.key'} ({'encrypted' if passphrase else 'not encrypted, mode 0600'})")
    out.line(f"  until      {made.not_after:%Y-%m-%d}")
    out.line("  let hosts join: sealane ca invite")


@app.command()
@command
def invite(*, out: Output) -> None:
    """On the CA's host: show a code with which one host may join, and wait ten minutes for it.

    \b
    Example:
      sealane ca invite
    """
    with AgentClient() as agent:
        status = show_code(agent, out, agent.invite("enrolment"), "sealane ca join")
    peer = _concluded(status, out)
    out.line(f"✓ {peer} has joined   both screens must show:  {status.words}")
    out.line(f"  If the other screen shows anything else: sealane ca remove {peer}")


@app.command()
@command
def join(
    host: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="Where the agent of the CA's host listens.")],
    code: Annotated[str, typer.Argument(metavar="CODE", help="The code that `sealane ca invite` shows there.")],
    *,
    out: Output,
) -> None:
    """Let this host belong to the CA of another one, and have its first certificate issued.

    \b
    Example:
      sealane ca join ca-host 7-orchid-tempo
    """
    with AgentClient() as agent:
        status = agent.join_fleet(pairing_request(host, code))
        peer = _concluded(status, out)
        standing = agent.fleet()
    out.line(f"✓ joined the CA {standing.authority} on {peer}   both screens must show:  {status.words}")
    out.line("  If the other screen shows anything else: sealane ca leave")
    _show(standing, out)


@app.command()
@command
def status(*, out: Output) -> None:
    """How this host stands with its CA: its certificate, the revocation list, the fleet's hosts.

    \b
    Example:
      sealane ca status
    """
    with AgentClient() as agent:
        standing = agent.fleet()
    out.object(standing.model_dump(mode="json"))
    _show(standing, out)


@app.command()
@command
def renew(*, out: Output) -> None:
    """Have the CA look at this host now, instead of when two thirds of the certificate's time are over.

    \b
    Example:
      sealane ca renew
    """
    with AgentClient() as agent:
        standing = agent.renew()
    out.object(standing.model_dump(mode="json"))
    out.line("✓ renewed")
    _show(standing, out)


@app.command()
@command
def leave(*, out: Output) -> None:
    """Belong to no CA any more: this host then meets only hosts that it trusts by themselves.

    \b
    Example:
      sealane ca leave
    """
    paths = Paths.from_environment()
    Membership(paths, load_settings(paths.config), load_identity(paths)).leave()
    out.object({"left": True})
    out.line("✓ left; the CA still has this host: `sealane ca remove` there")


@app.command("list")
@command
def list_(*, out: Output) -> None:
    """On the CA's host: the hosts of the fleet, what was found of them, and until when their certificates last.

    \b
    Example:
      sealane ca list
    """
    hosts = Registry(Paths.from_environment().authority).hosts()
    for host in hosts:
        out.object(_facts(host))
    if not hosts:
        out.line("no host has joined; let one: sealane ca invite")
        return
    rows = [[one.name, one.state, _level(one), _until(one.not_after), one.fingerprint] for one in hosts]
    out.table(["HOST", "STATE", "LEVEL", "CERTIFICATE", "FINGERPRINT"], rows)


@app.command()
@command
def revoke(name: HostArgument, *, out: Output) -> None:
    """On the CA's host: give a host no more certificates, and put those that it has on the revocation list.

    Hosts hear of it when they next ask for news (`authority.news_every_s`, five minutes), or by `sealane ca renew` there.

    \b
    Example:
      sealane ca revoke host-c
    """
    count = Registry(Paths.from_environment().authority).revoke(name, now=datetime.now(UTC))
    out.object({"revoked": name, "certificates": count})
    out.line(f"✓ {name} is revoked, with {count} certificates that had not expired")


@app.command()
@command
def approve(name: HostArgument, *, out: Output) -> None:
    """On the CA's host: let a host that was revoked have certificates again. The revoked ones stay revoked.

    \b
    Example:
      sealane ca approve host-c
    """
    Registry(Paths.from_environment().authority).approve(name, now=datetime.now(UTC))
    out.object({"approved": name})
    out.line(f"✓ {name} gets a certificate when it next asks")


@app.command()
@command
def remove(name: HostArgument, *, out: Output) -> None:
    """On the CA's host: revoke a host and forget it, so that another one may have its name.

    \b
    Example:
      sealane ca remove host-c
    """
    Registry(Paths.from_environment().authority).remove(name, now=datetime.now(UTC))
    out.object({"removed": name})
    out.line(f"✓ {name} is revoked and forgotten")


@app.command()
@command
def crl(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it (PEM).")],
    passphrase_file: PassphraseOption = None,
    *,
    out: Output,
) -> None:
    """On the CA's host: write the revocation list as it is now, for tools that want it.

    \b
    Example:
      sealane ca crl fleet.crl
    """
    paths = Paths.from_environment()
    registry = Registry(paths.authority)
    authority = registry.open(_passphrase(paths, passphrase_file))
    lifetime = timedelta(hours=load_settings(paths.config).authority.list_hours)
    listed = registry.revocations(authority, now=datetime.now(UTC), lifetime=lifetime)
    try:
        file.write_bytes(listed)
    except OSError as error:
        raise make_error("host.permission", f"{file}: {error.strerror}") from error
    out.object({"file": str(file)})
    out.line(f"✓ {file}")


def _passphrase(paths: Paths, given: Path | None) -> bytes | None:
    return read_passphrase(str(given) if given is not None else load_settings(paths.config).authority.passphrase_file)


def _concluded(status: PairingStatus, out: Output) -> str:
    """Who the other end is; raises what it failed with."""
    out.object(status.model_dump(mode="json"))
    if status.problem is not None or status.peer is None:
        problem = status.problem
        raise make_error(problem.code, problem.detail, mend=problem.mend) if problem else make_error("pairing.over")
    return status.peer.name


def _show(standing: FleetStatus, out: Output) -> None:
    out.line(f"CA            {standing.authority}  {standing.authority_fingerprint}")
    out.line(f"its host      {standing.authority_host}  {words.show_address(standing.address or '-', standing.port)}")
    level = "" if standing.level is None else f", level {standing.level}"
    if standing.level is not None and standing.production_level != standing.level:
        level += f" ({standing.production_level} without test roots)"
    out.line(f"certificate   {_until(standing.certificate_until)}{level}")
    out.line(f"list          number {standing.list_number}, {standing.revoked} revoked, {_until(standing.list_until)}")
    out.line(f"other hosts   {', '.join(standing.hosts) or 'none'}")
    if standing.problem is not None:
        out.line(f"! the last renewal failed: {standing.problem.detail} [{standing.problem.code}]")
        out.line(f"  {standing.problem.mend}")


def _facts(host: FleetHost) -> dict[str, object]:
    return {
        "name": host.name,
        "fingerprint": host.fingerprint,
        "state": host.state,
        "address": host.address,
        "port": host.port,
        "level": host.level,
        "not_after": None if host.not_after is None else host.not_after.isoformat(),
    }


def _level(host: FleetHost) -> str:
    return "-" if host.level is None else str(host.level)


def _until(moment: datetime | None) -> str:
    if moment is None:
        return "none yet"
    left = (moment - datetime.now(UTC)).total_seconds()
    return f"until {moment:%Y-%m-%d %H:%M} UTC" if left > 0 else f"expired at {moment:%Y-%m-%d %H:%M} UTC"
