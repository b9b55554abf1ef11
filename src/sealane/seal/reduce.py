"""Fewer bytes: QEMU's stream without the pages that the destination has already.

A reducer follows one lane from its first byte. While it is not active, what it is fed is to be sent as it is. While it is
active, it gives the bytes to send instead: the same stream, but

* records of pages that need not be sent (`seal.seen`) are missing, and a page of zeros becomes a zero-page record;
* multifd packets name fewer pages, carry fewer, and say so in their counts.

QEMU at the other end reads a valid stream, and nobody there needs to know. Rules:

 1. a RAM record that names its block is always sent, so that a record that continues a block continues the right one;
 2. what cannot be read is sent as it is: never dropped, never an error; on the main channel it also ends leaving out (rule 3);
 3. postcopy's commands, and anything behind RAM, end leaving out for the whole migration: they throw pages away;
 4. nothing is held back but one element that has not arrived whole: a record, or a multifd packet with its pages.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane import wire
from sealane.seal.digests import PAGE_BYTES, Digests, PageDigests, Pages
from sealane.seal.seen import Mask, PagesSeen
from sealane.wire import constants as q
from sealane.wire.core import Reader
from sealane.wire.sniff import SNIFF_BYTES
from sealane.wire.writer import encode

Piece: TypeAlias = bytes | memoryview

_RECORD_BYTES: Final = 8 + PAGE_BYTES
# What is cut is mostly a page, with its header and perhaps a name; anything longer the reader keeps itself.
TAIL_MAX: Final = 2 * PAGE_BYTES
_ENDS_LEAVING_OUT: Final = frozenset(
    {
        q.MIG_CMD_POSTCOPY_LISTEN,
        q.MIG_CMD_POSTCOPY_RUN,
        q.MIG_CMD_POSTCOPY_RAM_DISCARD,
        q.MIG_CMD_POSTCOPY_RESUME,
        q.MIG_CMD_RECV_BITMAP,
        q.MIG_CMD_ENABLE_COLO,
    }
)


@dataclass
class _Packet:
    """A multifd packet whose pages have not all come."""

    head: wire.MultifdPacket
    parts: list[wire.PacketPages]
    missing: int
    as_it_is: bool  # a part of it was sent before


class LaneReducer:
    """The stream of one lane, towards the destination. One thread feeds it; `seen` is shared with the other lanes'."""

    def __init__(self, seen: PagesSeen, lane: int, key: bytes) -> None:
        self._seen, self._lane = seen, lane
        self._digests = PageDigests(key)
        self._zero_digest = self._digests.of(np.zeros((1, PAGE_BYTES), np.uint8))[0]
        self._first = b""
        self._reader: Reader | None = None
        self._is_main = False
        self._has_flush = False
        self._packet: _Packet | None = None
        self._fed = 0  # bytes of QEMU's
        self._sent = 0  # of these, so many went out as they were
        self._active = False
        self._tail = b""
        self._gave_up = False
        self._out: list[Piece] = []
        self.same_bytes = 0  # left out because the destination has them
        self.zero_bytes = 0  # left out because they were zeros

    @property
    def active(self) -> bool:
        """Whether `feed` gives what is to be sent."""
        return self._active

    @property
    def follows(self) -> bool:
        """Whether this is a stream that can be read: to be active is of use."""
        return self._reader is not None and (self._reader.error is None)

    def give_up(self) -> None:
        """Follow no more: nothing is left out from now on, by no lane. Bytes still come out of `feed` while it is active."""
        if not self._active:
            self._gave_up, self._reader = True, None
            self._seen.stop()

    def activate(self) -> None:
        """From the next `feed` on, bytes come out of it."""
        self._active = True
        self._sent = self._fed

    def deactivate(self) -> list[Piece]:
        """What was held back, to be sent now: from the next `feed` on everything goes as it is. Also for the stream's end."""
        if not self._active:
            return []
        self._active = False
        out: list[Piece] = []
        if self._packet is not None and not self._packet.as_it_is:
            out += [self._packet.head.raw, *(part.raw for part in self._packet.parts)]
            self._forget_packet(self._packet.head)
            self._packet.as_it_is = True
            self._packet.parts.clear()
        if self._reader is not None:
            pending = self._tail or self._reader.pending
            out.append(pending[max(0, self._sent - self._reader.offset) :])
            if self._tail:  # the reader goes on with what it gave back
                self._reader.feed(self._tail)
                self._tail = b""
        self._sent = self._fed
        return [piece for piece in out if len(piece)]

    @property
    def tail(self) -> bytes:
        """The beginning of an element that was cut, at most TAIL_MAX bytes: to stand in front of the next piece."""
        return self._tail

    def feed(self, piece: memoryview) -> list[Piece] | None:
        """`tail` and QEMU's next bytes. None: send `piece` itself. Otherwise what to send, valid until the next `feed`."""
        if self._gave_up:
            return [piece] if self._active else None
        self._fed += len(piece) - len(self._tail)
        self._tail = b""
        unread = not self._active and self._seen.may_pass_unread
        if self._reader is not None:
            self._reader.quiet = unread
        events = self._read(piece)
        if self._is_unreadable:
            self._seen.passed_unread(self._lane)
        if self._active and self._reader is not None:
            self._out = []
            for event in events:
                self._reduce(event)
            self._keep_packet()
            self._keep_tail(self._reader)
            return self._out
        for event in events:
            self._follow(event, unread)
        self._sent = self._fed
        return [piece] if self._active else None

    @property
    def _is_unreadable(self) -> bool:
        """Whether pages may go by that nobody can see."""
        if self._reader is None:
            return len(self._first) >= SNIFF_BYTES
        return self._reader.error is not None

    def _keep_tail(self, reader: Reader) -> None:
        if 0 < len(reader.pending) <= TAIL_MAX:
            self._tail = reader.take_back()

    def _read(self, piece: memoryview) -> list[wire.Event]:
        if self._reader is not None:
            return self._reader.feed(piece)
        if len(self._first) >= SNIFF_BYTES:  # a kind of connection that nobody follows
            return []
        self._first += bytes(piece)
        if len(self._first) < SNIFF_BYTES:
            return []
        reader = wire.reader_for(self._first, carry=True)
        if not isinstance(reader, (wire.StreamReader, wire.MultifdReader)):
            return []
        self._reader, self._is_main = reader, isinstance(reader, wire.StreamReader)
        return reader.feed(self._first)

    # ---- not active: only what others must know

    def _follow(self, event: wire.Event, unread: bool) -> None:
        match event:
            case wire.PageBatch():
                if not unread:
                    self._seen.forget(self._lane, event.block, event.offsets)
            case wire.MultifdPacket():
                if not unread:
                    self._forget_packet(event)
                self._begin_packet(event, as_it_is=True)
            case wire.PacketPages() | wire.PacketPayload():
                self._end_packet(event)
            case _:
                self._note(event)

    def _note(self, event: wire.Event) -> None:
        """Events that say something about order, blocks or the end of leaving out."""
        match event:
            case wire.RamBlockListed():
                self._seen.list_block(event.name, event.length)
            case wire.MultifdFlush():
                self._has_flush = True
                self._seen.next_epoch(self._lane)
            case wire.RamSectionEnded():
                if not self._has_flush:
                    self._seen.next_epoch(self._lane)
            case wire.XbzrlePage() | wire.CompressedPage():
                self._seen.forget(self._lane, event.block, np.array([event.page_offset], np.uint64))
            case wire.Opaque() | wire.PackageBegun() if self._is_main:
                self._seen.stop()
            case wire.Command() if event.number in _ENDS_LEAVING_OUT:
                self._seen.stop()
            case _:
                pass

    # ---- active

    def _reduce(self, event: wire.Event) -> None:
        already = self._sent - event.offset
        match event:
            case wire.PageBatch():
                self._reduce_batch(event, already)
            case wire.MultifdPacket():
                self._begin_packet(event, as_it_is=already > 0)
                if already > 0:
                    self._forget_packet(event)
                    self._send_rest(event, already)
                self._finish_packet()
            case wire.PacketPages():
                self._add_pages(event, already)
            case wire.PacketPayload():
                self._pass_payload(event, already)
            case _:
                self._note(event)
                self._send_rest(event, already)

    def _send_rest(self, event: wire.Event, already: int) -> None:
        raw = event.raw[already:] if already > 0 else event.raw
        if len(raw):
            self._out.append(raw)

    # RAM records of the main channel

    def _reduce_batch(self, batch: wire.PageBatch, already: int) -> None:
        is_page = batch.is_page
        digests = self._digests_of(batch, is_page)
        needed = self._seen.needed(self._lane, batch.block, batch.offsets, digests)
        if already > 0:
            self._send_rest(batch, already)
            return
        is_zero = is_page & (digests == self._zero_digest).all(axis=1)
        keep = needed | ~is_page
        if not int(batch.headers[0]) & q.RAM_SAVE_FLAG_CONTINUE:  # rule 1
            keep[0], is_zero[0] = True, False
        is_zero &= keep
        if keep.all() and not is_zero.any():
            self._out.append(batch.raw)
            return
        self.same_bytes += _RECORD_BYTES * int((~keep).sum())
        self.zero_bytes += PAGE_BYTES * int(is_zero.sum())
        self._send_records(batch, keep & ~is_zero, is_zero, is_page)

    def _digests_of(self, batch: wire.PageBatch, is_page: Mask) -> Digests:
        digests = np.zeros((len(is_page), 2), np.uint64)
        if not is_page.all():
            fills = np.frombuffer(batch.raw, np.uint8)[batch.starts]
            digests[~is_page & (fills == 0)] = self._zero_digest
        runs = [self._digests.of(pages) for _, pages in batch.page_runs()]
        if runs:
            digests[is_page] = np.concatenate(runs)
        return digests

    def _send_records(self, batch: wire.PageBatch, whole: Mask, is_zero: Mask, is_page: Mask) -> None:
        """The records of `whole` in runs as they are, those of `is_zero` as zero pages, in order."""
        heads = batch.starts - 8
        heads[0] = 0
        ends = batch.starts + np.where(is_page, PAGE_BYTES, 1)
        kinds = whole + 2 * is_zero.astype(np.uint8)
        edges = np.flatnonzero(np.diff(kinds)) + 1
        for first, after in pairwise([0, *edges.tolist(), len(kinds)]):
            if kinds[first] == 1:
                self._out.append(batch.raw[int(heads[first]) : int(ends[after - 1])])
            elif kinds[first]:
                self._out.append(_zero_records(batch.headers[first:after]))

    # multifd

    def _begin_packet(self, head: wire.MultifdPacket, *, as_it_is: bool) -> None:
        self._packet = _Packet(head, [], len(head.page_offsets), as_it_is)
        if not self._active and not self._packet.missing:
            self._close_packet()

    def _forget_packet(self, head: wire.MultifdPacket) -> None:
        for offsets in (head.page_offsets, head.zero_offsets):
            if len(offsets):
                self._seen.forget(self._lane, head.block, offsets)

    def _add_pages(self, event: wire.PacketPages, already: int) -> None:
        packet = self._packet
        if packet is None or packet.as_it_is:
            self._send_rest(event, already)
            self._end_packet(event)
            return
        packet.parts.append(event)
        packet.missing -= len(event.pages)
        self._finish_packet()

    def _pass_payload(self, event: wire.PacketPayload, already: int) -> None:
        packet = self._packet
        if packet is not None and not packet.as_it_is:
            self._forget_packet(packet.head)
            self._out.append(packet.head.raw)
        self._send_rest(event, already)
        self._end_packet(event)

    def _end_packet(self, event: wire.PacketPages | wire.PacketPayload) -> None:
        """Count the pages of a packet that goes as it is."""
        if self._packet is not None:
            self._packet.missing -= len(event.pages) if isinstance(event, wire.PacketPages) else self._packet.missing
            if self._packet.missing <= 0:
                self._close_packet()

    def _finish_packet(self) -> None:
        """Send the packet, once all its pages are here, without those that are not needed."""
        packet = self._packet
        if packet is None or packet.missing > 0:
            return
        if not packet.as_it_is:
            self._reduce_packet(packet)
        self._close_packet()

    def _close_packet(self) -> None:
        if self._packet is not None and self._packet.head.is_sync:
            self._seen.next_epoch(self._lane)
        self._packet = None

    def _reduce_packet(self, packet: _Packet) -> None:
        head = packet.head
        if len(head.zero_offsets):
            zeros = np.broadcast_to(self._zero_digest, (len(head.zero_offsets), 2))
            self._seen.needed(self._lane, head.block, head.zero_offsets, zeros)
        if not len(head.page_offsets):
            self._out.append(head.raw)
            return
        digests = np.concatenate([self._digests.of(part.pages) for part in packet.parts])
        keep = self._seen.needed(self._lane, head.block, head.page_offsets, digests)
        left_out = len(keep) - int(keep.sum())
        if not left_out:
            self._out += [head.raw, *(part.raw for part in packet.parts)]
            return
        self.same_bytes += PAGE_BYTES * left_out
        offsets = head.page_offsets[keep]
        self._out.append(encode(replace(head, page_offsets=offsets, next_packet_size=PAGE_BYTES * len(offsets))))
        for part in packet.parts:
            self._out += _kept(part.pages, keep[part.first : part.first + len(part.pages)])

    def _keep_packet(self) -> None:
        """The caller's buffer will be used again: copy what is held of it."""
        packet = self._packet
        if packet is None or packet.as_it_is:
            return
        packet.head = replace(packet.head, raw=memoryview(bytes(packet.head.raw)))
        for at, part in enumerate(packet.parts):
            if isinstance(part.raw.obj, bytes):
                continue
            raw = memoryview(bytes(part.raw))
            pages = np.frombuffer(raw, np.uint8).reshape(part.pages.shape)
            packet.parts[at] = replace(part, raw=raw, pages=pages)


def _zero_records(headers: NDArray[np.uint64]) -> memoryview:
    """Records of zero pages that continue the block, for the pages of these headers (ram.c, save_zero_page)."""
    records = np.zeros((len(headers), 9), np.uint8)
    addresses = headers & ~np.uint64(PAGE_BYTES - 1)
    flags = np.uint64(q.RAM_SAVE_FLAG_ZERO | q.RAM_SAVE_FLAG_CONTINUE)
    records[:, :8] = (addresses | flags).astype(">u8").view(np.uint8).reshape(-1, 8)
    return records.data.cast("B")


def _kept(pages: Pages, keep: Mask) -> list[Piece]:
    """Views of the pages to send, a run each."""
    edges = np.flatnonzero(np.diff(keep)) + 1
    bounds = pairwise([0, *edges.tolist(), len(keep)])
    return [pages[first:after].data.cast("B") for first, after in bounds if keep[first]]
