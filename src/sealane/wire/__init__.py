"""QEMU's migration stream, read and written without I/O.

    bytes of one connection -> reader -> events, each with the bytes it was read from (`raw`)

* `StreamReader` reads the main channel, `MultifdReader` one multifd channel, `PreemptReader` postcopy's second channel,
  `ReturnPathReader` what the destination says; `reader_for` chooses by a connection's first bytes.
* Pages come in batches of numpy arrays (`PageBatch`, `PacketPages`), as views of the bytes that were fed.
* `wire.writer` encodes events from their fields; joining each event's `raw` gives the connection's bytes again.
* What cannot be understood is an `Opaque` event and never lost; what contradicts itself is one `WireError`.
* `RamRebuild` applies all records in order and gives each RAM block's SHA-256.

What is read and what is not is told in `docs/stream.md`.
"""

from sealane.wire.core import Reader, iterate_events
from sealane.wire.events import (
    Command,
    CompressedPage,
    Configuration,
    ConfigurationSubsection,
    Event,
    MemorySize,
    MultifdFlush,
    Opaque,
    PackageBegun,
    PageBatch,
    RamBlockListed,
    RamSectionEnded,
    SectionBegun,
    SectionFooter,
    StreamBegun,
    StreamEnded,
    VmDescription,
    XbzrlePage,
)
from sealane.wire.multifd import (
    DeviceStatePacket,
    MultifdHello,
    MultifdPacket,
    MultifdReader,
    PacketPages,
    PacketPayload,
)
from sealane.wire.ram import PreemptReader
from sealane.wire.rebuild import RamRebuild
from sealane.wire.returnpath import ReturnMessage, ReturnPathReader
from sealane.wire.sniff import reader_for
from sealane.wire.stream import StreamReader

__all__ = [
    "Command",
    "CompressedPage",
    "Configuration",
    "ConfigurationSubsection",
    "DeviceStatePacket",
    "Event",
    "MemorySize",
    "MultifdFlush",
    "MultifdHello",
    "MultifdPacket",
    "MultifdReader",
    "Opaque",
    "PackageBegun",
    "PacketPages",
    "PacketPayload",
    "PageBatch",
    "PreemptReader",
    "RamBlockListed",
    "RamRebuild",
    "RamSectionEnded",
    "Reader",
    "ReturnMessage",
    "ReturnPathReader",
    "SectionBegun",
    "SectionFooter",
    "StreamBegun",
    "StreamEnded",
    "StreamReader",
    "VmDescription",
    "XbzrlePage",
    "iterate_events",
    "reader_for",
]
