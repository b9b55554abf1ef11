"""Which kind of connection begins with given bytes (QEMU's migration/channel.c, migration_channel_read_peek)."""

import struct
from typing import Final

from sealane.wire import constants as q
from sealane.wire.core import Buffer, Reader
from sealane.wire.multifd import MultifdReader
from sealane.wire.ram import PreemptReader
from sealane.wire.returnpath import ReturnPathReader
from sealane.wire.stream import StreamReader

SNIFF_BYTES: Final = 4


def reader_for(first: Buffer, *, carry: bool = False) -> Reader:
    """A reader for the connection (one direction) that begins with these bytes, four or more.

    The main channel and multifd have magic numbers. A return path begins with the type of a message; what is left is
    postcopy's second channel, which begins with a page's address. ValueError where there are fewer bytes.
    """
    if len(first) < SNIFF_BYTES:
        raise ValueError(f"{SNIFF_BYTES} bytes tell what a connection is; here are {len(first)}")
    (magic,) = struct.unpack_from(">I", first)
    if magic == q.MULTIFD_MAGIC:
        return MultifdReader(carry=carry)
    if magic >> 16 in q.RETURN_PATH_NAMES:
        return ReturnPathReader(carry=carry)
    if magic >> 16 == 0:
        return PreemptReader(carry=carry)
    return StreamReader(carry=carry)
