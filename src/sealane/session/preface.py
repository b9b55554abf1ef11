"""The preface: the first 32 bytes of every connection, in clear, which tell the agent where it belongs.

     0                         7         8       9       10      12          16                                32
    +-------------------------+---------+-------+-------+-------+-----------+----------------------------------+
    | "sealane" (7 bytes)     | version | kind  | zero  | lane  |   zero    |            label (16)            |
    +-------------------------+---------+-------+-------+-------+-----------+----------------------------------+

A channel's label is the migration's id, which anybody on the way may read; a lane's is its token, which only who holds the
migration's secret can know (`seal/keys.py`). Both only route: a channel proves itself by TLS, a lane by its first record, a
pairing by the code, a renewal by TLS; the labels of these two are zero.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sealane.errors import PeerError
from sealane.limits import LANES_MAX

_PREFACE: Final = struct.Struct(">7sBBBHI16s")
PREFACE_BYTES: Final = _PREFACE.size
MAGIC: Final = b"sealane"
PROTOCOL_VERSION: Final = 3
LABEL_BYTES: Final = 16


class ConnectionKind(IntEnum):
    """What a connection is for."""

    CHANNEL = 1
    LANE = 2
    PAIRING = 3
    RENEWAL = 4


@dataclass(frozen=True)
class Preface:
    """Where a connection belongs; `label` is the migration's id of a channel, the token of a lane."""

    kind: ConnectionKind
    label: bytes
    lane: int = 0

    def __repr__(self) -> str:
        return f"Preface({self.kind.name}, lane {self.lane})"


def encode_preface(preface: Preface) -> bytes:
    """The 32 bytes that open a connection."""
    return _PREFACE.pack(MAGIC, PROTOCOL_VERSION, preface.kind, 0, preface.lane, 0, preface.label)


def parse_preface(data: bytes) -> Preface:
    """Read untrusted bytes; raises PeerError `peer.preface`, or `peer.version` for another version of ours."""
    if len(data) != PREFACE_BYTES:
        raise PeerError("peer.preface", f"a preface has {PREFACE_BYTES} bytes, not {len(data)}")
    magic, version, kind, zero, lane, zeros, label = _PREFACE.unpack(data)
    if magic != MAGIC:
        raise PeerError("peer.preface", "the first bytes are not Sealane's")
    if version != PROTOCOL_VERSION:
        raise PeerError("peer.version", f"the peer speaks version {version}, this host {PROTOCOL_VERSION}")
    if (
        zero
        or zeros
        or kind not in iter(ConnectionKind)
        or lane >= LANES_MAX
        or (kind != ConnectionKind.LANE and lane)
        or (kind in {ConnectionKind.PAIRING, ConnectionKind.RENEWAL} and any(label))
    ):
        raise PeerError("peer.preface", "a field of the preface does not fit")
    return Preface(ConnectionKind(kind), label, lane)
