"""`sealane vtpm`: the VMs' own TPMs, whose files Sealane keeps encrypted and which travel with their VMs."""

from typing import Annotated

import typer

from sealane.cli.client import AgentClient
from sealane.cli.completion import vm_names
from sealane.cli.output import Output, command
from sealane.host.models import VtpmView

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""Look after the TPMs of VMs that were added with --vtpm.

\b
Example:
  sealane vtpm start web01
  sealane vtpm status web01
""",
)

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="The VM's name.", autocompletion=vm_names)]


@app.command()
@command
def start(
    name: VmArgument,
    *,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take over the state of swtpm that lies in the directory in clear.")
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="Make a new TPM although one of this VM was here and has left.")
    ] = False,
    after_crash: Annotated[
        bool,
        typer.Option(
            "--after-crash", help="Take the files of a TPM that was killed before its last writes were noted."
        ),
    ] = False,
    out: Output,
) -> None:
    """Start a VM's TPM before its QEMU; the first time it is made.

    QEMU is given the socket that is printed, and the TPM ends with it:

    \b
      -chardev socket,id=chrtpm,path=SOCKET
      -tpmdev emulator,id=tpm0,chardev=chrtpm
      -device tpm-tis,tpmdev=tpm0

    \b
    Example:
      sealane vtpm start web01
    """
    with AgentClient() as agent:
        view = agent.start_vtpm(name, adopt=adopt, anew=anew, after_crash=after_crash)
    out.object(view.model_dump(mode="json"))
    out.line(f"✓ the TPM of {name} waits for QEMU at {view.control}")


@app.command()
@command
def stop(name: VmArgument, *, out: Output) -> None:
    """End the TPM of a VM that is off; a VM that runs loses it.

    \b
    Example:
      sealane vtpm stop web01
    """
    with AgentClient() as agent:
        view = agent.change_vtpm(name, "stop")
    out.object(view.model_dump(mode="json"))
    out.line(f"✓ the TPM of {name} has ended")


@app.command()
@command
def status(name: VmArgument, *, out: Output) -> None:
    """Show where a VM's TPM is, and what its files are under.

    \b
    Example:
      sealane vtpm status web01
    """
    with AgentClient() as agent:
        view = agent.vtpm(name)
    out.object(view.model_dump(mode="json"))
    for label, value in _facts(view).items():
        out.line(f"{label:<16} {value}")


@app.command()
@command
def rotate(name: VmArgument, *, out: Output) -> None:
    """Put the files of a VM's TPM under a new key; the old one is destroyed.

    A VM that runs is paused for that moment.

    \b
    Example:
      sealane vtpm rotate web01
    """
    with AgentClient() as agent:
        view = agent.change_vtpm(name, "rotate")
    out.object(view.model_dump(mode="json"))
    counter = "-" if view.facts is None else str(view.facts.counter)
    out.line(f"✓ the TPM of {name} is under a new key, number {counter}")


@app.command()
@command
def verify(name: VmArgument, *, out: Output) -> None:
    """Look whether the files of a VM's TPM are those that were written last.

    \b
    Example:
      sealane vtpm verify web01
    """
    with AgentClient() as agent:
        view = agent.change_vtpm(name, "verify")
    out.object(view.model_dump(mode="json"))
    out.line(f"✓ the files of {name}'s TPM, the record of them and the counter fit")


def _facts(view: VtpmView) -> dict[str, str]:
    facts = view.facts
    running = "in use by QEMU" if view.in_use else "waits for QEMU" if view.running else "not running"
    return {
        "VM": view.vm,
        "TPM": {"none": "none yet", "incoming": "coming", "here": f"here, {running}", "gone": "left"}[view.status],
        "files": view.storage,
        "QEMU's socket": view.control,
        "key": view.key or "-",
        "epoch": str(view.epoch),
        "key number": "-" if facts is None else str(facts.counter),
        "state version": "-" if facts is None else str(facts.version),
        "endorsement key": "-" if facts is None or not facts.ek_sha256 else f"SHA-256 {facts.ek_sha256}",
        "swtpm": view.swtpm,
    }
