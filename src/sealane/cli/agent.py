"""`sealane agent`: the service of this host, in the foreground."""

from typing import Annotated

import typer

from sealane.cli import format as words
from sealane.cli.output import Output, command
from sealane.host.config import load_settings
from sealane.host.entrance import run_agent
from sealane.paths import Paths

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def agent(
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="ADDR[:PORT]", help="Where peers connect [default: agent.toml's, or all]."),
    ] = None,
    *,
    out: Output,
) -> None:
    """Run this host's agent in the foreground, until SIGTERM or Ctrl-C.

    Usually systemd does it: `systemctl enable --now sealane`.

    \b
    Example:
      sealane agent --listen 192.0.2.7
    """
    paths = Paths.from_environment()
    overrides: dict[str, object] = {}
    if listen is not None:
        configured = load_settings(paths.config)
        address, port = words.parse_address(listen, default_port=configured.port)
        overrides = {"listen": address, "port": port}
    if out.verbose:
        overrides["log_level"] = "debug"
    elif out.quiet:
        overrides["log_level"] = "warning"
    if out.as_json:
        overrides["log"] = "json"
    raise typer.Exit(run_agent(paths, load_settings(paths.config, overrides)))
