"""The main channel (QEMU's migration/savevm.c, qemu_loadvm_state_main).

    be32 magic, be32 version
    CONFIGURATION  u8 7, be32 length, machine; then subsections: u8 5, u8 length, name, be32 version, fields
    START, FULL    u8 1 or 4, be32 id, u8 length, name, be32 instance, be32 version, content
    PART, END      u8 2 or 3, be32 id, content
    FOOTER         u8 0x7e, be32 id, behind each section
    COMMAND        u8 8, be16 command, be16 length, payload
    EOF            u8 0
    VMDESCRIPTION  u8 6, be32 length, JSON

Content is read for RAM only. Other sections have no length, so from the first of them on everything is opaque, to the end
of the connection or of the package that they stand in (postcopy). That is device state, which comes after RAM's END.
"""

import struct
from typing import Final

from sealane import limits
from sealane.errors import WireError
from sealane.wire import constants as q
from sealane.wire.core import Misfit, State
from sealane.wire.events import (
    Command,
    Configuration,
    ConfigurationSubsection,
    Opaque,
    PackageBegun,
    SectionBegun,
    SectionFooter,
    StreamBegun,
    StreamEnded,
    VmDescription,
)
from sealane.wire.ram import RamRecords

_be16x2 = struct.Struct(">HH").unpack_from
_be32 = struct.Struct(">I").unpack_from
_be32x2 = struct.Struct(">II").unpack_from
_be64x2 = struct.Struct(">QQ").unpack_from

RAM: Final = "ram"
_WHOLE_TYPES: Final = (q.QEMU_VM_SECTION_START, q.QEMU_VM_SECTION_FULL)
_SHORT_TYPES: Final = (q.QEMU_VM_SECTION_PART, q.QEMU_VM_SECTION_END)
DEVICE_STATE: Final = "device state"


class StreamReader(RamRecords):
    """Reads the main channel, in the direction from source to destination.

    `layout.blocks` has the RAM blocks and their lengths once they were listed.
    """

    def __init__(self, *, carry: bool = False) -> None:
        super().__init__(carry=carry)
        self._sections: dict[int, SectionBegun] = {}
        self._last_section: int | None = None
        self._is_mapped = False
        self._inside_elements: tuple[State, ...] = (self._ram, self._listing)
        self._package_end: int | None = None  # the offset at which the present package ends
        self._ended = False
        self._seen_any = False

    def _why_not_end_here(self) -> str:
        if self._ended or (self._state == self._opaque and self._package_end is None):
            return ""
        return "the stream ended without QEMU_VM_EOF" if self._seen_any else ""

    def _begin(self, buffer: memoryview, position: int, end: int) -> int:
        self._seen_any = True
        if end - position < 8:
            return self._want(8)
        magic, version = _be32x2(buffer, position)
        if magic != q.QEMU_VM_FILE_MAGIC:
            raise self._malformed(f"a stream does not begin with {magic:#010x}")
        if version != q.QEMU_VM_FILE_VERSION:
            raise self._malformed(f"stream version {version}, and only {q.QEMU_VM_FILE_VERSION} is known")
        self._emit(StreamBegun(buffer[position : position + 8], self._offset, version))
        self._state = self._between
        return 8

    # packages: sections inside a command; none of their elements reaches beyond them

    def _step(self, buffer: memoryview, position: int, fed: int) -> int:
        package_end = self._package_end
        if package_end is None:
            return super()._step(buffer, position, fed)
        left = package_end - self._offset
        used = super()._step(buffer[: position + left], position, fed)
        if not used and self._need > left:
            raise Misfit(self._cut(), fed)
        if used == left:
            self._package_end = None
            self._state = self._cut_inside if self._state in self._inside_elements else self._between
        return used

    def _cut(self) -> WireError:
        return self._malformed("a package ends inside an element")

    def _cut_inside(self, buffer: memoryview, position: int, end: int) -> int:
        raise self._cut()

    def _fail(self, error: WireError, rest: bytes) -> None:
        self._package_end = None
        super()._fail(error, rest)

    # sections

    def _between(self, buffer: memoryview, position: int, end: int) -> int:
        kind = buffer[position]
        self._section = ""
        if kind in _WHOLE_TYPES:
            return self._begin_section(buffer, position, end)
        if kind in _SHORT_TYPES:
            return self._continue_section(buffer, position, end)
        if kind == q.QEMU_VM_SECTION_FOOTER:
            return self._footer(buffer, position, end)
        if kind == q.QEMU_VM_COMMAND:
            return self._command(buffer, position, end)
        if kind == q.QEMU_VM_EOF:
            self._emit(StreamEnded(buffer[position : position + 1], self._offset))
            self._ended = self._package_end is None
            self._state = self._after_end
            return 1
        if kind == q.QEMU_VM_CONFIGURATION:
            return self._configuration(buffer, position, end)
        if kind == q.QEMU_VM_VMDESCRIPTION:
            return self._description(buffer, position, end)
        self._go_opaque(f"a section of type {kind:#04x}, which QEMU did not have when this was written")
        return self._state(buffer, position, end)

    def _begin_section(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 6:
            return self._want(6)
        name_end = 6 + buffer[position + 5]
        if end - position < name_end + 8:
            return self._want(name_end + 8)
        name = self._name(buffer, position + 5)
        section_id: int = _be32(buffer, position + 1)[0]
        instance, version = _be32x2(buffer, position + name_end)
        raw = buffer[position : position + name_end + 8]
        section = SectionBegun(raw, self._offset, buffer[position], section_id, name, instance, version)
        self._emit(section)
        self._last_section = section_id
        self._section = name
        if section.kind == q.QEMU_VM_SECTION_START and name == RAM and version == q.RAM_SAVE_VERSION:
            if self._is_mapped:
                self._go_opaque("mapped-ram, which only files have")
            else:
                self._sections[section_id] = SectionBegun(memoryview(b""), 0, 0, section_id, name, instance, version)
                self._state = self._ram
        else:
            self._go_opaque(DEVICE_STATE)
        return len(raw)

    def _continue_section(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 5:
            return self._want(5)
        section_id: int = _be32(buffer, position + 1)[0]
        known = self._sections.get(section_id)
        if known is None:
            raise self._malformed(f"section {section_id} goes on, and was never begun")
        raw = buffer[position : position + 5]
        self._emit(
            SectionBegun(raw, self._offset, buffer[position], section_id, known.name, known.instance, known.version)
        )
        self._last_section = section_id
        self._section = known.name
        self._state = self._ram
        return 5

    def _ram_ended(self) -> None:
        self._state = self._between

    def _footer(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 5:
            return self._want(5)
        section_id: int = _be32(buffer, position + 1)[0]
        if section_id != self._last_section:
            raise self._malformed(f"the footer of section {section_id} does not end section {self._last_section}")
        self._emit(SectionFooter(buffer[position : position + 5], self._offset, section_id))
        return 5

    # commands

    def _command(self, buffer: memoryview, position: int, end: int) -> int:
        if end - position < 5:
            return self._want(5)
        number, length = _be16x2(buffer, position + 1)
        if q.COMMAND_LENGTHS.get(number, length) != length:
            raise self._malformed(f"command {q.COMMAND_NAMES[number]} with {length} bytes")
        if end - position < 5 + length:
            return self._want(5 + length)
        raw = buffer[position : position + 5 + length]
        payload = raw[5:]
        if number == q.MIG_CMD_PACKAGED:
            return self._begin_package(raw, payload)
        if number == q.MIG_CMD_POSTCOPY_ADVISE:
            if length not in (0, 16):  # savevm.c, loadvm_postcopy_handle_advise
                raise self._malformed(f"command POSTCOPY_ADVISE with {length} bytes")
            self.layout.page_sizes = _be64x2(payload)[0] if length else 0
        self._emit(Command(raw, self._offset, number, payload))
        if number == q.MIG_CMD_ENABLE_COLO:
            self._go_opaque("COLO, whose checkpoints are streams of their own")
        return len(raw)

    def _begin_package(self, raw: memoryview, payload: memoryview) -> int:
        if self._package_end is not None:
            raise self._malformed("a package inside a package")
        length: int = _be32(payload)[0]
        self._emit(PackageBegun(raw, self._offset, length))
        if length:
            self._package_end = self._offset + len(raw) + length
        return len(raw)

    # the configuration and the description of devices

    def _configuration(self, buffer: memoryview, position: int, end: int) -> int:
        self._section = "configuration"
        if end - position < 5:
            return self._want(5)
        length: int = _be32(buffer, position + 1)[0]
        if length > limits.WIRE_MACHINE_NAME_MAX:
            raise self._beyond(f"a machine name of {length} bytes")
        if end - position < 5 + length:
            return self._want(5 + length)
        raw = buffer[position : position + 5 + length]
        self._emit(Configuration(raw, self._offset, bytes(raw[5:]).decode("utf-8", "surrogateescape")))
        self._state = self._subsections
        return len(raw)

    def _subsections(self, buffer: memoryview, position: int, end: int) -> int:
        if buffer[position] != q.QEMU_VM_SUBSECTION:
            self._state = self._between
            return self._between(buffer, position, end)
        if end - position < 2:
            return self._want(2)
        head = 2 + buffer[position + 1] + 4
        if end - position < head:
            return self._want(head)
        name = self._name(buffer, position + 1)
        if name == "configuration/capabilities":
            return self._capabilities(buffer, position, end, head)
        length = {"configuration/target-page-bits": 4, "configuration/uuid": 16}.get(name)
        if length is None:
            self._go_opaque(f"a subsection of the configuration that is not known: {name!r}")
            return self._state(buffer, position, end)
        if end - position < head + length:
            return self._want(head + length)
        raw = buffer[position : position + head + length]
        version: int = _be32(raw, head - 4)[0]
        bits: int | None = None
        if length == 4:
            bits = int(_be32(raw, head)[0])
            if 1 << min(bits, 64) != q.TARGET_PAGE_SIZE:
                self._go_opaque(f"pages of 2^{bits} bytes, which no x86 machine has")
                return self._state(buffer, position, end)
        uuid = bytes(raw[head:]) if length == 16 else b""
        self._emit(ConfigurationSubsection(raw, self._offset, name, version, (), bits, uuid))
        return len(raw)

    def _capabilities(self, buffer: memoryview, position: int, end: int, head: int) -> int:
        if end - position < head + 4:
            return self._want(head + 4)
        count: int = _be32(buffer, position + head)[0]
        if count > limits.WIRE_CAPABILITIES_MAX:
            raise self._beyond(f"{count} capabilities")
        at = head + 4
        names = []
        for _ in range(count):
            if end - position < at + 1:
                return self._want(at + 1)
            length = buffer[position + at]
            if end - position < at + 1 + length:
                return self._want(at + 1 + length)
            names.append(
                bytes(buffer[position + at + 1 : position + at + 1 + length]).decode("utf-8", "surrogateescape")
            )
            at += 1 + length
        raw = buffer[position : position + at]
        version: int = _be32(raw, head - 4)[0]
        self.layout.has_addresses = "x-ignore-shared" in names
        self._is_mapped = "mapped-ram" in names
        self._emit(ConfigurationSubsection(raw, self._offset, "configuration/capabilities", version, tuple(names)))
        return at

    def _description(self, buffer: memoryview, position: int, end: int) -> int:
        self._section = "vmdescription"
        if end - position < 5:
            return self._want(5)
        length: int = _be32(buffer, position + 1)[0]
        if length > limits.WIRE_VMDESCRIPTION_MAX:
            raise self._beyond(f"a description of {length} bytes")
        if end - position < 5 + length:
            return self._want(5 + length)
        raw = buffer[position : position + 5 + length]
        self._emit(VmDescription(raw, self._offset, raw[5:]))
        return len(raw)

    def _after_end(self, buffer: memoryview, position: int, end: int) -> int:
        if buffer[position] == q.QEMU_VM_VMDESCRIPTION:
            return self._description(buffer, position, end)
        self._go_opaque("bytes after the end of the stream")
        return self._state(buffer, position, end)


def is_device_state(event: Opaque) -> bool:
    """Whether the bytes are device sections, and not something unknown."""
    return event.reason == DEVICE_STATE
