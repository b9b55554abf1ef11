"""One multifd channel (QEMU's migration/multifd.c, multifd.h, multifd-nocomp.c, multifd-zstd.c).

    hello   be32 magic, be32 version, uuid[16], u8 id, 39 bytes reserved                                       64 bytes
    packet  be32 magic, be32 version, be32 flags, be32 pages_alloc, be32 normal_pages, be32 next_packet_size,
            be64 packet_num, be32 zero_pages, 28 bytes reserved, ramblock[256],
            128 x be64 offset: of the normal pages, then of the zero pages                                  1 344 bytes
            then the normal pages: 4096 bytes each, or next_packet_size bytes compressed
    device  be32 magic, be32 version, be32 flags, idstr[256], be32 instance, be32 next_packet_size             276 bytes
            then next_packet_size bytes of device state (since 10.0)

The head of a packet always has room for 128 offsets, however many pages_alloc says: in a SYNC packet since 9.1 it is 0.
A SYNC may ride on a packet with pages. A SYNC before 9.0 repeats next_packet_size of an earlier packet, and nothing follows:
the number of pages decides.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from sealane import limits
from sealane.wire import constants as q
from sealane.wire.core import Reader
from sealane.wire.events import Bytes, Event, Offsets, Opaque

HELLO_BYTES: Final = 64
PAGES_PER_PACKET: Final = q.MULTIFD_PACKET_SIZE // q.TARGET_PAGE_SIZE
_BLOCK_AT: Final = 64
_OFFSETS_AT: Final = 320
PACKET_HEAD_BYTES: Final = _OFFSETS_AT + 8 * PAGES_PER_PACKET
DEVICE_HEAD_BYTES: Final = 276
_KNOWN_FLAGS: Final = q.MULTIFD_FLAG_SYNC | q.MULTIFD_FLAG_COMPRESSION_MASK | q.MULTIFD_FLAG_DEVICE_STATE

_be32x2 = struct.Struct(">II").unpack_from
_be32x3 = struct.Struct(">III").unpack_from
_HEAD = struct.Struct(">IIIIIIQI").unpack_from


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class MultifdHello(Event):
    """A channel's first message (multifd.c, MultiFDInit_t): whose it is, and its number."""

    uuid: bytes
    channel: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class MultifdPacket(Event):
    """The head of a packet (multifd.h, MultiFDPacket_t). Its pages follow as PacketPages, or PacketPayload if compressed.

    `page_offsets` and `zero_offsets` are uint64, in bytes of `block`.
    """

    flags: int
    packet_num: int
    next_packet_size: int
    block: str
    page_offsets: Offsets
    zero_offsets: Offsets

    @property
    def is_sync(self) -> bool:
        """Whether an epoch ends behind this packet's pages."""
        return bool(self.flags & q.MULTIFD_FLAG_SYNC)

    @property
    def compression(self) -> int:
        """MULTIFD_FLAG_NOCOMP, ZLIB, ZSTD, QPL, UADK or QATZIP, or what a later version has."""
        return self.flags & q.MULTIFD_FLAG_COMPRESSION_MASK


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PacketPages(Event):
    """Pages of `packet` that have arrived: those from `first` on, `pages` is a view of them (n, 4096)."""

    packet: MultifdPacket
    first: int
    pages: Bytes

    @property
    def page_offsets(self) -> Offsets:
        """Where in the block these pages belong."""
        return self.packet.page_offsets[self.first : self.first + len(self.pages)]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PacketPayload(Event):
    """The compressed pages of `packet`, all of them; `payload.PagesUnpacker` opens those of zstd."""

    packet: MultifdPacket


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class DeviceStatePacket(Event):
    """The head of a packet of device state (multifd.h, MultiFDPacketDeviceState_t); its bytes follow as Opaque."""

    flags: int
    name: str
    instance: int
    next_packet_size: int


class MultifdReader(Reader):
    """Reads one multifd channel."""

    def __init__(self, *, carry: bool = False) -> None:
        super().__init__(carry=carry)
        self._packet: MultifdPacket | None = None
        self._pages_read = 0
        self._left = 0  # of a packet of device state, or of one that is passed over

    def _why_not_end_here(self) -> str:
        inside = self._state in (self._pages, self._payload, self._device_state, self._passed_pages)
        return "a channel ended inside a packet" if inside else ""

    def _begin(self, buffer: memoryview, position: int, end: int) -> int:
        self._section = "multifd"
        if end - position < HELLO_BYTES:
            return self._want(HELLO_BYTES)
        self._check_magic(*_be32x2(buffer, position))
        raw = buffer[position : position + HELLO_BYTES]
        self._emit(MultifdHello(raw, self._offset, bytes(raw[8:24]), raw[24]))
        self._state = self._head
        return HELLO_BYTES

    def _check_magic(self, magic: int, version: int) -> None:
        if magic != q.MULTIFD_MAGIC:
            raise self._malformed(f"a multifd packet does not begin with {magic:#010x}")
        if version != q.MULTIFD_VERSION:
            raise self._malformed(f"multifd version {version}, and only {q.MULTIFD_VERSION} is known")

    def _head(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 12:
            return self._want(12)
        magic, version, flags = _be32x3(buffer, position)
        self._check_magic(magic, version)
        if flags & ~_KNOWN_FLAGS:
            self._go_opaque(f"a multifd packet with flags {flags:#x}, which QEMU did not have when this was written")
            return self._state(buffer, position, end)
        if flags & q.MULTIFD_FLAG_DEVICE_STATE:
            return self._device_head(buffer, position, end, flags)
        if end - position < PACKET_HEAD_BYTES:
            return self._want(PACKET_HEAD_BYTES)
        if self.quiet:
            return self._pass_over_packet(buffer[position : position + PACKET_HEAD_BYTES], flags)
        packet = self._parse_head(buffer[position : position + PACKET_HEAD_BYTES])
        self._emit(packet)
        self._packet = packet
        if len(packet.page_offsets):
            self._pages_read = 0
            self._state = self._payload if packet.compression else self._pages
        return PACKET_HEAD_BYTES

    def _parse_head(self, raw: memoryview) -> MultifdPacket:
        _, _, flags, pages_alloc, normal, size, number, zero = _HEAD(raw)
        if pages_alloc > PAGES_PER_PACKET or normal + zero > PAGES_PER_PACKET:
            raise self._malformed(f"a packet of {normal} pages and {zero} zero pages in {pages_alloc}")
        name = bytes(raw[_BLOCK_AT:_OFFSETS_AT])
        if b"\0" not in name:
            raise self._malformed("the name of a RAM block does not end")
        block = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        offsets = np.frombuffer(raw, ">u8", normal + zero, _OFFSETS_AT).astype(np.uint64)
        if (offsets % q.TARGET_PAGE_SIZE).any():
            raise self._malformed("a page's offset is not a multiple of its size")
        if normal and not flags & q.MULTIFD_FLAG_COMPRESSION_MASK and size != normal * q.TARGET_PAGE_SIZE:
            raise self._malformed(f"a packet of {normal} pages in {size} bytes")
        if normal and size > limits.WIRE_PACKET_PAYLOAD_MAX:
            raise self._beyond(f"a packet of {size} bytes")
        return MultifdPacket(raw, self._offset, flags, number, size, block, offsets[:normal], offsets[normal:])

    def _pass_over_packet(self, raw: memoryview, flags: int) -> int:
        """Quietly: an event for a SYNC alone, and none for pages."""
        _, _, _, pages_alloc, normal, size, number, zero = _HEAD(raw)
        is_plain = not flags & q.MULTIFD_FLAG_COMPRESSION_MASK
        if normal + zero > PAGES_PER_PACKET or (normal and is_plain and size != normal * q.TARGET_PAGE_SIZE):
            raise self._malformed(f"a packet of {normal} pages and {zero} zero pages in {pages_alloc}, {size} bytes")
        if normal and size > limits.WIRE_PACKET_PAYLOAD_MAX:
            raise self._beyond(f"a packet of {size} bytes")
        if flags & q.MULTIFD_FLAG_SYNC:
            none = np.empty(0, np.uint64)
            self._emit(MultifdPacket(raw, self._offset, flags, number, size, "", none, none))
        self._left = size if normal else 0
        if self._left:
            self._state = self._passed_pages
        return PACKET_HEAD_BYTES

    def _passed_pages(self, buffer: memoryview, position: int, end: int) -> int:
        used = min(end - position, self._left)
        if not self.quiet:
            self._emit(
                Opaque(buffer[position : position + used], self._offset, "pages of a packet that was passed over")
            )
        self._left -= used
        if not self._left:
            self._state = self._head
        return used

    def _pages(self, buffer: memoryview, position: int, end: int) -> int:
        """As many whole pages of the packet as are here."""
        packet = self._packet
        if packet is None:
            raise self._malformed("pages without a packet")
        count = min((end - position) // q.TARGET_PAGE_SIZE, len(packet.page_offsets) - self._pages_read)
        if not count:
            return self._want(q.TARGET_PAGE_SIZE)
        raw = buffer[position : position + count * q.TARGET_PAGE_SIZE]
        pages = np.frombuffer(raw, np.uint8).reshape(count, q.TARGET_PAGE_SIZE)
        self._emit(PacketPages(raw, self._offset, packet, self._pages_read, pages))
        self._pages_read += count
        if self._pages_read == len(packet.page_offsets):
            self._state = self._head
        return len(raw)

    def _payload(self, buffer: memoryview, position: int, end: int) -> int:
        packet = self._packet
        if packet is None or not packet.next_packet_size:
            raise self._malformed("a packet of pages without a payload")
        if end - position < packet.next_packet_size:
            return self._want(packet.next_packet_size)
        raw = buffer[position : position + packet.next_packet_size]
        self._emit(PacketPayload(raw, self._offset, packet))
        self._state = self._head
        return len(raw)

    def _device_head(self, buffer: memoryview, position: int, end: int, flags: int) -> int:
        if end - position < DEVICE_HEAD_BYTES:
            return self._want(DEVICE_HEAD_BYTES)
        raw = buffer[position : position + DEVICE_HEAD_BYTES]
        name = bytes(raw[12:268])
        if b"\0" not in name:
            raise self._malformed("the name of a device does not end")
        instance, size = _be32x2(raw, 268)
        text = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        self._emit(DeviceStatePacket(raw, self._offset, flags, text, instance, size))
        self._left = size
        if size:
            self._state = self._device_state
        return DEVICE_HEAD_BYTES

    def _device_state(self, buffer: memoryview, position: int, end: int) -> int:
        used = min(end - position, self._left)
        self._emit(Opaque(buffer[position : position + used], self._offset, "device state"))
        self._left -= used
        if not self._left:
            self._state = self._head
        return used
