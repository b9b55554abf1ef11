"""zstd over a lane's plaintext: a few frames a lane and direction, and every record can be opened as soon as it is there.

    compressed bytes    u8 frame's number, 0x80 where it begins | u32 length of what they open to | zstd blocks (RFC 8878), flushed

A frame goes on until one of its number begins anew, as after a change of level: what comes later finds matches in what came
before. Several frames let as many threads compress, each for itself.
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
_BEGINS: Final = 0x80
# Frames of one lane and direction; each costs both ends a window.
FRAMES_MAX: Final = 4
# How far back matches reach: both ends keep as much.
_WINDOW_LOG: Final = 22
# What goes into one record: zstd may make incompressible bytes a little longer (3 bytes a block of 128 KiB, and the frame's head).
INPUT_MAX: Final = RECORD_PAYLOAD_MAX - 4 * KIB


class RecordCompressor:
    """Compresses one frame at one level."""

    def __init__(self, level: int, frame: int = 0) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, window_log=_WINDOW_LOG, write_content_size=False, write_checksum=False
        )
        self._frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self.level, self._number = level, frame
        self._begins = _BEGINS

    def compress_into(self, pieces: Sequence[Buffer], out: memoryview) -> int:
        """Compress at most INPUT_MAX bytes; returns the length of what they became in `out`, RECORD_PAYLOAD_MAX at most."""
        length, at = 0, HEAD_BYTES
        for piece in pieces:
            length += len(piece)
            data = self._frame.compress(piece)
            out[at : at + len(data)] = data
            at += len(data)
        data = self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        out[at : at + len(data)] = data
        out[:HEAD_BYTES] = _HEAD.pack(self._begins | self._number, length)
        self._begins = 0
        return at + len(data)


class RecordDecompressor:
    """Opens what compressors of the peer made; memory is bounded by FRAMES_MAX windows and one record."""

    def __init__(self) -> None:
        self._frames: dict[int, _Frame] = {}
        self._buffer = bytearray(INPUT_MAX)

    def decompress(self, data: memoryview) -> memoryview:
        """What these compressed bytes open to, valid until the next call; raises PeerError `lane.malformed`."""
        if len(data) <= HEAD_BYTES:
            raise _malformed("is too short")
        word, length = _HEAD.unpack(data[:HEAD_BYTES])
        number = word & ~_BEGINS
        if number >= FRAMES_MAX:
            raise _malformed(f"is of frame {number}")
        if not 0 < length <= INPUT_MAX:
            raise _malformed(f"claims {length} bytes")
        frame = _Frame() if word & _BEGINS else self._frames.pop(number, None)
        if frame is None:
            raise _malformed("goes on with what was never begun")
        out = memoryview(self._buffer)[:length]
        frame.source.data = bytes(data[HEAD_BYTES:])
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
    return PeerError("lane.malformed", f"what was compressed {why}")
