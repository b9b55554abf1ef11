"""Where a VM's memory lies and where its CPUs' page tables are, asked of QEMU's human monitor over QMP.

`info registers` shows other registers too; nothing of it is kept but what `CpuState` holds.
"""

from typing import Protocol

from sealane.errors import make_error
from sealane.guest import CpuState, RamLayout
from sealane.guest.qemu_text import (
    blocks_without_address,
    build_layout,
    parse_flat_view,
    parse_host_address,
    parse_ram_blocks,
    parse_registers,
)


class Executes(Protocol):
    """What takes QMP commands: `sealane.hypervisor.qmp.QmpMachine`."""

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """One command; raises `vm.qmp`, `vm.unreachable`."""


async def describe_guest_memory(machine: Executes) -> RamLayout:
    """RAM blocks at their addresses in QEMU's process, and what guest-physical memory shows of them.

    Raises `guest.layout` for words that do not fit, `vm.qmp` and `vm.unreachable`.
    """
    backends = await _backends(machine)
    blocks = parse_ram_blocks(await _ask(machine, "info ramblock"))
    ranges = parse_flat_view(await _ask(machine, "info mtree -f"))
    addresses = {
        name: parse_host_address(await _ask(machine, f"gpa2hva {each.address:#x}")) - each.offset
        for name, each in blocks_without_address(blocks, ranges, backends).items()
    }
    return build_layout(blocks, ranges, backends, addresses)


async def cpu_states(machine: Executes) -> list[CpuState]:
    """The control registers of every virtual CPU, now; raises as `describe_guest_memory` does."""
    return parse_registers(await _ask(machine, "info registers -a"))


async def _backends(machine: Executes) -> set[str]:
    answer = await machine.execute("query-memdev")
    listed = answer if isinstance(answer, list) else []
    return {str(each["id"]) for each in listed if isinstance(each, dict) and "id" in each}


async def _ask(machine: Executes, line: str) -> str:
    answer = await machine.execute("human-monitor-command", {"command-line": line})
    if not isinstance(answer, str):
        raise make_error("guest.layout", f"QEMU's answer to `{line}` is no text")
    return answer
