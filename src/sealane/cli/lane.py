"""`sealane lane`: lanes for another client of libvirt than the agent."""

from typing import Annotated

import typer

from sealane.cli.client import AgentClient
from sealane.cli.completion import host_names, vm_names
from sealane.cli.migrate import Follower
from sealane.cli.output import Output, command
from sealane.cli.screen import make_screen
from sealane.errors import make_error
from sealane.host.models import Migration, MigrationRequest
from sealane.libvirt.domains import is_domain, parse_address
from sealane.libvirt.machine import MigrationDirectory
from sealane.limits import LANES_MAX

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""Open lanes for a plain `virsh migrate`.

\b
Example:
  sealane lane open web01 host-b
""",
)


@app.callback()
def _group() -> None:
    """Keeps `open` a command of its own."""


@app.command("open")
@command
def open_(
    vm: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain to move.", autocompletion=vm_names)],
    host: Annotated[str, typer.Argument(metavar="HOST", help="Where to.", autocompletion=host_names)],
    *,
    parallel: Annotated[
        int,
        typer.Option("--parallel", metavar="N", min=0, max=LANES_MAX - 3, help="Lanes for virsh's --parallel."),
    ] = 0,
    out: Output,
) -> None:
    """Open the lanes for one migration of a domain, say the URIs for virsh, and follow it to its end.

    The rules are those of `sealane migrate`: the domain arrives paused (virsh needs --suspend), and the agents resume it.
    Who does not come within a minute finds the lanes closed again.

    \b
    Example:
      sealane lane open web01 host-b
    """
    with AgentClient() as agent:
        found = agent.vm(vm)
        if not is_domain(found.qmp):
            raise make_error("usage.argument", f"{vm} is no domain of libvirt")
        migration = agent.start_migration(MigrationRequest(vm=vm, host=host, multifd_channels=parallel, client="other"))
        for event in agent.events(migration.id):
            migration = event.migration
            if migration.state == "copying":
                _tell(migration, parse_address(found.qmp).uri, parallel, out)
                break
        with make_screen(out) as screen:
            status = Follower(agent, migration, screen, out).follow()
    raise typer.Exit(status)


def _tell(migration: Migration, uri: str, parallel: int, out: Output) -> None:
    path = MigrationDirectory.vm_socket(migration.id)
    mode = uri.removeprefix("qemu://")
    connect, destination = (
        f"qemu+unix://{mode}?socket={path.with_name(name)}" for name in ("local.sock", "remote.sock")
    )
    words = f"--parallel --parallel-connections {parallel} " if parallel else ""
    out.object(
        {"type": "lane", "connect": connect, "desturi": destination, "migrateuri": f"unix://{path}", "id": migration.id}
    )
    out.line(f"connect     {connect}")
    out.line(f"desturi     {destination}")
    out.line(f"migrateuri  unix://{path}")
    out.line(
        f"virsh -c '{connect}' migrate --live --suspend {words}{migration.vm} '{destination}' --migrateuri unix://{path}"
    )
