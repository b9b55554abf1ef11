"""What QEMU's human monitor prints about memory and CPUs, read into a `RamLayout` and `CpuState`s.

QMP has no command for these. The text is hostile input: a result or `guest.layout`, in time and memory linear in it.
Formats: system/ramlist.c or softmmu/physmem.c (`info ramblock`; before 8.0 without the host's address), system/memory.c
(`info mtree -f`), monitor/hmp-cmds-target.c (`gpa2hva`), target/i386/cpu-dump.c (`info registers -a`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sealane.errors import make_error
from sealane.guest.cpu import CpuState
from sealane.guest.layout import PAGE_BYTES, RamBlock, RamLayout, Segment
from sealane.limits import GUEST_CPUS_MAX, GUEST_SEGMENTS_MAX, GUEST_TEXT_MAX, WIRE_BLOCKS_MAX

# No line that is read here is longer; it also keeps the expressions' backtracking short.
_LINE_MAX: Final = 512

_BLOCK: Final = re.compile(
    r" *(\S.*?) +\d+(?:\.\d+)? [KMGT]?i?B +0x[0-9a-f]{1,16} (?:0x([0-9a-f]{1,16})) 0x[0-9a-f]{1,16}"
    r"(?: 0x([0-9a-f]{1,16}) +r[ow])? *"
)
_RANGE: Final = re.compile(
    r" +([0-9a-f]{1,16})-([0-9a-f]{1,16}) \(prio -?\d+, ([a-z/]+)\): (\S+)(?: @([0-9a-f]{1,16}))?(?: .*)?"
)
_ADDRESS_SPACE: Final = re.compile(r' +AS "([^"]*)", root: .*')
_HOST_ADDRESS: Final = re.compile(r"Host virtual address for 0x[0-9a-f]{1,16} \([^)]*\) is 0x([0-9a-f]{1,16})")
_REGISTERS: Final = re.compile(r"CR0=([0-9a-f]{8,16}) CR2=[0-9a-f]{8,16} CR3=([0-9a-f]{8,16}) CR4=([0-9a-f]{8,16})")
_EFER: Final = re.compile(r"EFER=([0-9a-f]{1,16})")


@dataclass(frozen=True)
class ListedBlock:
    """A line of `info ramblock`; QEMU before 8.0 tells no host address."""

    name: str
    size_bytes: int
    host_address: int | None


@dataclass(frozen=True)
class FlatRange:
    """A line of `info mtree -f`: what a range of guest-physical addresses shows; `kind` is "ram", "rom", "i/o", …"""

    address: int
    size_bytes: int
    kind: str
    region: str
    offset: int


def parse_ram_blocks(text: str) -> list[ListedBlock]:
    """Read `info ramblock`."""
    found = []
    for line in _lines(text):
        if match := _BLOCK.fullmatch(line):
            name, used, host = match.groups()
            found.append(ListedBlock(name, int(used, 16), None if host is None else int(host, 16)))
            if len(found) > WIRE_BLOCKS_MAX:
                raise make_error("guest.layout", "too many RAM blocks")
    if not found:
        raise make_error("guest.layout", "QEMU lists no RAM block")
    return found


def parse_flat_view(text: str) -> list[FlatRange]:
    """Read from `info mtree -f` the view of the address space "memory"."""
    found: list[FlatRange] = []
    is_memory = False
    for line in _lines(text):
        if line.startswith("FlatView"):
            is_memory = False
        elif match := _ADDRESS_SPACE.fullmatch(line):
            is_memory = is_memory or match[1] == "memory"
        elif is_memory and (match := _RANGE.fullmatch(line)):
            first, last, offset = int(match[1], 16), int(match[2], 16), int(match[5] or "0", 16)
            if last < first:
                raise make_error("guest.layout", f"a range from {first:#x} to {last:#x}")
            found.append(FlatRange(first, last - first + 1, match[3], match[4], offset))
            if len(found) > GUEST_SEGMENTS_MAX:
                raise make_error("guest.layout", "too many ranges of guest memory")
    if not found:
        raise make_error("guest.layout", "QEMU shows no view of the guest's memory")
    return found


def parse_host_address(text: str) -> int:
    """Read `gpa2hva`: where in QEMU's address space a guest-physical address lies."""
    match = _HOST_ADDRESS.search(_bounded(text)[:_LINE_MAX])
    if match is None:
        raise make_error("guest.layout", "QEMU tells no host address")
    return int(match[1], 16)


def parse_registers(text: str) -> list[CpuState]:
    """Read `info registers -a`; every CPU must be whole."""
    found: list[CpuState] = []
    control: tuple[int, int, int] | None = None
    for line in _lines(text):
        if line.startswith("CR0="):
            match = _REGISTERS.match(line)
            if match is None or control is not None:
                raise make_error("guest.layout", "a CPU's registers do not fit")
            control = int(match[1], 16), int(match[2], 16), int(match[3], 16)
        elif line.startswith("EFER=") and (match := _EFER.match(line)):
            if control is None or len(found) >= GUEST_CPUS_MAX:
                raise make_error("guest.layout", "a CPU's registers do not fit")
            found.append(CpuState(*control, efer=int(match[1], 16)))
            control = None
    if not found or control is not None:
        raise make_error("guest.layout", "QEMU shows no CPU whole")
    return found


def blocks_without_address(
    blocks: Sequence[ListedBlock], ranges: Sequence[FlatRange], backends: Collection[str]
) -> dict[str, FlatRange]:
    """For each block of guest RAM without a host address a range to ask `gpa2hva` about."""
    first = {each.region: each for each in reversed(ranges) if each.kind == "ram"}
    return {
        block.name: first[block.name]
        for block in blocks
        if block.host_address is None and block.name in backends and block.name in first
    }


def build_layout(
    blocks: Sequence[ListedBlock],
    ranges: Sequence[FlatRange],
    backends: Collection[str],
    host_addresses: Mapping[str, int],
) -> RamLayout:
    """Put it together. `backends` names the VM's memory backends (`query-memdev`): those blocks are guest RAM.

    `host_addresses` holds, for blocks that were listed without one, their first byte's host address.
    """
    found = []
    for block in blocks:
        address = block.host_address if block.host_address is not None else host_addresses.get(block.name)
        is_ram = block.name in backends and address is not None
        found.append(RamBlock(block.name, block.size_bytes, address if is_ram and address is not None else 0, is_ram))
    ram = {block.name: block for block in found if block.is_ram}
    if not ram:
        raise make_error("guest.layout", "no RAM block is a memory backend of the VM")
    segments = []
    for each in ranges:
        if each.kind == "ram" and each.region in ram:
            start = -(-each.address // PAGE_BYTES)
            skipped = start * PAGE_BYTES - each.address
            frames = (each.size_bytes - skipped) // PAGE_BYTES
            if (each.offset + skipped) % PAGE_BYTES:
                raise make_error("guest.layout", f"{each.region} is mapped off its page boundaries")
            if frames > 0:
                segments.append(Segment(start, frames, each.region, (each.offset + skipped) // PAGE_BYTES))
    return RamLayout(found, segments)


def _bounded(text: str) -> str:
    if len(text) > GUEST_TEXT_MAX:
        raise make_error("guest.layout", f"QEMU's answer has {len(text)} characters")
    return text


def _lines(text: str) -> list[str]:
    return [line for line in _bounded(text).splitlines() if len(line) <= _LINE_MAX]
