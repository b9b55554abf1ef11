"""Pages out of compressed payloads: zstd and zlib of multifd, XBZRLE and COMPRESS_PAGE of the main channel.

Every function gives whole pages or raises WireError; none makes more bytes than pages were announced.
"""

import zlib
from typing import Final, Protocol

import numpy as np
import zstandard

from sealane.errors import WireError
from sealane.wire import constants as q
from sealane.wire.events import Bytes, CompressedPage, XbzrlePage
from sealane.wire.multifd import PacketPayload

_PAGE: Final = q.TARGET_PAGE_SIZE
# QEMU's compressor writes windows of at most 8 MiB (level 20 and above could do more, and ask the receiver for it)
_ZSTD_WINDOW_MAX: Final = 1 << 27


class _Context(Protocol):
    def unpack(self, data: memoryview, most: int) -> bytes:
        """What `data` holds, `most` bytes at most and one more to see that there is more."""


class _Zlib:
    """One deflate stream over a channel's whole life (multifd-zlib.c)."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def unpack(self, data: memoryview, most: int) -> bytes:
        return self._stream.decompress(data, most + 1)


class _Zstd:
    """One zstd stream over a channel's whole life (multifd-zstd.c). Fed in small pieces, so that its output is bounded."""

    # A block of zstd makes 128 KiB at most, and the smallest one takes 4 bytes: a piece makes 32 MiB at the very most, and
    # what goes beyond the packet's pages ends it there.
    _PIECE: Final = 1024

    def __init__(self) -> None:
        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).decompressobj()

    def unpack(self, data: memoryview, most: int) -> bytes:
        parts = []
        size = 0
        for at in range(0, len(data), self._PIECE):
            part = self._stream.decompress(data[at : at + self._PIECE])
            parts.append(part)
            size += len(part)
            if size > most:
                break
        return b"".join(parts)


class PagesUnpacker:
    """Opens the compressed packets of one channel, which must come in order: each goes on where the last one ended."""

    def __init__(self) -> None:
        self._context: _Context | None = None
        self._compression = 0

    def unpack(self, payload: PacketPayload) -> Bytes | None:
        """The pages (n, 4096) in the order of `page_offsets`; None where the method is one that cannot be read here."""
        packet = payload.packet
        if packet.compression not in (q.MULTIFD_FLAG_ZSTD, q.MULTIFD_FLAG_ZLIB):
            return None
        if self._context is None:
            self._compression = packet.compression
            self._context = _Zstd() if packet.compression == q.MULTIFD_FLAG_ZSTD else _Zlib()
        elif packet.compression != self._compression:
            raise _misfit(payload.offset, "a channel changed its compression")
        size = len(packet.page_offsets) * _PAGE
        try:
            data = self._context.unpack(payload.raw, size)
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise _misfit(payload.offset, f"a compressed packet does not open: {error}") from error
        if len(data) != size:
            raise _misfit(payload.offset, f"a compressed packet of {size} bytes has {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(-1, _PAGE)


def _misfit(offset: int, detail: str, section: str = "multifd") -> WireError:
    return WireError("wire.malformed", detail, offset=offset, section=section)


def unpack_page(event: CompressedPage) -> Bytes:
    """The page of a COMPRESS_PAGE record (ram-compress.c): 4096 bytes."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(event.data, _PAGE + 1)
    except zlib.error as error:
        raise _misfit(event.offset, f"a compressed page does not open: {error}", "ram") from error
    if len(data) != _PAGE:
        raise _misfit(event.offset, "a compressed page is none", "ram")
    return np.frombuffer(data, np.uint8)


def apply_xbzrle(event: XbzrlePage, page: Bytes) -> None:
    """Changes `page` (4096 bytes, writable) by what the record says (xbzrle.c, xbzrle_decode_buffer).

    The data are pairs: how many bytes stay, then how many change and which; both counts as ULEB128 of two bytes at most.
    """
    data, at, to = event.data, 0, 0
    while at < len(data):
        kept, at = _count(event, at)
        changed, at = _count(event, at)
        to += kept
        if not changed or to + changed > _PAGE or at + changed > len(data):
            raise _misfit(event.offset, "an XBZRLE page does not fit", "ram")
        page[to : to + changed] = np.frombuffer(data[at : at + changed], np.uint8)
        to += changed
        at += changed


def _count(event: XbzrlePage, at: int) -> tuple[int, int]:
    data = event.data
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    if at + 1 < len(data) and data[at + 1] < 0x80:
        return data[at] & 0x7F | data[at + 1] << 7, at + 2
    raise _misfit(event.offset, "an XBZRLE page does not fit", "ram")
