"""Domains as VMs: where one is controlled, what is known of it, and what its metadata says for policies.

A domain's address is `libvirt:UUID:URI`. Its metadata may hold, in Sealane's namespace,

    <sealane:vm xmlns:sealane="urn:sealane:vm:1" least-level="2">
      <sealane:label name="tier" value="web"/>
    </sealane:vm>

Metadata of that namespace that does not fit asks for the highest level: a word that was lost must not open a door.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, cast
from xml.etree import ElementTree

from sealane.errors import PeerError

DomainUri = Literal["qemu:///system", "qemu:///session"]
METADATA_NAMESPACE: Final = "urn:sealane:vm:1"
PREFIX: Final = "libvirt:"
LEVEL_MAX: Final = 4
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9._-]{0,63}")
_LABELS_MAX: Final = 32
_URI: Final = re.compile(r"qemu:///(system|session)")
_KIB: Final[Mapping[str, int]] = {"b": 1, "bytes": 1, "KiB": 1024, "k": 1024, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class DomainAddress:
    """Which domain of which libvirtd of this host."""

    uuid: uuid.UUID
    uri: DomainUri

    def __str__(self) -> str:
        return f"{PREFIX}{self.uuid}:{self.uri}"


def is_domain(address: str) -> bool:
    """Whether a VM is controlled by libvirt."""
    return address.startswith(PREFIX)


def parse_address(address: str) -> DomainAddress:
    """Read `libvirt:UUID:URI`; ValueError where it is none."""
    identity, _, uri = address.removeprefix(PREFIX).partition(":")
    if not is_domain(address) or not _URI.fullmatch(uri):
        raise ValueError(f"no address of a domain: {address!r}")
    return DomainAddress(uuid.UUID(identity), cast(DomainUri, uri))


def address_of(identity: str, uri: DomainUri) -> str:
    """The address of a domain that a peer names; raises PeerError `peer.message` for what is no UUID."""
    try:
        return str(DomainAddress(uuid.UUID(identity), uri))
    except ValueError:
        raise PeerError("peer.message", "the domain's UUID is none") from None


@dataclass(frozen=True)
class DomainFacts:
    """A domain by its XML, as this host's own libvirtd gives it."""

    name: str
    address: DomainAddress
    memory_bytes: int
    cpus: int
    machine_type: str
    is_tcg: bool
    least_level: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    is_understood: bool = True


def read_domain(xml: str, uri: DomainUri) -> DomainFacts:
    """Read a domain's XML; ValueError where it is none."""
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - the own libvirtd's
    except ElementTree.ParseError as error:
        raise ValueError(f"a domain's XML does not parse: {error}") from None
    memory, kind = root.find("memory"), root.find("os/type")
    level, labels, understood = _policy(root)
    return DomainFacts(
        name=root.findtext("name", ""),
        address=DomainAddress(uuid.UUID(root.findtext("uuid", "")), uri),
        memory_bytes=0 if memory is None else int(memory.text or "0") * _KIB.get(memory.get("unit", "KiB"), 1024),
        cpus=int(root.findtext("vcpu", "0")),
        machine_type="" if kind is None else kind.get("machine", ""),
        is_tcg=root.get("type") == "qemu",
        least_level=level,
        labels=labels,
        is_understood=understood,
    )


def _policy(root: ElementTree.Element) -> tuple[int, dict[str, str], bool]:
    """The least level, the labels, and whether all of it was understood."""
    ours = [each for each in root.iterfind("metadata/*") if each.tag.startswith(f"{{{METADATA_NAMESPACE}}}")]
    if not ours:
        return 0, {}, True
    try:
        if len(ours) > 1:
            raise ValueError("more than one element")
        return *_read_vm(ours[0]), True
    except ValueError:
        return LEVEL_MAX, {}, False


def _read_vm(element: ElementTree.Element) -> tuple[int, dict[str, str]]:
    if element.tag != f"{{{METADATA_NAMESPACE}}}vm" or set(element.keys()) - {"least-level"}:
        raise ValueError(element.tag)
    level = int(element.get("least-level", "0"))
    labels: dict[str, str] = {}
    for each in element:
        name, value = each.get("name", ""), each.get("value", "")
        known = each.tag == f"{{{METADATA_NAMESPACE}}}label" and set(each.keys()) == {"name", "value"}
        if not known or name in labels or not _LABEL_NAME.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError("a label that does not fit")
        labels[name] = value
    if not 0 <= level <= LEVEL_MAX or len(labels) > _LABELS_MAX:
        raise ValueError("a level or labels that do not fit")
    return level, labels
