"""`sealane vm`: the VMs that this host's agent knows."""

import os
import shlex
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.completion import vm_names
from sealane.cli.output import Output, command
from sealane.errors import UsageError
from sealane.host.models import Vm, VmDefinition

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""Tell the agent which VMs there are: each by its QMP socket.

\b
Example:
  sealane vm add web01 --qmp /run/web01.qmp
""",
)

_KNOWN_FROM: Final = {"registered": "sealane vm add", "file": "the configuration", "libvirt": "libvirt"}
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The VM's name.", autocompletion=vm_names)]


@app.command()
@command
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The VM's name, the same on all hosts.")],
    words_after: Annotated[
        list[str] | None, typer.Argument(metavar="[-- CMD...]", help="The launch command, word by word.")
    ] = None,
    *,
    qmp: Annotated[str, typer.Option("--qmp", metavar="PATH", help="Its QMP socket on this host.")],
    launch_incoming: Annotated[
        str | None,
        typer.Option(
            "--launch-incoming",
            metavar="CMD...",
            help="How to start its QEMU here to receive it: one quoted string, or all words that follow.",
        ),
    ] = None,
    least_level: Annotated[
        int,
        typer.Option(
            "--least-level", metavar="N", min=0, max=4, help="The trust level that it asks of the other host."
        ),
    ] = 0,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="A word for policies, as tier=web; may be repeated."),
    ] = None,
    vtpm: Annotated[
        str | None,
        typer.Option("--vtpm", metavar="DIR", help="It has a TPM of its own, whose files this host keeps there."),
    ] = None,
    out: Output,
) -> None:
    """Make a VM known to this host's agent.

    The launch command is needed where the VM shall arrive; it has to open the QMP socket and to wait with
    `-incoming defer`.

    \b
    Example:
      sealane vm add web01 --qmp /run/web01.qmp
      sealane vm add web01 --qmp /run/web01.qmp --launch-incoming \\
        qemu-system-x86_64 -m 4G -qmp unix:/run/web01.qmp,server,nowait -incoming defer
    """
    launch = _launch_command(launch_incoming, words_after)
    try:
        definition = VmDefinition(
            name=name,
            qmp=os.path.abspath(qmp),
            launch_incoming=launch,
            least_level=least_level,
            labels=_labels(label or []),
            vtpm=None if vtpm is None else os.path.abspath(vtpm),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("usage.argument", f"{first['loc'][0]} does not fit: {first['msg']}") from error
    with AgentClient() as agent:
        vm = agent.add_vm(definition)
    out.object(vm.model_dump(mode="json"))
    out.line(f"✓ {vm.name} is known, {_state(vm)}")
    if vm.state == "unreachable":
        out.line(f"  nothing answers at {vm.qmp} now; it can be migrated when QEMU does")


@app.command("list")
@command
def list_(*, out: Output) -> None:
    """List the VMs that the agent knows.

    \b
    Example:
      sealane vm list --json
    """
    with AgentClient() as agent:
        vms = agent.vms()
    for vm in vms:
        out.object(vm.model_dump(mode="json"))
    if not vms:
        out.line("no VM is known; add one: sealane vm add NAME --qmp PATH")
        return
    out.table(
        ["VM", "DRIVER", "STATE", "MEMORY", "CPUS", "QEMU", "CAN ARRIVE", "vTPM", "ASKS FOR", "EPOCH"],
        [
            [
                vm.name,
                vm.driver,
                _state(vm),
                _or_dash(None if vm.memory_bytes is None else words.memory_bytes(vm.memory_bytes)),
                _or_dash(vm.cpus),
                _or_dash(vm.qemu_version),
                "yes" if vm.launch_incoming or vm.driver == "libvirt" else "no",
                "no" if vm.vtpm is None else "yes",
                f"level ≥ {vm.least_level}" if vm.least_level else "-",
                str(vm.epoch),
            ]
            for vm in vms
        ],
    )


@app.command()
@command
def show(name: NameArgument, *, out: Output) -> None:
    """Show all that is known of a VM.

    \b
    Example:
      sealane vm show web01
    """
    with AgentClient() as agent:
        vm = agent.vm(name)
    out.object(vm.model_dump(mode="json"))
    facts = {
        "name": vm.name,
        "state": _state(vm),
        "driver": vm.driver,
        "QMP": vm.qmp,
        "QEMU": _or_dash(vm.qemu_version),
        "machine": _or_dash(vm.machine_type),
        "memory": _or_dash(None if vm.memory_bytes is None else words.memory_bytes(vm.memory_bytes)),
        "CPUs": _or_dash(vm.cpus),
        "arrives by": "-" if vm.launch_incoming is None else shlex.join(vm.launch_incoming),
        "known from": _KNOWN_FROM[vm.source],
        "epoch": str(vm.epoch),
        "TPM": "-" if vm.vtpm is None else f"its files in {vm.vtpm}; see sealane vtpm status {vm.name}",
        "asks for": f"level {vm.least_level} or more" if vm.least_level else "-",
        "labels": ", ".join(f"{key}={value}" for key, value in vm.labels.items()) or "-",
        "migration": _or_dash(vm.migration),
    }
    for label, value in facts.items():
        out.line(f"{label:<11} {value}")


@app.command()
@command
def remove(name: NameArgument, *, out: Output) -> None:
    """Forget a VM; the VM itself is left as it is.

    \b
    Example:
      sealane vm remove web01
    """
    with AgentClient() as agent:
        agent.remove_vm(name)
    out.object({"removed": name})
    out.line(f"✓ {name} is forgotten; nothing was done to the VM itself")


def _launch_command(quoted: str | None, after: list[str] | None) -> list[str] | None:
    if quoted is not None and after:
        raise UsageError(
            "usage.argument",
            "the launch command is given twice",
            mend="quote all of it after --launch-incoming, or write it after `--`",
        )
    if quoted is None:
        return list(after) if after else None
    try:
        split = shlex.split(quoted)
    except ValueError as error:
        raise UsageError("usage.argument", f"the launch command's quotes do not match ({error})") from error
    if not split:
        raise UsageError("usage.argument", "the launch command is empty")
    return split


def _labels(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key in found:
            raise UsageError("usage.argument", f"{text!r} is no label, or one of its key is there already")
        found[key] = value
    return found


def _state(vm: Vm) -> str:
    if vm.migration is None:
        return vm.state
    return f"{vm.state}, {'queued' if vm.migration_state == 'queued' else 'migrating'}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
