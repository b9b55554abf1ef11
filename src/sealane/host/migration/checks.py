"""What must fit before anything stops: the destination compares its launched VM with what the source says."""

from pathlib import Path
from typing import Final

from sealane.errors import ControlError
from sealane.host.migration.messages import Prepare
from sealane.hypervisor.driver import VmDescription
from sealane.hypervisor.unshared import IN_POSTCOPY
from sealane.limits import GIB, LANES_MAX, MIB, MULTIFD_CHANNELS_DEFAULT
from sealane.seal.protect import SEALED

# Without these a migration cannot be handed over: QEMU must wait for our word, and say how it went.
NEEDED_CAPABILITIES: Final = frozenset({"return-path", "events", "pause-before-switchover"})
MULTIFD: Final = "multifd"
POSTCOPY: Final = "postcopy-ram"
PREEMPT: Final = "postcopy-preempt"
POSTCOPY_WITH_MULTIFD: Final = (10, 1, 0)
# QEMU's own needs beside the guest's memory: device state, page tables, the migration's buffers.
_BESIDE_GUEST_BYTES: Final = 64 * MIB


def words_for(size: int) -> str:
    """A memory size in IEC units."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel would give without swapping (MemAvailable, proc(5))."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ControlError("check.free-memory", f"{meminfo} does not say how much memory is available")


def check_free_memory(wanted_bytes: int, available_bytes: int) -> None:
    """Raise `check.free-memory` where the guest would not fit."""
    if available_bytes < wanted_bytes + _BESIDE_GUEST_BYTES:
        raise ControlError(
            "check.free-memory",
            f"the VM has {words_for(wanted_bytes)} and {words_for(available_bytes)} are available there",
        )


def check_lanes(channels: int, disks: int) -> None:
    """Raise `check.disks` where a domain would need more lanes than there are: two, one a channel, one a disk."""
    if 2 + channels + disks > LANES_MAX:
        raise ControlError("check.disks", f"{channels} channels and {disks} disks need more lanes than {LANES_MAX}")


def check_idle(vm: VmDescription) -> None:
    """Raise where the source's QEMU is in a migration, or does not know that one is over (`hypervisor.stranded`, `unshared`)."""
    if vm.migration_status in {"device", "cancelling"}:  # a VM that runs is in neither for long
        words = "QEMU says that it is in a migration still; where it says so for ever, one was cut in its switch to postcopy"
        raise ControlError("vm.busy", words, mend="restart its QEMU: until then it can migrate no more")
    if vm.migration_status in IN_POSTCOPY and vm.run_state == "running":  # or it came by a postcopy that is not over
        words = "QEMU is in postcopy still; where its VM was to leave, and runs here, the switch was cut, and it says so for ever"
        raise ControlError("vm.busy", words, mend="restart its QEMU: until then it can migrate no more")
    if vm.migration_status in {"setup", "active", "pre-switchover", *IN_POSTCOPY}:
        raise ControlError("vm.busy", "QEMU is in a migration that is not Sealane's")


def check_source(vm: VmDescription) -> None:
    """Raise where the source's QEMU cannot do what every migration needs."""
    missing = NEEDED_CAPABILITIES - vm.capabilities
    if missing:
        raise ControlError("check.capabilities", f"the source's QEMU lacks {', '.join(sorted(missing))}")


def check_same_machine(wanted: Prepare, here: VmDescription) -> None:
    """Raise the first difference that would make the stream fail, or worse, load wrongly."""
    if here.qemu_version[:2] < wanted.qemu_version[:2]:
        raise ControlError(
            "check.qemu-version",
            f"QEMU is {_version(wanted.qemu_version)} at the source and {_version(here.qemu_version)} at the destination",
        )
    pairs: tuple[tuple[str, object, object, str], ...] = (
        ("check.machine-type", wanted.machine_type, here.machine_type, "the machine type"),
        (
            "check.memory",
            words_for(wanted.memory_bytes) + f" ({wanted.memory_bytes} bytes)",
            words_for(here.memory_bytes) + f" ({here.memory_bytes} bytes)",
            "the memory",
        ),
        ("check.cpus", wanted.cpus, here.cpus, "the number of CPUs"),
    )
    for code, there, ours, what in pairs:
        if there != ours:
            raise ControlError(code, f"{what} is {there} at the source and {ours} at the destination")
    missing = NEEDED_CAPABILITIES - {"pause-before-switchover"} - here.capabilities
    if missing:
        raise ControlError("check.capabilities", f"the destination's QEMU lacks {', '.join(sorted(missing))}")


def check_postcopy(vm: VmDescription, multifd_channels: int | None, *, has_vtpm: bool, protection: str) -> None:
    """Raise where this QEMU cannot do postcopy, or not with what else was asked for.

    A TPM of the VM's own must have left its host when the VM runs elsewhere, and in postcopy nobody can say that of both yet. A
    protection that tells pages apart goes by what they were when the source last looked, and was never tried on postcopy's lanes.
    """
    if protection != SEALED:
        raise ControlError(
            "check.postcopy", "postcopy goes sealed: leave --protection out", mend="choose another --on-stall"
        )
    if has_vtpm:
        raise ControlError(
            "check.postcopy", "a VM with a TPM of its own does not go by postcopy", mend="choose another --on-stall"
        )
    if POSTCOPY not in vm.capabilities:
        raise ControlError("check.postcopy", "this QEMU has no postcopy-ram")
    if multifd_channels and vm.qemu_version < POSTCOPY_WITH_MULTIFD:
        raise ControlError("check.postcopy", "this QEMU has no postcopy together with multifd: leave --multifd out")


def choose_preempt(source: frozenset[str], destination: frozenset[str]) -> bool:
    """Whether wanted pages get a channel of their own: where both ends have that."""
    return PREEMPT in source and PREEMPT in destination


def choose_multifd_channels(wanted: int | None, source: frozenset[str], destination: frozenset[str]) -> int:
    """How many multifd channels: the wish where there is one, else the default where both ends have multifd."""
    both = MULTIFD in source and MULTIFD in destination
    if wanted is None:
        return MULTIFD_CHANNELS_DEFAULT if both else 0
    if wanted and not both:
        raise ControlError("check.capabilities", "multifd was asked for and is missing at one end")
    return wanted


def _version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
