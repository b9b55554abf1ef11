"""zstd over a lane's plaintext: a few frames a lane and direction, and every record can be opened as soon as it is there.

    compressed record's plaintext    u8 number of the frame | u32 length of what it opens to | zstd blocks (RFC 8878), flushed

A frame begins with the record that says so, and goes on over all later records of its number: they find matches in earlier
ones. A change of level begins a new frame. Several frames let as many threads compress, each for itself.
"""

import struct
from collections.abc import Sequence
from typing import Final, TypeAlias

import zstandard

from sealane.errors import PeerError
from sealane.limits import KIB, RECORD_PAYLOAD_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEAD: Final = struct.Struct(">BI")
HEAD_BYTES: Final = _HEAD.size
# Frames of one lane and direction; each costs both ends a window.
FRAMES_MAX: Final = 4
# How far back matches reach: both ends keep as much.
_WINDOW_LOG: Final = 22
# What goes into one record: zstd may make incompressible bytes a little longer (3 bytes a block of 128 KiB, and the frame's head).
INPUT_MAX: Final = RECORD_PAYLOAD_MAX - 4 * KIB


class RecordCompressor:
    """Compresses the records of one frame at one level."""

    def __init__(self, level: int, frame: int = 0) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, window_log=_WINDOW_LOG, write_content_size=False, write_checksum=False
        )
        self._frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self.level, self._number = level, frame
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
        out[:HEAD_BYTES] = _HEAD.pack(self._number, length)
        self.begins = False
        return at + len(data)


class RecordDecompressor:
    """Opens what compressors of the peer made; memory is bounded by FRAMES_MAX windows and one record."""

    def __init__(self) -> None:
        self._frames: dict[int, _Frame] = {}
        self._buffer = bytearray(INPUT_MAX)

    def decompress(self, plaintext: memoryview, *, begins: bool) -> memoryview:
        """What the record opens to, valid until the next call; raises PeerError `lane.malformed`."""
        if len(plaintext) <= HEAD_BYTES:
            raise _malformed("is too short")
        number, length = _HEAD.unpack(plaintext[:HEAD_BYTES])
        if number >= FRAMES_MAX:
            raise _malformed(f"is of frame {number}")
        if not 0 < length <= INPUT_MAX:
            raise _malformed(f"claims {length} bytes")
        frame = _Frame() if begins else self._frames.pop(number, None)
        if frame is None:
            raise _malformed("goes on with what was never begun")
        out = memoryview(self._buffer)[:length]
        frame.source.data = bytes(plaintext[HEAD_BYTES:])
        try:
            got = self._fill(frame.opened, out)
        except zstandard.ZstdError:
            raise _malformed("does not open") from None
        if got != length or frame.source.data:
            raise _malformed("opens to another length than it claims")
        self._frames[number] = frame
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


class _Frame:
    """One frame of the peer's, as far as it has come."""

    def __init__(self) -> None:
        self.source = _Source()
        context = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
        self.opened = context.stream_reader(self.source, read_size=RECORD_PAYLOAD_MAX)  # type: ignore[arg-type]


def _malformed(why: str) -> PeerError:
    return PeerError("lane.malformed", f"a compressed record {why}")
