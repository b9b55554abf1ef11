"""What a migration's connections held, counted from their events."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sealane import limits
from sealane.wire import constants as q
from sealane.wire.events import (
    Command,
    CompressedPage,
    Configuration,
    ConfigurationSubsection,
    Event,
    MultifdFlush,
    Offsets,
    Opaque,
    PackageBegun,
    PageBatch,
    RamBlockListed,
    SectionBegun,
    StreamBegun,
    VmDescription,
    XbzrlePage,
)
from sealane.wire.multifd import DeviceStatePacket, MultifdHello, MultifdPacket
from sealane.wire.postcopy import command_name
from sealane.wire.returnpath import ReturnMessage
from sealane.wire.vmdescription import DeviceWalk, walk_devices

_KINDS = {
    q.QEMU_VM_SECTION_START: "START",
    q.QEMU_VM_SECTION_PART: "PART",
    q.QEMU_VM_SECTION_END: "END",
    q.QEMU_VM_SECTION_FULL: "FULL",
}


@dataclass
class BlockSummary:
    """One RAM block and how its pages came."""

    name: str
    length: int
    page_size: int | None = None
    address: int | None = None
    normal_pages: int = 0
    zero_pages: int = 0
    xbzrle_pages: int = 0
    compressed_pages: int = 0

    @property
    def pages(self) -> int:
        """How many pages came in all."""
        return self.normal_pages + self.zero_pages + self.xbzrle_pages + self.compressed_pages


@dataclass
class ChannelSummary:
    """One multifd channel."""

    channel: int
    packets: int = 0
    syncs: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    device_states: int = 0
    compression: set[str] = field(default_factory=set)


@dataclass
class SectionSummary:
    """One section of the main channel: how often it was begun or went on, by kind."""

    id: int
    name: str
    instance: int
    version: int
    parts: dict[str, int] = field(default_factory=dict)


class StreamSummary:
    """Counts what `add` is given: the events of all connections in the order of `order.in_order`."""

    def __init__(self) -> None:
        self.machine = ""
        self.version = 0
        self.capabilities: tuple[str, ...] = ()
        self.blocks: dict[str, BlockSummary] = {}
        self.sections: dict[int, SectionSummary] = {}
        self.channels: dict[int, ChannelSummary] = {}
        self.commands: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.opaque: Counter[str] = Counter()
        self.flushes = 0
        self.packaged_bytes = 0
        self._in_order = 0  # passes by the order of pages, which one thread keeps
        self._by_repeats = 0  # passes by pages that come again, for several threads
        self._seen: dict[str, NDArray[np.bool_]] = {}
        self._tail = bytearray()
        self._tail_is_whole = True
        self._in_devices = False
        self._block_order: dict[str, int] = {}
        self._last = (-1, -1)  # the block and the offset of the last page before postcopy
        self._is_postcopy = False

    def add(self, event: Event, *, connection: int = 0) -> None:
        """Counts one event; `connection` tells multifd channels apart."""
        match event:
            case PageBatch():
                self._add_batch(event)
            case MultifdPacket():
                self._add_packet(event, self.channels[connection])
            case MultifdHello():
                self.channels[connection] = ChannelSummary(event.channel)
            case DeviceStatePacket():
                self.channels[connection].device_states += 1
            case XbzrlePage() | CompressedPage():
                self._add_single(event)
            case RamBlockListed():
                self._block_order.setdefault(event.name, len(self._block_order))
                self.blocks[event.name] = BlockSummary(event.name, event.length, event.page_size, event.address)
            case MultifdFlush():
                self.flushes += 1
            case ReturnMessage():
                self.messages[event.name] += 1
            case _:
                self._add_frame(event)

    def _add_frame(self, event: Event) -> None:
        match event:
            case StreamBegun():
                self.version = event.version
            case Configuration():
                self.machine = event.machine
            case ConfigurationSubsection():
                self.capabilities += event.capabilities
            case Command():
                self.commands[command_name(event.number)] += 1
                self._is_postcopy |= event.number == q.MIG_CMD_POSTCOPY_LISTEN
            case PackageBegun():
                self.commands[command_name(q.MIG_CMD_PACKAGED)] += 1
                self.packaged_bytes += event.length
            case SectionBegun():
                self._add_section(event)
            case Opaque():
                self.opaque[event.reason] += len(event.raw)
                self._keep_tail(event)
            case VmDescription():
                self.opaque["a description of devices"] += len(event.raw)
            case _:
                pass

    def _add_section(self, event: SectionBegun) -> None:
        key = event.section_id
        section = self.sections.setdefault(key, SectionSummary(key, event.name, event.instance, event.version))
        kind = _KINDS[event.kind]
        section.parts[kind] = section.parts.get(kind, 0) + 1
        if kind in ("FULL", "START") and event.name != "ram" and not self._tail:
            self._in_devices = True
            self._keep_tail(event)

    def _keep_tail(self, event: Event) -> None:
        if self._in_devices and self._tail_is_whole:
            self._tail_is_whole = len(self._tail) + len(event.raw) <= limits.WIRE_DEVICE_STATE_MAX
            if self._tail_is_whole:
                self._tail += event.raw

    def walk_devices(self) -> DeviceWalk:
        """The devices behind RAM, as far as the stream describes them."""
        if not self._tail_is_whole:
            return DeviceWalk((), 0, "there is more device state than is kept")
        return walk_devices(self._tail)

    # pages

    def _block_of(self, name: str) -> BlockSummary:
        block = self.blocks.get(name)
        if block is None:  # a channel alone, without the main stream's list
            self._block_order[name] = len(self._block_order)
            block = self.blocks[name] = BlockSummary(name, 0)
        return block

    def _moved(self, name: str, first: int, last: int, wraps: int) -> None:
        """Counts passes: how often the sender came back to what lies before, precopy only."""
        if self._is_postcopy:
            return
        order = self._block_order[name]
        self._in_order += wraps + ((order, first) <= self._last or not self._in_order)
        self._last = (order, last)

    def _came(self, name: str, offsets: Offsets) -> None:
        """Counts a pass where a page comes that came in this pass already, precopy only."""
        block = self.blocks[name]
        indexes = offsets // np.uint64(q.TARGET_PAGE_SIZE)
        if self._is_postcopy or not len(indexes) or int(indexes.max()) * q.TARGET_PAGE_SIZE >= block.length:
            return
        if block.length > limits.WIRE_REBUILD_MAX:
            return
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = np.zeros(block.length // q.TARGET_PAGE_SIZE, np.bool_)
        if seen[indexes].any() or not self._by_repeats:
            self._by_repeats += 1
            for other in self._seen.values():
                other[:] = False
        seen[indexes] = True

    @property
    def iterations(self) -> int:
        """Passes over memory before postcopy. With several sending threads, passes that share no page count as one."""
        is_threaded = self.channels or any(block.compressed_pages for block in self.blocks.values())
        return self._by_repeats if is_threaded else self._in_order

    def _add_batch(self, event: PageBatch) -> None:
        block = self._block_of(event.block)
        normal = int(event.is_page.sum())
        block.normal_pages += normal
        block.zero_pages += len(event.headers) - normal
        offsets = event.offsets
        wraps = int((offsets[1:] <= offsets[:-1]).sum())
        self._moved(event.block, int(offsets[0]), int(offsets[-1]), wraps)
        self._came(event.block, offsets)

    def _add_packet(self, event: MultifdPacket, channel: ChannelSummary) -> None:
        channel.packets += 1
        channel.syncs += event.is_sync
        normal, zero = len(event.page_offsets), len(event.zero_offsets)
        if not normal + zero:
            return
        if normal:
            name = q.COMPRESSION_NAMES.get(event.compression, f"{event.compression:#x}")
            channel.compression.add(name)
        channel.normal_pages += normal
        channel.zero_pages += zero
        block = self._block_of(event.block)
        block.normal_pages += normal
        block.zero_pages += zero
        self._came(event.block, np.concatenate([event.page_offsets, event.zero_offsets]))

    def _add_single(self, event: XbzrlePage | CompressedPage) -> None:
        block = self._block_of(event.block)
        if isinstance(event, XbzrlePage):
            block.xbzrle_pages += 1
        else:
            block.compressed_pages += 1
        self._moved(event.block, event.page_offset, event.page_offset, 0)
        self._came(event.block, np.array([event.page_offset], np.uint64))

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        walk = self.walk_devices()
        blocks = list(self.blocks.values())
        return {
            "stream_version": self.version,
            "machine": self.machine,
            "capabilities": list(self.capabilities),
            "blocks": [asdict(block) for block in blocks],
            "pages": {
                "normal": sum(block.normal_pages for block in blocks),
                "zero": sum(block.zero_pages for block in blocks),
                "xbzrle": sum(block.xbzrle_pages for block in blocks),
                "compressed": sum(block.compressed_pages for block in blocks),
            },
            "iterations": self.iterations,
            "sections": [asdict(section) for section in self.sections.values()],
            "commands": dict(self.commands),
            "packaged_bytes": self.packaged_bytes,
            "multifd_flushes": self.flushes,
            "multifd_channels": [
                {**asdict(channel), "compression": sorted(channel.compression)} for channel in self.channels.values()
            ],
            "devices": [asdict(device) for device in walk.devices],
            "devices_why_not": walk.why_not,
            "return_path": dict(self.messages),
            "opaque_bytes": dict(self.opaque),
        }
