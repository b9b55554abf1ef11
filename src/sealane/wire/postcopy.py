"""Payloads of postcopy's commands (QEMU's migration/savevm.c)."""

import struct
from dataclasses import dataclass

from sealane.errors import WireError
from sealane.wire import constants as q
from sealane.wire.events import Command


@dataclass(frozen=True)
class RamDiscard:
    """Ranges of a RAM block, in bytes, that the destination forgets because they changed since they were sent."""

    block: str
    ranges: tuple[tuple[int, int], ...]  # start, length


def parse_ram_discard(command: Command) -> RamDiscard:
    """The payload of POSTCOPY_RAM_DISCARD (savevm.c, qemu_savevm_send_postcopy_ram_discard).

    u8 version 0, u8 length and name of the block, u8 0, then pairs of be64 start and be64 length.
    """
    payload = command.payload
    head = 2 + payload[1] + 1 if len(payload) > 2 else 0
    if not head or payload[0] or len(payload) < head or payload[head - 1] or (len(payload) - head) % 16:
        raise WireError(
            "wire.malformed", "the ranges to discard do not fit", offset=command.offset, section="POSTCOPY_RAM_DISCARD"
        )
    ranges = tuple(struct.iter_unpack(">QQ", payload[head:]))
    name = bytes(payload[2 : head - 1]).decode("utf-8", "surrogateescape")
    return RamDiscard(name, tuple((int(start), int(length)) for start, length in ranges))


def command_name(number: int) -> str:
    """QEMU's name of the command without its prefix, or its number."""
    return q.COMMAND_NAMES.get(number, str(number))
