"""The events of all connections of one migration, in an order in which they can be applied.

The main channel and the multifd channels run beside each other, and meet at syncs: what the channels carry before their
SYNC number n belongs before what the main channel says behind its own sync number n. The main channel's sync is MULTIFD_FLUSH
where the machine type is 8.1 or later, and every RAM EOS before (ram.c, multifd-flush-after-each-section). Which of them
holds shows in RAM's first section: it ends with a sync in either case.

Between two syncs, packets of all channels go by packet_num, which counts them in the order of sending.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from sealane.wire.events import Event, MultifdFlush, RamSectionEnded
from sealane.wire.multifd import MultifdHello, MultifdPacket, PacketPages, PacketPayload

# the connection's number and the event
Numbered: TypeAlias = tuple[int, Event]
_Group: TypeAlias = tuple[int, list[Numbered]]


def in_order(
    main: Iterator[Event], channels: Sequence[Iterator[Event]], others: Sequence[Iterator[Event]] = ()
) -> Iterator[Numbered]:
    """All events: connection 0 is `main`, then `channels`, then `others` (postcopy's, which come behind all of them)."""
    groups = [_Channel(number, events) for number, events in enumerate(channels, 1)]
    has_flush = False
    for event in main:
        yield 0, event
        if isinstance(event, MultifdFlush):
            has_flush = True
        is_sync = isinstance(event, MultifdFlush) if has_flush else isinstance(event, RamSectionEnded)
        if is_sync:
            yield from _epoch(groups)
    while any(not group.is_over for group in groups):
        yield from _epoch(groups)
    for number, events in enumerate(others, len(channels) + 1):
        for event in events:
            yield number, event


def _epoch(groups: "list[_Channel]") -> Iterator[Numbered]:
    for _, events in heapq.merge(*(group.until_sync() for group in groups), key=lambda group: group[0]):
        yield from events


class _Channel:
    """One channel's packets, each with its pages."""

    def __init__(self, number: int, events: Iterator[Event]) -> None:
        self._number = number
        self._events = events
        self.is_over = False

    def until_sync(self) -> Iterator[_Group]:
        """The packets up to and with the next SYNC; the rest where there is none."""
        packet: MultifdPacket | None = None
        group: list[Numbered] = []
        missing = 0
        for event in self._events:
            group.append((self._number, event))
            if isinstance(event, MultifdPacket):
                packet = event
                missing = len(event.page_offsets)
            elif isinstance(event, PacketPages):
                missing -= len(event.pages)
            elif isinstance(event, PacketPayload):
                missing = 0
            if missing:
                continue
            yield (0 if packet is None or isinstance(event, MultifdHello) else packet.packet_num), group
            group = []
            if packet is not None and packet.is_sync and not isinstance(event, MultifdHello):
                return
        if group:
            yield (0, group)
        self.is_over = True
