"""swtpm's control channel (swtpm 0.7, include/swtpm/tpm_ioctl.h; QEMU's backends/tpm/tpm_emulator.c): what QEMU asks, and
the two commands by which a TPM's state is read and written.

A command is a u32 number and its fields, an answer begins with a u32 result; all big-endian, one command at a time.
SET_STATEBLOB's length counts the bytes that follow it.
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sealane.errors import make_error
from sealane.limits import VTPM_BLOB_MAX


class Command(IntEnum):
    """The commands that QEMU sends; others are refused."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    CANCEL_TPM_CMD = 9
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    LOCK_STORAGE = 19


class BlobType(IntEnum):
    """The parts of a TPM's state (PTM_BLOB_TYPE_*)."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3


# Bytes of a request after its number, as QEMU sends them (its structures are unions of request and answer).
_REQUEST_BYTES: Final[dict[Command, int]] = {
    Command.GET_CAPABILITY: 0,
    Command.INIT: 4,
    Command.SHUTDOWN: 0,
    Command.GET_TPMESTABLISHED: 0,
    Command.SET_LOCALITY: 4,
    Command.CANCEL_TPM_CMD: 0,
    Command.RESET_TPMESTABLISHED: 4,
    Command.GET_STATEBLOB: 12,
    Command.SET_STATEBLOB: 12,
    Command.STOP: 0,
    Command.SET_DATAFD: 0,
    Command.SET_BUFFERSIZE: 4,
    Command.LOCK_STORAGE: 4,
}
TPM_FAIL: Final = 9
_DECRYPTED: Final = 1
# A result with this bit says "not now": there is no such state.
_NON_FATAL: Final = 0x800
_ANSWER_MAX: Final = 4096
_READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One of QEMU's commands; `data` is what followed its number. Of SET_STATEBLOB `blob` has the state."""

    command: Command
    data: bytes
    blob: bytes = b""

    @property
    def blob_type(self) -> BlobType:
        """Which state GET_STATEBLOB or SET_STATEBLOB is about; raises `vtpm.control`."""
        try:
            return BlobType(struct.unpack_from(">I", self.data, 4)[0])
        except ValueError:
            raise make_error("vtpm.control", "a state of unknown type was asked for") from None


class RequestReader:
    """Cuts QEMU's bytes into requests. Any bytes give requests or `vtpm.control`, in bounded memory."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> Iterator[Request]:
        """The requests that are complete now."""
        self._buffer += data
        while (request := self._next()) is not None:
            yield request

    def _next(self) -> Request | None:
        if len(self._buffer) < 4:
            return None
        number = struct.unpack_from(">I", self._buffer)[0]
        try:
            command = Command(number)
        except ValueError:
            raise make_error("vtpm.control", f"command {number} is not one of QEMU's") from None
        end = 4 + _REQUEST_BYTES[command]
        if len(self._buffer) < end:
            return None
        length = 0
        if command is Command.SET_STATEBLOB:
            length = struct.unpack_from(">I", self._buffer, 12)[0]
            if length > VTPM_BLOB_MAX:
                raise make_error("vtpm.control", f"a state of {length} bytes")
            if len(self._buffer) < end + length:
                return None
        request = Request(command, bytes(self._buffer[4:end]), bytes(self._buffer[end : end + length]))
        del self._buffer[: end + length]
        return request


def encode_result(result: int) -> bytes:
    """The answer of most commands."""
    return struct.pack(">I", result)


def encode_blob(blob: bytes) -> bytes:
    """GET_STATEBLOB's answer with all of a state in one piece, as QEMU wants it."""
    return struct.pack(">IIII", 0, 0, len(blob), len(blob)) + blob


def encode_no_blob() -> bytes:
    """GET_STATEBLOB's answer where the state is not given out."""
    return struct.pack(">IIII", TPM_FAIL, 0, 0, 0)


class ControlChannel:
    """The one connection to an swtpm's control channel; raises `vtpm.swtpm`."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        connection.settimeout(timeout_s)

    def exchange(self, command: Command, data: bytes = b"", descriptors: list[int] | None = None) -> bytes:
        """Send a command as it is, and give swtpm's answer as it is."""
        try:
            socket.send_fds(self._connection, [struct.pack(">I", command) + data], descriptors or [])
            answer = self._connection.recv(_ANSWER_MAX)
        except OSError as error:
            raise make_error("vtpm.swtpm", f"no answer to {command.name}: {error}") from error
        if not answer:
            raise make_error("vtpm.swtpm", f"swtpm ended at {command.name}")
        return answer

    def command(self, command: Command, data: bytes = b"", descriptors: list[int] | None = None) -> None:
        """Send a command that must succeed."""
        answer = self.exchange(command, data, descriptors)
        result = int.from_bytes(answer[:4], "big")
        if result:
            raise make_error("vtpm.swtpm", f"{command.name} gave result {result:#x}")

    def start(self, *, delete_volatile: bool = False) -> None:
        """Start the TPM from the state that was written, or that its files have."""
        self.command(Command.INIT, struct.pack(">I", 1 if delete_volatile else 0))

    def tpm_state_read(self, blob_type: BlobType) -> bytes:
        """One part of the TPM's state, in clear; empty where there is none."""
        try:
            self._connection.sendall(struct.pack(">IIII", Command.GET_STATEBLOB, _DECRYPTED, blob_type, 0))
            result, _flags, total, length = struct.unpack(">IIII", self._exactly(16))
            if result and not result & _NON_FATAL:
                raise make_error("vtpm.swtpm", f"the {blob_type.name.lower()} state gave result {result:#x}")
            if total != length or length > VTPM_BLOB_MAX:
                raise make_error("vtpm.swtpm", f"the {blob_type.name.lower()} state has {length} of {total} bytes")
            return self._exactly(length)
        except OSError as error:
            raise make_error("vtpm.swtpm", f"the {blob_type.name.lower()} state was not given: {error}") from error

    def tpm_state_write(self, blob_type: BlobType, state: bytes) -> None:
        """Give the TPM, before it is started, one part of its state."""
        try:
            self._connection.sendall(struct.pack(">IIII", Command.SET_STATEBLOB, 0, blob_type, len(state)) + state)
            result = int.from_bytes(self._exactly(4), "big")
        except OSError as error:
            raise make_error("vtpm.swtpm", f"the {blob_type.name.lower()} state was not taken: {error}") from error
        if result:
            raise make_error("vtpm.swtpm", f"the {blob_type.name.lower()} state was refused with {result:#x}")

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = self._connection.recv(min(count - len(found), _READ_BYTES))
            if not piece:
                raise make_error("vtpm.swtpm", "swtpm ended in an answer")
            found += piece
        return bytes(found)

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
