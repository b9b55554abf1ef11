"""Device sections, walked with the description that QEMU sends behind them.

Nothing in a device section says how long it is. The VMDESCRIPTION at the very end of a precopy stream does (QEMU's
migration/vmstate.c, vmsd_desc_field_end): for each device its fields with their sizes, and the subsections that were sent.
A postcopy stream has none.
"""

import json
import re
import struct
from dataclasses import dataclass
from typing import Any, Final

from sealane import limits
from sealane.wire import constants as q

_FOOTER_BYTES: Final = 5


@dataclass(frozen=True)
class Device:
    """One device section: its name, instance and version, and how many bytes its state has."""

    name: str
    instance: int
    version: int
    state_bytes: int


@dataclass(frozen=True)
class DeviceWalk:
    """What could be walked; `why_not` says what stopped it, empty where all was walked."""

    devices: tuple[Device, ...]
    description_bytes: int
    why_not: str = ""


def walk_devices(tail: bytes | bytearray) -> DeviceWalk:
    """The devices in `tail`: everything from the head of the first device section to the end of the stream."""
    found = _find_description(tail)
    if found is None:
        return DeviceWalk((), 0, "there is no description of the devices behind them")
    end, text = found
    try:
        described = json.loads(text)["devices"]
        return _walk(tail, end, described, len(text))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        return DeviceWalk((), len(text), f"the description of the devices does not fit: {type(error).__name__}")


def _find_description(tail: bytes | bytearray) -> tuple[int, bytes] | None:
    """Where QEMU_VM_EOF stands before the description, and the description."""
    begin = max(0, len(tail) - limits.WIRE_VMDESCRIPTION_MAX - 6)
    for match in re.finditer(rb"\x00\x06(?=(.{4})\{)", memoryview(tail)[begin:], re.DOTALL):
        at = begin + match.start()
        if struct.unpack(">I", match[1])[0] == len(tail) - at - 6:
            return at, bytes(tail[at + 6 :])
    return None


def _walk(tail: bytes | bytearray, end: int, described: list[dict[str, Any]], description_bytes: int) -> DeviceWalk:
    devices: list[Device] = []
    at = 0
    for device in described:
        kind, section_id, length = struct.unpack_from(">BIB", tail, at)
        name = bytes(tail[at + 6 : at + 6 + length]).decode("utf-8", "surrogateescape")
        instance, version = struct.unpack_from(">II", tail, at + 6 + length)
        if kind != q.QEMU_VM_SECTION_FULL or name != device["name"]:
            return DeviceWalk(tuple(devices), description_bytes, f"{device['name']!r} is described, {name!r} was sent")
        size = _state_bytes(device)
        at += 14 + length + size
        if tail[at : at + _FOOTER_BYTES] != struct.pack(">BI", q.QEMU_VM_SECTION_FOOTER, section_id):
            return DeviceWalk(tuple(devices), description_bytes, f"{name!r} does not end where it is described to")
        at += _FOOTER_BYTES
        devices.append(Device(name, instance, version, size))
    return DeviceWalk(
        tuple(devices), description_bytes, "" if at == end else f"{end - at} bytes behind the last device described"
    )


def _state_bytes(described: dict[str, Any]) -> int:
    """The length of a device's or subsection's state: an array's size is that of one element."""
    fields = sum(int(field["size"]) * int(field.get("array_len", 1)) for field in described.get("fields", ()))
    subsections = sum(
        6 + len(part["vmsd_name"].encode()) + _state_bytes(part) for part in described.get("subsections", ())
    )
    size = fields + subsections
    if size < 0:
        raise ValueError("a negative size")
    return size
