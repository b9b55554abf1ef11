"""`sealane demo`: watch a live VM move between two simulated hosts, and see what an eavesdropper sees."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from sealane.cli.output import Output, QuietOption, Settings, VerboseOption
from sealane.limits import LANES_MAX

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def demo(  # noqa: PLR0913 - one parameter for each option
    context: typer.Context,
    *,
    accel: Annotated[
        Literal["auto", "kvm", "tcg"], typer.Option(help="What runs the guest; auto boots a trial guest with KVM.")
    ] = "auto",
    qemu: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The QEMU to take [default: SEALANE_QEMU, or the best here].")
    ] = None,
    network: Annotated[
        Literal["auto", "netns", "loopback"],
        typer.Option(help="Network namespaces joined by a veth pair (as root), or loopback addresses."),
    ] = "auto",
    multifd: Annotated[
        int | None,
        typer.Option(
            "--multifd",
            metavar="N",
            min=0,
            max=LANES_MAX - 2,
            help="Lanes for pages; 0: none [default: as QEMU allows].",
        ),
    ] = None,
    memory: Annotated[
        int, typer.Option("--memory", metavar="MIB", min=160, max=65_536, help="The guest's memory.")
    ] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report there, as one JSON object.")
    ] = None,
    quiet: Annotated[bool, QuietOption] = False,
    verbose: Annotated[bool, VerboseOption] = False,
) -> None:
    """Watch a live VM move between two simulated hosts, and see what an eavesdropper sees.

    Needs no configuration, no agent and, on loopback, no root. Leaves nothing behind. Exits with 0 only if every check
    held: the guest went on, the source stopped, and a secret in its memory was not on the wire.

    \b
    Example:
      sealane demo
      sealane demo --network loopback --multifd 4 --json report.json
    """
    before = context.obj if isinstance(context.obj, Settings) else Settings()
    settings = Settings(as_json=before.as_json, quiet=quiet or before.quiet, verbose=verbose or before.verbose)
    # The rig stands above the command line in the order of the rooms, because it drives it; loading it by name, and only
    # here, keeps that order, and keeps an installation's daily commands free of the rig.
    run: Callable[..., int] = importlib.import_module("sealane.testing.demo").run
    status = run(
        Output(settings),
        accel=accel,
        qemu=qemu,
        network=network,
        multifd_channels=multifd,
        memory_mib=memory,
        json_file=json_file,
    )
    raise typer.Exit(status)
