"""libvirt's remote protocol as far as a migration goes: messages, their headers, XDR values. No I/O.

     0        4         8         12          16       20       24         28
    +--------+---------+---------+-----------+--------+--------+----------+---------...
    | length | program | version | procedure |  type  | serial |  status  | arguments
    +--------+---------+---------+-----------+--------+--------+----------+---------...

Big-endian 32-bit words; `length` counts itself. Arguments are XDR (RFC 4506): strings and byte strings with a length before and
zeros up to the next multiple of four. Source: libvirt's src/rpc/virnetprotocol.x and src/remote/remote_protocol.x.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sealane.errors import PeerError
from sealane.limits import RPC_MESSAGE_MAX, RPC_PARAMETERS_MAX

_LENGTH_BYTES: Final = 4
_HEADER: Final = struct.Struct(">IIiiIi")
HEADER_BYTES: Final = _LENGTH_BYTES + _HEADER.size

REMOTE_PROGRAM: Final = 0x20008086
KEEPALIVE_PROGRAM: Final = 0x6B656570
PROTOCOL_VERSION: Final = 1
UUID_BYTES: Final = 16


class Procedure(IntEnum):
    """Procedures of the remote program that a migration uses; libvirt's names without REMOTE_PROC_."""

    CONNECT_OPEN = 1
    CONNECT_CLOSE = 2
    DOMAIN_LOOKUP_BY_NAME = 23
    DOMAIN_LOOKUP_BY_UUID = 24
    CONNECT_SUPPORTS_FEATURE = 60
    AUTH_LIST = 66
    DOMAIN_GET_STATE = 212
    DOMAIN_MIGRATE_BEGIN3_PARAMS = 302
    DOMAIN_MIGRATE_PREPARE3_PARAMS = 303
    DOMAIN_MIGRATE_PERFORM3_PARAMS = 305
    DOMAIN_MIGRATE_FINISH3_PARAMS = 306
    DOMAIN_MIGRATE_CONFIRM3_PARAMS = 307


class MessageType(IntEnum):
    """What a message is (virNetMessageType); streams and descriptors are never let through."""

    CALL = 0
    REPLY = 1
    MESSAGE = 2


@dataclass(frozen=True)
class RpcMessage:
    """One message; `raw` is all of it, `arguments` what follows the header."""

    program: int
    version: int
    procedure: int
    kind: int
    serial: int
    status: int
    raw: bytes

    @property
    def arguments(self) -> bytes:
        """What follows the header."""
        return self.raw[HEADER_BYTES:]

    def __repr__(self) -> str:
        who = f"program {self.program:#x} procedure {self.procedure}"
        return f"RpcMessage({who} type {self.kind} serial {self.serial}, {len(self.raw)} bytes)"


class MessageReader:
    """Cuts a byte stream into messages; holds at most one, of at most RPC_MESSAGE_MAX bytes, and what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[RpcMessage]:
        """The messages that are complete now; raises PeerError `libvirt.malformed`."""
        self._buffer += data
        found = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
            if not HEADER_BYTES <= length <= RPC_MESSAGE_MAX or length % 4:
                raise malformed(f"a message of {length} bytes")
            if len(self._buffer) - start < length:
                break
            raw = bytes(self._buffer[start : start + length])
            program, version, procedure, kind, serial, status = _HEADER.unpack_from(raw, _LENGTH_BYTES)
            found.append(RpcMessage(program, version, procedure, kind, serial, status, raw))
            start += length
        del self._buffer[:start]
        return found

    @property
    def is_between_messages(self) -> bool:
        """Whether nothing of a message waits for its rest."""
        return not self._buffer


Value = int | float | bool | str


class XdrReader:
    """Takes values off XDR bytes; every method raises PeerError `libvirt.malformed` where they do not fit."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise malformed("arguments end too early")
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def int32(self) -> int:
        """A signed 32-bit word."""
        return int.from_bytes(self._take(4), "big", signed=True)

    def uint32(self) -> int:
        """An unsigned 32-bit word."""
        return int.from_bytes(self._take(4), "big")

    def boolean(self) -> bool:
        """A word that is 0 or 1."""
        word = self.uint32()
        if word > 1:
            raise malformed(f"{word} is neither true nor false")
        return bool(word)

    def opaque(self) -> bytes:
        """Bytes with their length before them."""
        length = self.uint32()
        data = self._take(length)
        if any(self._take(-length % 4)):
            raise malformed("padding that is not zero")
        return data

    def string(self) -> str:
        """Text; libvirt's is UTF-8 and has no zero byte."""
        data = self.opaque()
        if b"\0" in data:
            raise malformed("a zero byte in a string")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise malformed("a string that is not UTF-8") from None

    def domain(self) -> tuple[str, bytes, int]:
        """A remote_nonnull_domain: name, UUID, id."""
        return self.string(), self._take(UUID_BYTES), self.int32()

    def uuid(self) -> bytes:
        """The 16 bytes of a UUID."""
        return self._take(UUID_BYTES)

    def typed_parameters(self) -> Mapping[str, Value]:
        """A list of remote_typed_param, each name once."""
        count = self.uint32()
        if count > RPC_PARAMETERS_MAX:
            raise malformed(f"{count} parameters")
        found: dict[str, Value] = {}
        for _ in range(count):
            name = self.string()
            if name in found:
                raise malformed("a parameter comes twice")
            found[name] = self._value()
        return found

    def _value(self) -> Value:
        match self.int32():
            case 1:
                return self.int32()
            case 2:
                return self.uint32()
            case 3:
                return int.from_bytes(self._take(8), "big", signed=True)
            case 4:
                return int.from_bytes(self._take(8), "big")
            case 5:
                return float(struct.unpack(">d", self._take(8))[0])
            case 6:
                return self.boolean()
            case 7:
                return self.string()
            case kind:
                raise malformed(f"a parameter of type {kind}")

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise malformed(f"{len(self._data) - self._at} bytes too many")


def malformed(what: str) -> PeerError:
    """The error for bytes that are not libvirt's protocol."""
    return PeerError("libvirt.malformed", what)
