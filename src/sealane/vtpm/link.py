"""Between a VM's keeper and the enclave of its migration: frames on a stream socket, the keeper asking.

    keeper   Wanted(type)            QEMU wants this state to send it
    enclave    Read(type)            tpm_state_read
    keeper     Answer(type, state)
    enclave  Done(type, sealed)      volatile_state_enc

    keeper   Offered(type, sealed)   QEMU brings this state
    enclave    Write(type, state)    volatile_state_dec, tpm_state_write
    keeper     Answer(type)
    enclave  Done(type)

Either answers Refused instead, and that is the end of it. A frame: u8 what, u8 type, u32 length (big-endian), the bytes.
"""

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sealane.errors import InternalError
from sealane.limits import VTPM_BLOB_MAX
from sealane.vtpm.control import BlobType
from sealane.vtpm.envelope import OVERHEAD_BYTES

_HEADER: Final = struct.Struct(">BBI")
FRAME_MAX: Final = VTPM_BLOB_MAX + OVERHEAD_BYTES


class What(IntEnum):
    """What a frame says."""

    WANTED = 1
    OFFERED = 2
    READ = 3
    WRITE = 4
    ANSWER = 5
    DONE = 6
    REFUSED = 7


@dataclass(frozen=True)
class Frame:
    """One frame; its bytes are never shown."""

    what: What
    blob_type: BlobType
    data: bytes = b""

    def __repr__(self) -> str:
        return f"Frame({self.what.name}, {self.blob_type.name}, {len(self.data)} bytes)"


def encode_frame(frame: Frame) -> bytes:
    """As it travels."""
    return _HEADER.pack(frame.what, frame.blob_type, len(frame.data)) + frame.data


def parse_frame(data: bytes | bytearray) -> tuple[Frame, int] | None:
    """The first frame and how many bytes it took; None where more must come. Raises InternalError."""
    if len(data) < _HEADER.size:
        return None
    what, kind, length = _HEADER.unpack_from(data)
    try:
        said, blob_type = What(what), BlobType(kind)
    except ValueError:
        raise InternalError("internal.error", "a frame of the TPM's link that does not fit") from None
    if length > FRAME_MAX:
        raise InternalError("internal.error", f"a frame of {length} bytes on the TPM's link")
    end = _HEADER.size + length
    return None if len(data) < end else (Frame(said, blob_type, bytes(data[_HEADER.size : end])), end)


class Link:
    """One end, used in turns; raises OSError where the other is gone or silent."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.connection = connection
        connection.settimeout(timeout_s)
        self._buffer = bytearray()

    def send(self, frame: Frame) -> None:
        """Send one frame."""
        self.connection.sendall(encode_frame(frame))

    def receive(self) -> Frame:
        """The next frame; raises InternalError for what is none, ConnectionError at the end."""
        while (found := parse_frame(self._buffer)) is None:
            data = self.connection.recv(64 * 1024)
            if not data:
                raise ConnectionError("the link was closed")
            self._buffer += data
        frame, end = found
        del self._buffer[:end]
        return frame

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self.connection.fileno()

    def close(self) -> None:
        """Close this end."""
        self.connection.close()
