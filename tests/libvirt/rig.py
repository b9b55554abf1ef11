"""Messages of libvirt's protocol as a source sends them, built by hand: what the tests change is named."""

import struct
import uuid
from collections.abc import Mapping

from sealane.libvirt.domainxml import DomainIdentity
from sealane.libvirt.rpc import KEEPALIVE_PROGRAM, REMOTE_PROGRAM, Procedure
from sealane.libvirt.rpcfilter import Agreed, MigrateFlag

URI = "qemu:///system"
SOCKET = "unix:///run/sealane-migrate/1f/in.sock"
DOMAIN = DomainIdentity("web", uuid.UUID("ae3368f7-57e0-5307-be70-1afb23fe0461"))
AGREED = Agreed(URI, DOMAIN, SOCKET, channels_max=4)
FLAGS = MigrateFlag.LIVE | MigrateFlag.PAUSED | MigrateFlag.CHANGE_PROTECTION


def domain_xml(
    name: str = DOMAIN.name,
    identity: uuid.UUID = DOMAIN.uuid,
    *,
    emulator: str = "/usr/bin/qemu-system-x86_64",
    devices: str = "",
    more: str = "",
) -> str:
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{identity}</uuid><memory unit='KiB'>262144</memory>{more}"
        f"<devices><emulator>{emulator}</emulator>{devices}</devices></domain>"
    )


COOKIE = f"<qemu-migration><name>{DOMAIN.name}</name><uuid>{DOMAIN.uuid}</uuid><hostname>a</hostname></qemu-migration>"


def word(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def opaque(data: bytes) -> bytes:
    return word(len(data)) + data + bytes(-len(data) % 4)


def text(value: str) -> bytes:
    return opaque(value.encode())


def parameters(values: Mapping[str, str | int]) -> bytes:
    body = word(len(values))
    for name, value in values.items():
        body += text(name) + (word(7) + text(value) if isinstance(value, str) else word(1) + word(value))
    return body


def domain(name: str = DOMAIN.name, identity: uuid.UUID = DOMAIN.uuid, number: int = 1) -> bytes:
    return text(name) + identity.bytes + word(number)


def message(
    procedure: int,
    arguments: bytes = b"",
    *,
    serial: int = 0,
    kind: int = 0,
    status: int = 0,
    program: int = REMOTE_PROGRAM,
    version: int = 1,
) -> bytes:
    return struct.pack(">IIIiiIi", 28 + len(arguments), program, version, procedure, kind, serial, status) + arguments


def auth_list(serial: int = 0) -> bytes:
    return message(Procedure.AUTH_LIST, serial=serial)


def connect_open(uri: str = URI, *, flags: int = 0, serial: int = 1) -> bytes:
    return message(Procedure.CONNECT_OPEN, word(1) + text(uri) + word(flags), serial=serial)


def feature(number: int = 13, *, serial: int = 2) -> bytes:
    return message(Procedure.CONNECT_SUPPORTS_FEATURE, word(number), serial=serial)


def prepare(
    values: Mapping[str, str | int] | None = None, *, cookie: str = COOKIE, flags: int = FLAGS, serial: int = 3
) -> bytes:
    given = {"migrate_uri": SOCKET, "destination_xml": domain_xml()} if values is None else values
    body = parameters(given) + opaque(cookie.encode() + b"\0") + word(flags)
    return message(Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS, body, serial=serial)


def finish(
    values: Mapping[str, str | int] | None = None,
    *,
    cookie: str = COOKIE,
    flags: int = FLAGS,
    cancelled: int = 0,
    serial: int = 4,
) -> bytes:
    given = {"migrate_uri": SOCKET, "destination_name": DOMAIN.name} if values is None else values
    body = parameters(given) + opaque(cookie.encode() + b"\0") + word(flags) + word(cancelled)
    return message(Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS, body, serial=serial)


def get_state(*who: object, flags: int = 0, serial: int = 5) -> bytes:
    return message(Procedure.DOMAIN_GET_STATE, domain(*who) + word(flags), serial=serial)  # type: ignore[arg-type]


def close(serial: int = 6) -> bytes:
    return message(Procedure.CONNECT_CLOSE, serial=serial)


def keepalive(number: int = 1) -> bytes:
    return message(number, kind=2, program=KEEPALIVE_PROGRAM)


def reply(procedure: int, serial: int, *, status: int = 0, arguments: bytes = b"") -> bytes:
    return message(procedure, arguments, serial=serial, kind=1, status=status)


def opened() -> list[bytes]:
    return [auth_list(), connect_open()]


def migration() -> list[bytes]:
    """All that a source says in a migration, in order."""
    return [*opened(), feature(), prepare(), finish(), get_state(), close()]
