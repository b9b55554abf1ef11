"""The bytes of events, from their fields alone: what a reader read, `encode` writes again.

`encode(event) == event.raw` for every event of a reader; who changes a field gets the stream that says so. Passing on
unchanged events needs none of this: that is `raw`.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from sealane.wire import constants as q
from sealane.wire import events as e
from sealane.wire.multifd import DeviceStatePacket, MultifdHello, MultifdPacket, PacketPages, PacketPayload
from sealane.wire.returnpath import ReturnMessage


def encode_name(name: str) -> bytes:
    """u8 length and the name. ValueError where it has more than 255 bytes or none."""
    data = name.encode("utf-8", "surrogateescape")
    if not 0 < len(data) < 256:
        raise ValueError(f"a name of {len(data)} bytes does not fit")
    return bytes([len(data)]) + data


def encode(event: e.Event) -> bytes:
    """The event's bytes. TypeError for a type that is no event of this package."""
    try:
        encoder = _ENCODERS[type(event)]
    except KeyError:
        raise TypeError(f"not an event: {type(event).__name__}") from None
    return encoder(event)


def _page_batch(event: e.PageBatch) -> bytes:
    # All heads are eight bytes but for a first record that names its block, so the raw extent has the right size: what is
    # copied from it are contents only.
    raw = np.frombuffer(event.raw, np.uint8).copy()
    heads = event.starts.copy() - 8
    first_named = not int(event.headers[0]) & q.RAM_SAVE_FLAG_CONTINUE
    if first_named:
        name = encode_name(event.block)
        raw[8 : 8 + len(name)] = np.frombuffer(name, np.uint8)
        heads[0] = 0
    raw[heads[:, None] + np.arange(8)] = event.headers.astype(">u8").view(np.uint8).reshape(-1, 8)
    return raw.tobytes()


def _section(event: e.SectionBegun) -> bytes:
    head = struct.pack(">BI", event.kind, event.section_id)
    if event.kind in (q.QEMU_VM_SECTION_PART, q.QEMU_VM_SECTION_END):
        return head
    return head + encode_name(event.name) + struct.pack(">II", event.instance, event.version)


def _configuration(event: e.Configuration) -> bytes:
    name = event.machine.encode("utf-8", "surrogateescape")
    return struct.pack(">BI", q.QEMU_VM_CONFIGURATION, len(name)) + name


def _subsection(event: e.ConfigurationSubsection) -> bytes:
    head = bytes([q.QEMU_VM_SUBSECTION]) + encode_name(event.name) + struct.pack(">I", event.version)
    if event.target_page_bits is not None:
        return head + struct.pack(">I", event.target_page_bits)
    if event.uuid:
        return head + event.uuid
    names = [name.encode("utf-8", "surrogateescape") for name in event.capabilities]
    return head + struct.pack(">I", len(names)) + b"".join(bytes([len(name)]) + name for name in names)


def _command(event: e.Command) -> bytes:
    return struct.pack(">BHH", q.QEMU_VM_COMMAND, event.number, len(event.payload)) + event.payload


def _block(event: e.RamBlockListed) -> bytes:
    fields = [event.length, *(value for value in (event.page_size, event.address) if value is not None)]
    return encode_name(event.name) + struct.pack(f">{len(fields)}Q", *fields)


def _page_head(event: e.XbzrlePage | e.CompressedPage, flag: int) -> bytes:
    continued = q.RAM_SAVE_FLAG_CONTINUE if event.is_continued else 0
    head = struct.pack(">Q", event.page_offset | flag | continued)
    return head if continued else head + encode_name(event.block)


def _xbzrle(event: e.XbzrlePage) -> bytes:
    head = _page_head(event, q.RAM_SAVE_FLAG_XBZRLE)
    return head + struct.pack(">BH", q.ENCODING_FLAG_XBZRLE, len(event.data)) + event.data


def _compressed(event: e.CompressedPage) -> bytes:
    head = _page_head(event, q.RAM_SAVE_FLAG_COMPRESS_PAGE)
    return head + struct.pack(">I", len(event.data)) + event.data


def _packet(event: MultifdPacket) -> bytes:
    """The head anew; what has no field (reserved bytes, offsets beyond the pages, stale after a SYNC) stays as it was."""
    raw = bytearray(event.raw)
    struct.pack_into(">I", raw, 8, event.flags)
    counts = (len(event.page_offsets), event.next_packet_size, event.packet_num, len(event.zero_offsets))
    struct.pack_into(">IIQI", raw, 16, *counts)
    name = event.block.encode("utf-8", "surrogateescape") + b"\0"
    raw[64 : 64 + len(name)] = name
    offsets = np.concatenate([event.page_offsets, event.zero_offsets]).astype(">u8").tobytes()
    raw[320 : 320 + len(offsets)] = offsets
    return bytes(raw)


def _hello(event: MultifdHello) -> bytes:
    raw = bytearray(event.raw)
    struct.pack_into(">II16sB", raw, 0, q.MULTIFD_MAGIC, q.MULTIFD_VERSION, event.uuid, event.channel)
    return bytes(raw)


def _device_state(event: DeviceStatePacket) -> bytes:
    raw = bytearray(event.raw)
    struct.pack_into(">III", raw, 0, q.MULTIFD_MAGIC, q.MULTIFD_VERSION, event.flags)
    name = event.name.encode("utf-8", "surrogateescape") + b"\0"
    raw[12 : 12 + len(name)] = name
    struct.pack_into(">II", raw, 268, event.instance, event.next_packet_size)
    return bytes(raw)


_u8, _be64 = struct.Struct(">B").pack, struct.Struct(">Q").pack
_ENCODERS: Final[Mapping[type[e.Event], Callable[[Any], bytes]]] = {
    e.StreamBegun: lambda event: struct.pack(">II", q.QEMU_VM_FILE_MAGIC, event.version),
    e.Configuration: _configuration,
    e.ConfigurationSubsection: _subsection,
    e.SectionBegun: _section,
    e.SectionFooter: lambda event: struct.pack(">BI", q.QEMU_VM_SECTION_FOOTER, event.section_id),
    e.Command: _command,
    e.PackageBegun: lambda event: struct.pack(">BHHI", q.QEMU_VM_COMMAND, q.MIG_CMD_PACKAGED, 4, event.length),
    e.StreamEnded: lambda event: _u8(q.QEMU_VM_EOF),
    e.VmDescription: lambda event: struct.pack(">BI", q.QEMU_VM_VMDESCRIPTION, len(event.json)) + event.json,
    e.Opaque: lambda event: bytes(event.raw),
    e.MemorySize: lambda event: _be64(event.total | q.RAM_SAVE_FLAG_MEM_SIZE),
    e.RamBlockListed: _block,
    e.RamSectionEnded: lambda event: _be64(q.RAM_SAVE_FLAG_EOS),
    e.MultifdFlush: lambda event: _be64(q.RAM_SAVE_FLAG_MULTIFD_FLUSH),
    e.PageBatch: _page_batch,
    e.XbzrlePage: _xbzrle,
    e.CompressedPage: _compressed,
    MultifdHello: _hello,
    MultifdPacket: _packet,
    PacketPages: lambda event: event.pages.tobytes(),
    PacketPayload: lambda event: bytes(event.raw),
    DeviceStatePacket: _device_state,
    ReturnMessage: lambda event: struct.pack(">HH", event.type, len(event.payload)) + event.payload,
}
