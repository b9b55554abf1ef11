"""The disks of a domain that libvirt would copy, by the rule of its own migration, read from the domain's XML.

libvirt copies every disk that has a source and is neither read-only nor shareable. Sealane lets it copy files, raw or qcow2, whose
path says plainly where they are; a domain with any other disk that would be copied is refused (`check.disks`), as its copy could
be incomplete, or write where nobody looked.
"""

import posixpath
import re
from dataclasses import dataclass
from typing import Final, Literal, cast
from xml.etree import ElementTree

from sealane.errors import SealaneError, make_error, printable

CopyStorage = Literal["none", "all", "inc"]
DiskFormat = Literal["raw", "qcow2"]
PATH_PATTERN: Final = r"^/[\x21-\x7e][\x20-\x7e]{0,253}$"
TARGET_PATTERN: Final = r"^[a-z0-9]{1,16}$"
_FORMATS: Final = frozenset({"raw", "qcow2"})


@dataclass(frozen=True)
class DiskFile:
    """An image file and its format."""

    path: str
    format: DiskFormat


@dataclass(frozen=True)
class CopiedDisk:
    """A disk that is copied: `target` is the name that the guest's bus has for it, `backing` what lies under its top layer."""

    target: str
    file: DiskFile
    backing: DiskFile | None = None


def read_copied_disks(xml: str, copy: CopyStorage) -> list[CopiedDisk]:
    """The disks that libvirt copies; raises `check.disks` for what Sealane does not let it copy, ValueError for what is no XML."""
    if copy == "none":
        return []
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - the own libvirtd's
    except ElementTree.ParseError as error:
        raise ValueError(f"a domain's XML does not parse: {error}") from None
    return [_read(each, copy) for each in root.iterfind("devices/disk") if _is_copied(each)]


def _is_copied(disk: ElementTree.Element) -> bool:
    source = disk.find("source")
    return (
        disk.find("readonly") is None and disk.find("shareable") is None and source is not None and bool(source.attrib)
    )


def _read(disk: ElementTree.Element, copy: CopyStorage) -> CopiedDisk:
    element = disk.find("target")
    target = "" if element is None else element.get("dev", "")
    if disk.get("device", "disk") != "disk" or not re.fullmatch(TARGET_PATTERN, target):
        raise not_copied(target, f"is a {printable(disk.get('device', 'disk'), 20)}")
    if disk.find("encryption") is not None or disk.find("source/encryption") is not None:
        raise not_copied(target, "is encrypted by libvirt")
    driver = disk.find("driver")
    file = _file(target, disk, "" if driver is None else driver.get("type", ""))
    below = disk.find("backingStore")
    if below is None or below.find("source") is None:
        return CopiedDisk(target, file)
    if copy == "all":
        raise make_error(
            "check.disks",
            f"{target} has a backing file",
            mend="put the backing file on the destination and say --copy-storage inc, or flatten the disk (`virsh blockpull`)",
        )
    kind = below.find("format")
    return CopiedDisk(target, file, _file(target, below, "" if kind is None else kind.get("type", "")))


def _file(target: str, element: ElementTree.Element, kind: str) -> DiskFile:
    source = element.find("source")
    path = "" if source is None else source.get("file", "")
    if element.get("type") != "file" or not re.fullmatch(PATH_PATTERN, path) or posixpath.normpath(path) != path:
        raise not_copied(target, "is not a plain file with an absolute path")
    if kind not in _FORMATS:
        raise not_copied(target, f"has the format {printable(kind, 20) or 'unknown'}")
    return DiskFile(path, cast(DiskFormat, kind))


def not_copied(target: str, why: str) -> SealaneError:
    """The error for a disk that stands in the way of copying a domain's disks."""
    return make_error("check.disks", f"the disk {printable(target, 20) or '(without a name)'} {why}")
