"""RAM as the destination would have it: every record applied in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from sealane import limits
from sealane.errors import WireError
from sealane.wire import constants as q
from sealane.wire.events import (
    Bytes,
    Command,
    CompressedPage,
    Event,
    Offsets,
    PageBatch,
    RamBlockListed,
    XbzrlePage,
)
from sealane.wire.multifd import MultifdPacket, PacketPages, PacketPayload
from sealane.wire.payload import PagesUnpacker, apply_xbzrle, unpack_page
from sealane.wire.postcopy import parse_ram_discard

_SHIFT = np.uint64(q.TARGET_PAGE_SIZE.bit_length() - 1)


@dataclass(frozen=True)
class BlockDigest:
    """A RAM block as rebuilt. `pages_received` counts pages that some record gave, zero pages included."""

    name: str
    length: int
    pages_received: int
    sha256: str


@dataclass
class _Block:
    pages: Bytes  # n, 4096
    received: np.ndarray[tuple[int], np.dtype[np.bool_]]


class RamRebuild:
    """RAM blocks, filled by `apply` with the events of all connections in the order of `order.in_order`.

    Pages that no record gave are zero, as in a new QEMU. At most `most_bytes` in all, or WireError `wire.limit`.
    """

    def __init__(self, *, most_bytes: int = limits.WIRE_REBUILD_MAX) -> None:
        self._left = most_bytes
        self._blocks: dict[str, _Block] = {}
        self._unpackers: dict[int, PagesUnpacker] = {}
        self.unreadable_pages = 0  # in packets whose compression cannot be read here

    def apply(self, event: Event, *, connection: int = 0) -> None:
        """Does what the event says; events without a meaning for RAM are passed over. Raises WireError.

        `connection` tells channels apart, whose compression goes on from packet to packet.
        """
        match event:
            case PageBatch():
                self._apply_batch(event)
            case MultifdPacket():
                if len(event.zero_offsets):
                    self._fill(event, event.block, event.zero_offsets, np.zeros(len(event.zero_offsets), np.uint8))
            case PacketPages():
                self._store(event, event.packet.block, event.page_offsets, event.pages)
            case PacketPayload():
                self._apply_payload(event, connection)
            case CompressedPage() | XbzrlePage():
                self._apply_single(event)
            case RamBlockListed():
                self._add_block(event)
            case Command(number=q.MIG_CMD_POSTCOPY_RAM_DISCARD):
                self._discard(event)
            case _:
                pass

    def digests(self) -> list[BlockDigest]:
        """Each RAM block in the order in which the stream listed them."""
        return [
            BlockDigest(name, block.pages.size, int(block.received.sum()), sha256(block.pages.data).hexdigest())
            for name, block in self._blocks.items()
        ]

    def memory(self) -> Iterator[tuple[str, Bytes]]:
        """Each RAM block's pages (n, 4096), in the order in which the stream listed them."""
        return ((name, block.pages) for name, block in self._blocks.items())

    def _add_block(self, event: RamBlockListed) -> None:
        self._left -= event.length
        if self._left < 0:
            raise WireError(
                "wire.limit", f"RAM block {event.name!r} of {event.length} bytes", offset=event.offset, section="ram"
            )
        count = event.length // q.TARGET_PAGE_SIZE
        self._blocks[event.name] = _Block(np.zeros((count, q.TARGET_PAGE_SIZE), np.uint8), np.zeros(count, np.bool_))

    def _target(self, event: Event, name: str, offsets: Offsets) -> tuple[_Block, Offsets]:
        block = self._blocks.get(name)
        indexes = offsets >> _SHIFT
        if block is None or (len(indexes) and int(indexes.max()) >= len(block.pages)):
            raise WireError("wire.malformed", f"a page outside RAM block {name!r}", offset=event.offset, section="ram")
        return block, indexes

    def _store(self, event: Event, name: str, offsets: Offsets, pages: Bytes) -> None:
        block, indexes = self._target(event, name, offsets)
        block.pages[indexes] = pages  # of an offset that comes twice, numpy keeps the last
        block.received[indexes] = True

    def _fill(self, event: Event, name: str, offsets: Offsets, fills: Bytes) -> None:
        block, indexes = self._target(event, name, offsets)
        # most zero pages were never anything else: writing only what changes leaves untouched memory untouched
        changed = block.received[indexes] | (fills != 0)
        block.pages[indexes[changed]] = fills[changed][:, None]
        block.received[indexes] = True

    def _apply_batch(self, event: PageBatch) -> None:
        offsets = event.offsets
        if (offsets[1:] <= offsets[:-1]).any():
            for part in self._without_repeats(event):
                self._apply_kinds(part)
        else:
            self._apply_kinds(event)

    def _apply_kinds(self, event: PageBatch) -> None:
        if len(event.zero_offsets):
            self._fill(event, event.block, event.zero_offsets, event.fills)
        for offsets, pages in event.page_runs() if _is_regular(event) else [(event.page_offsets, event.pages())]:
            self._store(event, event.block, offsets, pages)

    @staticmethod
    def _without_repeats(event: PageBatch) -> Iterable[PageBatch]:
        """The batch with only the last record for each offset, in any order."""
        reversed_offsets = event.offsets[::-1]
        _, last = np.unique(reversed_offsets, return_index=True)
        keep = len(reversed_offsets) - 1 - last
        yield PageBatch(event.raw, event.offset, event.block, event.headers[keep], event.starts[keep])

    def _apply_payload(self, event: PacketPayload, connection: int) -> None:
        pages = self._unpackers.setdefault(connection, PagesUnpacker()).unpack(event)
        if pages is None:
            self.unreadable_pages += len(event.packet.page_offsets)
        else:
            self._store(event, event.packet.block, event.packet.page_offsets, pages)

    def _apply_single(self, event: CompressedPage | XbzrlePage) -> None:
        block, indexes = self._target(event, event.block, np.array([event.page_offset], np.uint64))
        index = int(indexes[0])
        if isinstance(event, CompressedPage):
            block.pages[index] = unpack_page(event)
        else:
            apply_xbzrle(event, block.pages[index])
        block.received[index] = True

    def _discard(self, event: Command) -> None:
        discard = parse_ram_discard(event)
        for start, length in discard.ranges:
            block = self._blocks.get(discard.block)
            first, last = start // q.TARGET_PAGE_SIZE, (start + length) // q.TARGET_PAGE_SIZE
            if block is None or last > len(block.pages):
                raise WireError(
                    "wire.malformed", f"a range outside RAM block {discard.block!r}", offset=event.offset, section="ram"
                )
            block.pages[first:last] = 0
            block.received[first:last] = False


def _is_regular(event: PageBatch) -> bool:
    steps = np.diff(event.starts[event.is_page])
    return not len(steps) or not (steps != steps[0]).any()
