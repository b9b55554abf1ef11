"""QEMU's bytes out of a source whose protection is not `sealed`: pages told apart, marked, sealed, sent. One thread a lane.

    QEMU --recv_into--> buffer --(reduce)--> pieces --pages by the monitor's word--> marked record --> TCP

Where the line is the bottleneck, pages that the destination has and zero pages are left out as under `sealed`, and what a
record leaves open is compressed apart from what it encrypts.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sealane.enclave.outbound import Outbound
from sealane.seal.codecs import CODECS, PageCodec
from sealane.seal.effort import Effort
from sealane.seal.keys import Direction, codec_key
from sealane.seal.marks import PIECE_MAX, IsUser, PageMarker, PartCompressors
from sealane.seal.protect import codec_name, is_weak
from sealane.seal.records import OVERHEAD_BYTES, Coding, MarksAllowed, RecordSealer
from sealane.seal.reduce import LaneReducer, Piece
from sealane.seal.seen import PagesSeen

_TO_DESTINATION: Final = Direction.TO_DESTINATION


@dataclass(frozen=True)
class Guard:
    """What a lane must know of its migration's protection. `is_user` None: nobody tells pages apart, so all are encrypted."""

    protection: str
    is_user: IsUser | None = None

    def make_codec(self, migration_secret: bytes, lane: int) -> PageCodec | None:
        """The codec of one lane, which encodes or decodes its pages in order; None where user pages are encrypted."""
        name = codec_name(self.protection)
        return None if name is None else CODECS[name](codec_key(migration_secret, lane=lane, direction=_TO_DESTINATION))

    def marks_allowed(self, migration_secret: bytes, lane: int) -> MarksAllowed | None:
        """What the destination's reader takes; None where it takes no marked record."""
        return MarksAllowed(self.make_codec(migration_secret, lane)) if is_weak(self.protection) else None


class MarkedOutbound(Outbound):
    """The pump of one lane at the source, under a protection that tells pages apart."""

    def __init__(
        self,
        vm: socket.socket,
        line: socket.socket,
        sealer: RecordSealer,
        marker: PageMarker,
        codec: PageCodec | None,
        reduction: tuple[LaneReducer, Effort] | None,
    ) -> None:
        self._may_reduce = reduction is not None
        super().__init__(vm, line, sealer, *(reduction or _no_reduction()))
        self._marker, self._codec = marker, codec
        self._compressors: PartCompressors | None = None
        self._received = memoryview(bytearray(PIECE_MAX))
        self._joined = memoryview(bytearray(PIECE_MAX))

    def run(self) -> None:
        """Pump until QEMU closes; raises OSError where the line breaks."""
        while piece := self._receive(self._received):
            reduced = self._reducer.feed(piece) if self._may_reduce else None
            self._send_pieces([piece] if reduced is None else reduced)
            if self._may_reduce:
                self._measure()
        self._stop_reducing()

    def _send_pieces(self, pieces: Sequence[Piece]) -> None:
        """Send the pieces in order, as many in one record as fit."""
        if len(pieces) == 1 and len(pieces[0]) <= PIECE_MAX:
            self._send_piece(memoryview(pieces[0]))
            return
        used = 0
        for each in pieces:
            rest = memoryview(each)
            while rest:
                taken = rest[: PIECE_MAX - used]
                self._joined[used : used + len(taken)] = taken
                used += len(taken)
                rest = rest[len(taken) :]
                if used == PIECE_MAX:
                    self._send_piece(self._joined)
                    used = 0
        if used:
            self._send_piece(self._joined[:used])

    def _send_piece(self, piece: memoryview) -> None:
        marks, compressors = self._marker.marks_of(piece), self._compressors
        if marks is not None:
            record = self._sealer.seal_marked(piece, marks, self._codec, compressors)
        elif compressors is not None:
            record = self._sealer.seal_data(compressors.hide_into(piece, self._sealer.payload), Coding.ZSTD)
        else:
            self._sealer.payload[: len(piece)] = piece
            record = self._sealer.seal_data(len(piece))
        if compressors is not None:
            self._compressed_saved += len(piece) - (len(record) - OVERHEAD_BYTES)
        self._send(record)

    def _apply(self, level: int | None) -> None:
        if level is None:
            self._stop_reducing()
            return
        if self._compressors is None or self._compressors.level != level:
            self._compressors = PartCompressors(level)
        if not self._reducer.active:
            self._has_reduced = True
            self._reducer.activate()

    def _stop_reducing(self) -> None:
        self._send_pieces(self._reducer.deactivate())
        self._compressors = None


def _no_reduction() -> tuple[LaneReducer, Effort]:
    """Never fed, and so never active."""
    return LaneReducer(PagesSeen(1), 0, bytes(32)), Effort(1)
