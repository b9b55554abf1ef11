"""zstd over a lane's plaintext, a frame a record: every record can be opened as soon as it is there, and by itself.

    compressed bytes    one zstd frame (RFC 8878) that says how long its content is; nothing behind it

Frames that go on from record to record would find matches further back, which is worth 3 % of the bytes at level 1 on guests
with programs and text, and costs a sixth of the speed: zstd then looks into two buffers, and opening copies twice. Records that
stand alone can also be compressed by any thread.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import zstandard

from sealane.errors import PeerError
from sealane.limits import KIB, RECORD_PAYLOAD_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview

# What goes into one record: zstd may make incompressible bytes a little longer (3 bytes a block of 128 KiB, and the frame's head).
INPUT_MAX: Final = RECORD_PAYLOAD_MAX - 4 * KIB


class RecordCompressor:
    """Compresses records at one level. Not for several threads at once."""

    def __init__(self, level: int) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, source_size=INPUT_MAX, write_content_size=True, write_checksum=False, write_dict_id=False
        )
        self.level = level
        self._context = zstandard.ZstdCompressor(compression_params=parameters)
        self._joined = memoryview(bytearray(INPUT_MAX))

    def compress(self, pieces: Sequence[Buffer]) -> bytes:
        """What 1 to INPUT_MAX bytes become: RECORD_PAYLOAD_MAX at most."""
        return self._context.compress(pieces[0] if len(pieces) == 1 else self._join(pieces))

    def _join(self, pieces: Sequence[Buffer]) -> memoryview:
        at = 0
        for piece in pieces:
            self._joined[at : at + len(piece)] = piece
            at += len(piece)
        return self._joined[:at]


class RecordDecompressor:
    """Opens what the peer's compressors made; memory is bounded by one record, whatever a frame claims."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor()

    def decompress(self, data: Buffer) -> memoryview:
        """What these compressed bytes open to, read-only; raises PeerError `lane.malformed`."""
        try:
            length = zstandard.get_frame_parameters(data).content_size
            if not 0 < length <= INPUT_MAX:
                raise _malformed(f"claims {length} bytes")
            return memoryview(self._context.decompress(data, allow_extra_data=False))
        except zstandard.ZstdError:
            raise _malformed("does not open") from None


def _malformed(why: str) -> PeerError:
    return PeerError("lane.malformed", f"what was compressed {why}")
