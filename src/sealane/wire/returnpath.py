"""What the destination says on the main channel's other direction (QEMU's migration/migration.c, migrate_send_rp_message).

    be16 type, be16 length, payload
    RECV_BITMAP is followed by: be64 size, that many bytes, be64 RAMBLOCK_RECV_BITMAP_ENDING (ram.c, outside the length)

Types that are not known come out like the others: their length stands there.
"""

import struct
from dataclasses import dataclass
from typing import Final

from sealane.wire import constants as q
from sealane.wire.core import Reader
from sealane.wire.events import Event, Opaque

BITMAP: Final = "a bitmap of received pages"
_be16x2 = struct.Struct(">HH").unpack_from
_be32 = struct.Struct(">I").unpack_from
_be64 = struct.Struct(">Q").unpack_from


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ReturnMessage(Event):
    """One message. The fields are None where the type has them not.

    `value` is SHUT's and RESUME_ACK's status and PONG's number; REQ_PAGES and REQ_PAGES_ID ask for `length` bytes at
    `start`, of `block` or of the block of the request before; RECV_BITMAP names its `block`.
    """

    type: int
    payload: memoryview
    value: int | None = None
    start: int | None = None
    length: int | None = None
    block: str | None = None

    @property
    def name(self) -> str:
        """QEMU's name of the type, or its number."""
        return q.RETURN_PATH_NAMES.get(self.type, str(self.type))


class ReturnPathReader(Reader):
    """Reads the return path."""

    def __init__(self, *, carry: bool = False) -> None:
        super().__init__(carry=carry)
        self._left = 0

    def _why_not_end_here(self) -> str:
        return "" if self._state in (self._begin, self._opaque) else "the return path ended inside a bitmap"

    def _begin(self, buffer: memoryview, position: int, end: int) -> int:
        self._section = "return path"
        if end - position < 4:
            return self._want(4)
        kind, length = _be16x2(buffer, position)
        if q.RETURN_PATH_LENGTHS.get(kind, length) != length:
            raise self._malformed(f"message {q.RETURN_PATH_NAMES[kind]} with {length} bytes")
        if end - position < 4 + length:
            return self._want(4 + length)
        raw = buffer[position : position + 4 + length]
        self._emit(self._message(raw, kind))
        if kind == q.MIG_RP_MSG_RECV_BITMAP:
            self._state = self._bitmap_size
        return len(raw)

    def _message(self, raw: memoryview, kind: int) -> ReturnMessage:
        payload = raw[4:]
        if kind in (q.MIG_RP_MSG_SHUT, q.MIG_RP_MSG_PONG, q.MIG_RP_MSG_RESUME_ACK):
            return ReturnMessage(raw, self._offset, kind, payload, value=_be32(payload)[0])
        if kind in (q.MIG_RP_MSG_REQ_PAGES, q.MIG_RP_MSG_REQ_PAGES_ID):
            if len(payload) < 12:
                raise self._malformed(f"message REQ_PAGES_ID with {len(payload)} bytes")
            block = self._block(payload[12:]) if kind == q.MIG_RP_MSG_REQ_PAGES_ID else None
            start, length = _be64(payload)[0], _be32(payload, 8)[0]
            return ReturnMessage(raw, self._offset, kind, payload, start=start, length=length, block=block)
        if kind == q.MIG_RP_MSG_RECV_BITMAP:
            return ReturnMessage(raw, self._offset, kind, payload, block=self._block(payload))
        return ReturnMessage(raw, self._offset, kind, payload)

    def _block(self, data: memoryview) -> str:
        if len(data) < 2 or data[0] != len(data) - 1:
            raise self._malformed("the name of a RAM block does not fit its message")
        return bytes(data[1:]).decode("utf-8", "surrogateescape")

    def _bitmap_size(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 8:
            return self._want(8)
        self._left = _be64(buffer, position)[0]
        self._emit(Opaque(buffer[position : position + 8], self._offset, BITMAP))
        self._state = self._bitmap if self._left else self._bitmap_end
        return 8

    def _bitmap(self, buffer: memoryview, position: int, end: int) -> int:
        used = min(end - position, self._left)
        self._emit(Opaque(buffer[position : position + used], self._offset, BITMAP))
        self._left -= used
        if not self._left:
            self._state = self._bitmap_end
        return used

    def _bitmap_end(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 8:
            return self._want(8)
        if _be64(buffer, position)[0] != q.RAMBLOCK_RECV_BITMAP_ENDING:
            raise self._malformed("a bitmap does not end as it should")
        self._emit(Opaque(buffer[position : position + 8], self._offset, BITMAP))
        self._state = self._begin
        return 8
