"""zstd over a lane's plaintext: one context a lane and direction, and every record can be opened as soon as it is there.

    compressed record's plaintext    u32 length of what it opens to | zstd blocks (RFC 8878), flushed behind each record

A frame begins with the record that says so, and goes on over all that follow: later records find matches in earlier ones. A
change of level begins a new frame.
"""

import struct
from collections.abc import Sequence
from typing import Final, TypeAlias

import zstandard

from sealane.errors import PeerError
from sealane.limits import KIB, RECORD_PAYLOAD_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview

_LENGTH: Final = struct.Struct(">I")
HEAD_BYTES: Final = _LENGTH.size
# How far back matches reach: both ends keep as much.
_WINDOW_LOG: Final = 22
# What goes into one record: zstd may make incompressible bytes a little longer (3 bytes a block of 128 KiB, and the frame's head).
INPUT_MAX: Final = RECORD_PAYLOAD_MAX - 4 * KIB


class RecordCompressor:
    """Compresses records at one level."""

    def __init__(self, level: int) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, window_log=_WINDOW_LOG, write_content_size=False, write_checksum=False
        )
        self._frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self.level = level
        self.begins = True  # whether the next record begins the frame

    def compress_into(self, pieces: Sequence[Buffer], out: memoryview) -> int:
        """Compress at most INPUT_MAX bytes as one record's plaintext; returns its length in `out`."""
        length, at = 0, HEAD_BYTES
        for piece in pieces:
            length += len(piece)
            data = self._frame.compress(piece)
            out[at : at + len(data)] = data
            at += len(data)
        data = self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        out[at : at + len(data)] = data
        out[:HEAD_BYTES] = _LENGTH.pack(length)
        self.begins = False
        return at + len(data)


class RecordDecompressor:
    """Opens what compressors of the peer made; memory is bounded by a window and one record."""

    def __init__(self) -> None:
        self._source = _Source()
        self._frame: zstandard.ZstdDecompressionReader | None = None
        self._buffer = bytearray(INPUT_MAX)

    def decompress(self, plaintext: memoryview, *, begins: bool) -> memoryview:
        """What the record opens to, valid until the next call; raises PeerError `lane.malformed`."""
        if len(plaintext) <= HEAD_BYTES:
            raise _malformed("is too short")
        (length,) = _LENGTH.unpack(plaintext[:HEAD_BYTES])
        if not 0 < length <= INPUT_MAX:
            raise _malformed(f"claims {length} bytes")
        if begins:
            self._source = _Source()
            context = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
            self._frame = context.stream_reader(self._source, read_size=RECORD_PAYLOAD_MAX)  # type: ignore[arg-type]
        if self._frame is None:
            raise _malformed("goes on with what was never begun")
        self._source.data = bytes(plaintext[HEAD_BYTES:])
        out = memoryview(self._buffer)[:length]
        try:
            got = self._fill(self._frame, out)
        except zstandard.ZstdError:
            self._frame = None
            raise _malformed("does not open") from None
        if got != length or self._source.data:
            self._frame = None
            raise _malformed("opens to another length than it claims")
        return out

    @staticmethod
    def _fill(frame: zstandard.ZstdDecompressionReader, out: memoryview) -> int:
        got = 0
        while got < len(out):
            count = frame.readinto(out[got:])
            if not count:
                break
            got += count
        return got


class _Source:
    """Gives the present record's bytes once; what asks for more asks in vain."""

    data = b""

    def read(self, size: int = -1) -> bytes:
        data, self.data = self.data, b""
        return data


def _malformed(why: str) -> PeerError:
    return PeerError("lane.malformed", f"a compressed record {why}")
