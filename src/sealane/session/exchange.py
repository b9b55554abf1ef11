"""The messages of the attested handshake, byte by byte. They travel in the channel's ATTEST frames, cut as it fits.

     0         1      2      3      4        8               24       32              64              96
    +---------+------+------+------+--------+---------------+--------+---------------+---------------+--------+------+-----+
    | version | kind | role | zero | round  |   migration   | epoch  | nonce source  | nonce dest.   | length | body | MAC |
    +---------+------+------+------+--------+---------------+--------+---------------+---------------+--------+------+-----+
       u8       u8     u8     u8     u32          16           u64          32              32          u32            32

`role` is the sender's: 1 source, 2 destination. A nonce that the sender does not know yet is zeros. CHALLENGE and SHOW
have no MAC: the key follows from the seeds that SHOW carries. Bodies:

    1 CHALLENGE   source: the VM's name (UTF-8, 1 to 64 bytes); destination: empty
    2 SHOW        seed 32 | bundle of evidence, without logs
    3 M1          nonce1 32
    4 M2          nonce1 32 | nonce2 32 | signature 64 | bundle of the destination's logs
    5 M3          nonce2 32 | nonce3 32 | signature 64 | bundle of the source's logs
    6 M4          nonce3 32 | nonce4 32 | level u8
"""

import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Final

from sealane.attest.reading import describe
from sealane.errors import PeerError
from sealane.limits import EVIDENCE_MAX

HEADER: Final = struct.Struct(">BBBBI16sQ32s32sI")
VERSION: Final = 1
MAC_BYTES: Final = 32
NONCE_BYTES: Final = 32
SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
VM_NAME_MAX: Final = 64
BODY_MAX: Final = EVIDENCE_MAX + 2 * NONCE_BYTES + SIGNATURE_BYTES
NO_NONCE: Final = bytes(NONCE_BYTES)


class End(StrEnum):
    """Which end of the lane speaks."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def number(self) -> int:
        """As messages and hashes have it."""
        return 1 if self is End.SOURCE else 2

    @property
    def peer(self) -> "End":
        """The other end."""
        return End.DESTINATION if self is End.SOURCE else End.SOURCE


class MessageKind(IntEnum):
    """What a message is; M1 to M4 are the second seed's."""

    CHALLENGE = 1
    SHOW = 2
    M1 = 3
    M2 = 4
    M3 = 5
    M4 = 6

    @property
    def has_mac(self) -> bool:
        """Whether both ends share a key by then."""
        return self >= MessageKind.M1


@dataclass(frozen=True)
class AttestMessage:
    """One message. `sender` is None where the number is neither role's."""

    kind: MessageKind
    sender: End | None
    round: int
    migration: bytes
    epoch: int
    nonce_source: bytes
    nonce_destination: bytes
    body: bytes = field(repr=False)
    mac: bytes = field(repr=False, default=b"")

    def __repr__(self) -> str:
        return f"AttestMessage({self.kind.name}, {self.sender}, round {self.round}, {describe(self.body)})"

    def encode(self) -> bytes:
        """The message as it travels."""
        return self.authenticated + self.mac

    @property
    def authenticated(self) -> bytes:
        """All but the MAC."""
        role = 0 if self.sender is None else self.sender.number
        head = (VERSION, self.kind, role, 0, self.round, self.migration, self.epoch)
        return HEADER.pack(*head, self.nonce_source, self.nonce_destination, len(self.body)) + self.body

    def with_mac(self, mac: bytes) -> "AttestMessage":
        """The same message with its MAC."""
        return replace(self, mac=mac)


class AttestReader:
    """Cuts the stream of ATTEST payloads into messages; memory bounded by BODY_MAX and one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[AttestMessage]:
        """All messages that `data` completes; raises PeerError `peer.message` or `peer.version`."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= HEADER.size:
            version, number, role, zero, count, migration, epoch, *nonces, length = HEADER.unpack_from(self._buffer)
            if version != VERSION:
                raise PeerError("peer.version", f"the peer's attested handshake is of version {version}")
            if number not in iter(MessageKind) or zero or length > BODY_MAX:
                raise PeerError("peer.message", f"a message of the attested handshake of kind {number} does not fit")
            kind = MessageKind(number)
            end = HEADER.size + length
            whole = end + (MAC_BYTES if kind.has_mac else 0)
            if len(self._buffer) < whole:
                break
            sender = {1: End.SOURCE, 2: End.DESTINATION}.get(role)
            body, mac = bytes(self._buffer[HEADER.size : end]), bytes(self._buffer[end:whole])
            messages.append(AttestMessage(kind, sender, count, migration, epoch, nonces[0], nonces[1], body, mac))
            del self._buffer[:whole]
        return messages
