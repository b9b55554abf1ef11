"""What a source may say to the destination's libvirtd: what the migration of one domain needs, in its order.

A connection to libvirtd is root's power over the host. The source's end of it is another host's, so at the destination every
message is read and most are refused, which ends the migration:

    fresh      AUTH_LIST                                   once
    greeted    CONNECT_OPEN of the agreed URI, no flags    once
    open       PREPARE3_PARAMS                             once
    prepared   FINISH3_PARAMS                              once
    finished

    greeted and later  CONNECT_SUPPORTS_FEATURE
    open and later     DOMAIN_GET_STATE and lookups of this domain; keepalive; CONNECT_CLOSE

`prepare` and `finish` must leave the domain paused (VIR_MIGRATE_PAUSED): the agent resumes it, when it owns it. QEMU listens on
the agreed socket and nowhere else; tunnels, peer-to-peer, descriptors and streams are refused, as are parameters and flags that
nobody here has thought about. Back go the replies to what was asked.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from sealane.errors import printable
from sealane.libvirt.domainxml import DomainIdentity, check_xml, refused
from sealane.libvirt.rpc import (
    HEADER_BYTES,
    KEEPALIVE_PROGRAM,
    PROTOCOL_VERSION,
    REMOTE_PROGRAM,
    MessageReader,
    MessageType,
    Procedure,
    RpcMessage,
    Value,
    XdrReader,
    malformed,
)
from sealane.limits import RPC_CALLS_WAITING_MAX


class MigrateFlag:
    """virDomainMigrateFlags, as far as they are let through (libvirt-domain.h)."""

    LIVE: Final = 1 << 0
    PERSIST_DEST: Final = 1 << 3
    UNDEFINE_SOURCE: Final = 1 << 4
    PAUSED: Final = 1 << 5
    NON_SHARED_DISK: Final = 1 << 6
    NON_SHARED_INC: Final = 1 << 7
    CHANGE_PROTECTION: Final = 1 << 8
    UNSAFE: Final = 1 << 9
    ABORT_ON_ERROR: Final = 1 << 12
    AUTO_CONVERGE: Final = 1 << 13
    PARALLEL: Final = 1 << 17


# What libvirt's client notes for itself of a user's session, and sends along: VIR_DRV_OPEN_REMOTE_USER, _AUTOSTART.
_SESSION_OPEN: Final = 0b110
COPY_FLAGS: Final = MigrateFlag.NON_SHARED_DISK | MigrateFlag.NON_SHARED_INC
_ALLOWED_FLAGS: Final = (
    MigrateFlag.LIVE
    | MigrateFlag.PERSIST_DEST
    | MigrateFlag.UNDEFINE_SOURCE
    | MigrateFlag.PAUSED
    | MigrateFlag.CHANGE_PROTECTION
    | MigrateFlag.UNSAFE
    | MigrateFlag.ABORT_ON_ERROR
    | MigrateFlag.AUTO_CONVERGE
    | MigrateFlag.PARALLEL
)


class Phase(StrEnum):
    """How far the connection is."""

    FRESH = "fresh"
    GREETED = "greeted"
    OPEN = "open"
    PREPARED = "prepared"
    FINISHED = "finished"
    CLOSED = "closed"


@dataclass(frozen=True)
class Agreed:
    """What this migration is: the URI that is opened, the domain, where QEMU listens, how many multifd channels at most,
    where it takes disks (empty: disks are not copied), and the files that they go into, by the disks' targets."""

    uri: str
    domain: DomainIdentity
    migrate_uri: str
    channels_max: int = 0
    disks_uri: str = ""
    disks: Mapping[str, str] = field(default_factory=dict)


@dataclass
class RpcFilter:
    """One connection. Bytes go in, whole messages come out; PeerError `libvirt.refused` or `libvirt.malformed` ends it."""

    agreed: Agreed
    phase: Phase = Phase.FRESH
    _from_source: MessageReader = field(default_factory=MessageReader, repr=False)
    _from_daemon: MessageReader = field(default_factory=MessageReader, repr=False)
    _waiting: dict[int, int] = field(default_factory=dict, repr=False)
    has_prepared: bool = False
    has_finished: bool = False

    def from_source(self, data: bytes) -> bytes:
        """What of the source's bytes goes to libvirtd."""
        return b"".join(self._judge(message) for message in self._from_source.feed(data))

    def from_daemon(self, data: bytes) -> bytes:
        """What of libvirtd's bytes goes to the source."""
        return b"".join(self._judge_reply(message) for message in self._from_daemon.feed(data))

    def _judge(self, message: RpcMessage) -> bytes:
        if self.phase is Phase.CLOSED:
            raise refused("something after its close")
        if message.version != PROTOCOL_VERSION:
            raise refused(f"version {message.version} of the protocol")
        if message.program == KEEPALIVE_PROGRAM:
            return _keepalive(message)
        if message.program != REMOTE_PROGRAM:
            raise refused(f"program {message.program:#x}")
        if message.kind != MessageType.CALL or message.status:
            raise refused(f"a message of type {message.kind}")
        rule = _RULES.get(message.procedure)
        if rule is None:
            raise refused(f"procedure {message.procedure}")
        if self.phase not in rule.phases:
            raise refused(f"{Procedure(message.procedure).name} while the connection is {self.phase}")
        arguments = XdrReader(message.arguments)
        rule.check(self.agreed, arguments)
        arguments.end()
        if message.serial in self._waiting or len(self._waiting) >= RPC_CALLS_WAITING_MAX:
            raise refused("more calls at once than a migration makes")
        self._waiting[message.serial] = message.procedure
        self.phase = rule.then or self.phase
        return message.raw

    def _judge_reply(self, message: RpcMessage) -> bytes:
        if message.program == KEEPALIVE_PROGRAM:
            return _keepalive(message)
        asked = self._waiting.get(message.serial)
        if message.program != REMOTE_PROGRAM or message.kind != MessageType.REPLY or asked != message.procedure:
            return b""  # an event, or what was not asked for: libvirtd is ours, so this is no attack
        del self._waiting[message.serial]
        if message.status == 0:
            self.has_prepared |= asked == Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS
            self.has_finished |= asked == Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS
        return message.raw


def _keepalive(message: RpcMessage) -> bytes:
    if message.kind != MessageType.MESSAGE or message.procedure not in {1, 2} or len(message.raw) != HEADER_BYTES:
        raise refused("a keepalive message that is none")
    return message.raw


# ---- what each call may say


def _nothing(agreed: Agreed, arguments: XdrReader) -> None:
    pass


def _open(agreed: Agreed, arguments: XdrReader) -> None:
    uri = arguments.string() if arguments.boolean() else ""
    if uri != agreed.uri:
        raise refused(f"a connection to {printable(uri, 60) or 'any hypervisor'}")
    if (flags := arguments.uint32()) & ~(_SESSION_OPEN if uri.endswith("/session") else 0):
        raise refused(f"a connection with flags {flags:#x}")


def _feature(agreed: Agreed, arguments: XdrReader) -> None:
    arguments.int32()


def _state(agreed: Agreed, arguments: XdrReader) -> None:
    name, identity, _ = arguments.domain()
    _same(agreed, name, identity)
    if arguments.uint32():
        raise refused("a state with flags")


def _lookup_name(agreed: Agreed, arguments: XdrReader) -> None:
    _same(agreed, arguments.string(), agreed.domain.uuid.bytes)


def _lookup_uuid(agreed: Agreed, arguments: XdrReader) -> None:
    _same(agreed, agreed.domain.name, arguments.uuid())


def _same(agreed: Agreed, name: str, identity: bytes) -> None:
    if (name, uuid.UUID(bytes=identity)) != (agreed.domain.name, agreed.domain.uuid):
        raise refused(f"another domain ({printable(name, 60)})")


def _prepare(agreed: Agreed, arguments: XdrReader) -> None:
    parameters = arguments.typed_parameters()
    if parameters.get("migrate_uri") != agreed.migrate_uri:
        raise refused("a QEMU that listens elsewhere than was agreed")
    if "destination_xml" not in parameters:
        raise refused("a domain without its XML")
    _common(agreed, parameters, arguments)


def _finish(agreed: Agreed, arguments: XdrReader) -> None:
    parameters = arguments.typed_parameters()
    if parameters.get("destination_name", agreed.domain.name) != agreed.domain.name:
        raise refused("the end of another domain's migration")
    _common(agreed, parameters, arguments)
    arguments.boolean()  # cancelled


def _common(agreed: Agreed, parameters: Mapping[str, Value], arguments: XdrReader) -> None:
    _check_parameters(agreed, parameters)
    cookie = arguments.opaque()
    if cookie:
        try:
            check_xml(cookie.rstrip(b"\0").decode(), agreed.domain, root="qemu-migration")
        except UnicodeDecodeError:
            raise malformed("a cookie that is not UTF-8") from None
    flags = arguments.uint32()
    if not flags & MigrateFlag.PAUSED:
        raise refused("a domain that runs as soon as it has come")
    unknown = flags & ~(_ALLOWED_FLAGS | (COPY_FLAGS if agreed.disks_uri else 0))
    if unknown:
        raise refused(f"a migration with flags {unknown:#x}")


def _is_fitting_xml(agreed: Agreed, value: Value) -> bool:
    if not isinstance(value, str):
        return False
    check_xml(value, agreed.domain)
    return True


def _is_xml_of_what_comes(agreed: Agreed, value: Value) -> bool:
    """The domain as it is going to run: with copied disks, these and no others."""
    if not isinstance(value, str):
        return False
    check_xml(value, agreed.domain, disks=agreed.disks if agreed.disks_uri else None)
    return True


Check = Callable[[Agreed, Value], bool]
_is_number: Check = lambda agreed, value: type(value) is int  # noqa: E731
_PARAMETERS: Final[Mapping[str, Check]] = {
    "migrate_uri": lambda agreed, value: value == agreed.migrate_uri,
    "destination_name": lambda agreed, value: value == agreed.domain.name,
    "destination_xml": _is_xml_of_what_comes,
    "persistent_xml": _is_fitting_xml,
    "bandwidth": _is_number,
    "auto_converge.initial": _is_number,
    "auto_converge.increment": _is_number,
    "parallel.connections": lambda agreed, value: type(value) is int and 0 < value <= agreed.channels_max,
    "disks_uri": lambda agreed, value: bool(agreed.disks_uri) and value == agreed.disks_uri,
}


def _check_parameters(agreed: Agreed, parameters: Mapping[str, Value]) -> None:
    for name, value in parameters.items():
        check = _PARAMETERS.get(name)
        if check is None or not check(agreed, value):
            raise refused(f"a migration with this {printable(name, 60)}")


@dataclass(frozen=True)
class _Rule:
    """When a procedure is let through, what its arguments must be, and in which phase the connection is then."""

    phases: frozenset[Phase]
    check: Callable[[Agreed, XdrReader], None]
    then: Phase | None = None


_FROM_OPEN: Final = frozenset({Phase.OPEN, Phase.PREPARED, Phase.FINISHED})
_RULES: Final[Mapping[int, _Rule]] = {
    Procedure.AUTH_LIST: _Rule(frozenset({Phase.FRESH}), _nothing, Phase.GREETED),
    Procedure.CONNECT_OPEN: _Rule(frozenset({Phase.GREETED}), _open, Phase.OPEN),
    Procedure.CONNECT_CLOSE: _Rule(_FROM_OPEN, _nothing, Phase.CLOSED),
    Procedure.CONNECT_SUPPORTS_FEATURE: _Rule(_FROM_OPEN | {Phase.GREETED}, _feature),
    Procedure.DOMAIN_GET_STATE: _Rule(_FROM_OPEN, _state),
    Procedure.DOMAIN_LOOKUP_BY_NAME: _Rule(_FROM_OPEN, _lookup_name),
    Procedure.DOMAIN_LOOKUP_BY_UUID: _Rule(_FROM_OPEN, _lookup_uuid),
    Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS: _Rule(frozenset({Phase.OPEN}), _prepare, Phase.PREPARED),
    Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS: _Rule(frozenset({Phase.PREPARED}), _finish, Phase.FINISHED),
}
