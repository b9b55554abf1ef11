"""What a domain's XML from another host may ask of this one, read with expat: no document type, no entities, UTF-8 only.

libvirtd starts programs that a domain's XML names, as root or as QEMU's user. So from a peer these are refused:

* anything of the namespace that passes words straight to QEMU's command line,
* an `<emulator>`, and any `<binary path=…>`, outside the directories of the system's own programs,
* an interface's `<script>`,
* a `<domain>` that is not the one that migrates: the first `<name>` and `<uuid>` below it, each once,
* where disks are copied: a disk that libvirt would take the copy of, and that was not agreed, by its target and its file.
"""

import posixpath
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from sealane.errors import PeerError, printable

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
PROGRAM_DIRECTORIES: Final = frozenset({"/usr/bin", "/usr/sbin", "/usr/libexec", "/usr/lib/qemu", "/usr/local/bin"})
DEPTH_MAX: Final = 64
_DEVICES: Final = ["domain", "devices"]
_TEXT_MAX: Final = 4096


@dataclass(frozen=True)
class DomainIdentity:
    """Which domain it is."""

    name: str
    uuid: uuid.UUID


def check_xml(
    text: str, domain: DomainIdentity, *, root: str = "domain", disks: Mapping[str, str] | None = None
) -> None:
    """Raise PeerError `libvirt.refused` where the XML asks for what a peer may not; `root` is its outermost element.

    `disks` are the files of those that are copied, by target: the domain must have these, and no other that libvirt would take.
    """
    inspection = _Inspection(domain, root)
    parser = expat.ParserCreate("UTF-8", " ")
    parser.buffer_text = True
    parser.XmlDeclHandler = inspection.on_declaration
    parser.StartDoctypeDeclHandler = inspection.on_doctype
    parser.StartElementHandler = inspection.on_start
    parser.EndElementHandler = inspection.on_end
    parser.CharacterDataHandler = inspection.on_text
    try:
        parser.Parse(text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise refused(f"XML that does not parse: {expat.errors.messages[error.code]}") from None
    inspection.end()
    if disks is not None and inspection.taken != disks:
        raise refused("a domain with other disks to be copied than were agreed")


@dataclass
class _Disk:
    """A `<disk>` that is being read; libvirt copies those with a source that are neither read-only nor shareable."""

    kind: str
    target: str = ""
    file: str = ""
    has_source: bool = False
    is_kept: bool = False
    seen: set[str] = field(default_factory=set)

    def child(self, name: str, attributes: Mapping[str, str]) -> None:
        """An element directly below it."""
        if name in {"source", "target"}:
            if name in self.seen:
                raise refused(f"a disk with two <{name}>")
            self.seen.add(name)
        if name == "source" and attributes:
            self.has_source = True
            self.file = attributes.get("file", "") if self.kind == "file" else ""
        elif name == "target":
            self.target = attributes.get("dev", "")
        elif name in {"readonly", "shareable"}:
            self.is_kept = True


class _Inspection:
    """The parser's handlers."""

    def __init__(self, domain: DomainIdentity, root: str) -> None:
        self._domain, self._root = domain, root
        self._path: list[str] = []
        self._text: str | None = None
        self._identified: list[set[str]] = []
        self._domains = 0
        self._disk: _Disk | None = None
        self.taken: dict[str, str] = {}  # the files of disks that libvirt would take the copy of, by target

    def on_declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        """libvirtd's parser would follow a declared encoding, and read something else than is read here."""
        if (encoding or "UTF-8").upper() != "UTF-8":
            raise refused("XML in another encoding than UTF-8")

    def on_doctype(self, *_: object) -> None:
        """No entities, no other documents."""
        raise refused("XML with a document type")

    def on_start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        namespace, _, name = tag.rpartition(" ")
        if len(self._path) >= DEPTH_MAX:
            raise refused("XML that is too deep")
        if namespace == QEMU_NAMESPACE:
            raise refused(f"words for QEMU's command line (qemu:{name})")
        if not self._path and tag != self._root:
            raise refused(f"XML of <{printable(name, 40)}> in place of <{self._root}>")
        if tag == "domain":
            self._domains += 1
            self._identified.append(set())
        elif tag == "script":
            raise refused("a script for an interface")
        elif tag == "binary" and "path" in attributes:
            _check_program(attributes["path"])
        if tag == "disk" and self._path == _DEVICES:
            self._disk = _Disk(attributes.get("type", ""))
        elif self._disk is not None and len(self._path) == len(_DEVICES) + 1:
            if namespace:  # which libvirt's parsers have read with and without minding it
                raise refused("a disk with an element of another namespace")
            self._disk.child(name, attributes)
        self._path.append(tag)
        self._text = "" if self._is_read() else None

    def _is_read(self) -> bool:
        tag, parent = self._path[-1], self._path[-2] if len(self._path) > 1 else ""
        return tag == "emulator" or (parent == "domain" and tag in {"name", "uuid"})

    def on_text(self, text: str) -> None:
        """Text of the element that is open."""
        if self._text is not None:
            self._text += text
            if len(self._text) > _TEXT_MAX:
                raise refused("XML with a name that is too long")

    def on_end(self, tag: str) -> None:
        """An element ends."""
        if self._is_read():
            if self._text is None:  # another element stood inside it
                raise refused(f"an element inside <{tag}>")
            self._judge(tag, self._text.strip())
        self._text = None
        self._path.pop()
        if self._disk is not None and self._path == _DEVICES:
            self._note(self._disk)
            self._disk = None
        if tag == "domain" and self._identified.pop() != {"name", "uuid"}:
            raise refused("a domain without a name or a UUID")

    def _note(self, disk: _Disk) -> None:
        if disk.has_source and not disk.is_kept:
            if disk.target in self.taken:
                raise refused("two disks with one target")
            self.taken[disk.target] = disk.file

    def _judge(self, tag: str, text: str) -> None:
        if tag == "emulator":
            _check_program(text)
            return
        if tag in self._identified[-1]:
            raise refused(f"two <{tag}> in a domain")
        self._identified[-1].add(tag)
        wanted = self._domain.name if tag == "name" else self._domain.uuid
        if _parsed(tag, text) != wanted:
            raise refused(f"the XML of another domain (<{tag}>)")

    def end(self) -> None:
        """All was read."""
        if self._root == "domain" and self._domains != 1:
            raise refused(f"XML with {self._domains} domains")


def _parsed(tag: str, text: str) -> object:
    if tag == "name":
        return text
    try:
        return uuid.UUID(text)
    except ValueError:
        raise refused("a UUID that is none") from None


def _check_program(path: str) -> None:
    directory, name = posixpath.split(path)
    if directory not in PROGRAM_DIRECTORIES or name in {"", ".", ".."}:
        raise refused(f"the program {printable(path, 100)}, which is not one of the system's")


def refused(what: str) -> PeerError:
    """The error for what the filter does not let through."""
    return PeerError("libvirt.refused", f"the source asked this host's libvirtd for {what}")
