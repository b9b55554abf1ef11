"""The options of `sealane migrate`, one type for each: what it is called, what it takes, and what `--help` says of it."""

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from sealane.cli.completion import host_names, vm_names
from sealane.limits import LANES_MAX, THROTTLE_MAX_PERCENT
from sealane.seal.protect import PROTECTIONS


class StallPolicy(StrEnum):
    """What becomes of a copy that does not come nearer to its end; the values are `MigrationRequest.on_stall`'s."""

    GIVE_UP = "give-up"
    AUTO_CONVERGE = "auto-converge"
    POSTCOPY = "postcopy"
    WAIT = "wait"


class CopyChoice(StrEnum):
    """Which disks of a domain are copied; the values are `MigrationRequest.copy_storage`'s."""

    NONE = "none"
    ALL = "all"
    INC = "inc"


VmArgument: TypeAlias = Annotated[str, typer.Argument(metavar="VM", help="The VM to move.", autocompletion=vm_names)]
HostArgument: TypeAlias = Annotated[str, typer.Argument(metavar="HOST", help="Where to.", autocompletion=host_names)]
Multifd: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--multifd", metavar="N", min=1, max=LANES_MAX - 2, help="Lanes for pages [default: as both QEMUs allow]."
    ),
]
NoMultifd: TypeAlias = Annotated[bool, typer.Option("--no-multifd", help="One lane for everything.")]
MaxBandwidth: TypeAlias = Annotated[
    str | None,
    typer.Option("--max-bandwidth", metavar="RATE", help="Such as 10Gb/s or 1.2GB/s [default: no bound]."),
]
DowntimeLimit: TypeAlias = Annotated[
    int | None,
    typer.Option("--downtime-limit", metavar="MS", min=1, max=2_000_000, help="Milliseconds the VM may stand still."),
]
SwitchoverHook: TypeAlias = Annotated[
    str | None,
    typer.Option("--switchover-hook", metavar="CMD", help="Run when the VM is paused; its failure stops the move."),
]
OnStall: TypeAlias = Annotated[
    StallPolicy,
    typer.Option(
        "--on-stall",
        help="Where the guest writes faster than the copy goes: leave it here, let QEMU slow it down, run it at the other "
        "host before all of its memory is there (the loss of either host then loses it), or wait.",
    ),
]
GiveUpAfter: TypeAlias = Annotated[
    float,
    typer.Option(
        "--give-up-after", metavar="S", min=1, max=86_400, help="Seconds without progress, then --on-stall decides."
    ),
]
MaxThrottle: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--max-throttle",
        metavar="PERCENT",
        min=1,
        max=99,
        help=f"How far auto-converge may slow the guest down [default: {THROTTLE_MAX_PERCENT}].",
    ),
]
Priority: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--priority",
        metavar="N",
        min=-100,
        max=100,
        help="Where it must wait for others: the higher the sooner [default: the VM's in agent.toml, or 0].",
    ),
]
TimeLimit: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="S",
        min=1,
        max=604_800,
        help="Seconds it may take, the queue left out; then it ends.",
    ),
]
UndefineSource: TypeAlias = Annotated[
    bool,
    typer.Option("--undefine-source", help="A persistent domain of libvirt: forget it here once it runs there."),
]
CopyStorage: TypeAlias = Annotated[
    CopyChoice,
    typer.Option(
        "--copy-storage",
        help="A domain of libvirt: copy its disks too, all of each, or inc: the layer above a backing file that the other "
        "host has. The other host makes the files, and writes over none.",
    ),
]
NoReduce: TypeAlias = Annotated[
    bool,
    typer.Option("--no-reduce", help="Send every byte as it is, also over a line that is slower than this host."),
]
ProtectionName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--protection",
        metavar="NAME",
        help=f"One of {', '.join(PROTECTIONS)}; all but sealed leave a part of the VM readable on the network.",
    ),
]
KnowsWeak: TypeAlias = Annotated[
    bool, typer.Option("--i-know-this-is-weak", help="Needed with every --protection but sealed.")
]
Detach: TypeAlias = Annotated[
    bool, typer.Option("--detach", help="Return when the agent has begun; see `sealane status`.")
]
