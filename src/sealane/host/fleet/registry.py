"""What a CA's host keeps: the CA's key and certificate, the hosts that were approved, every certificate that was issued.

    state/ca/ca.key     PKCS#8, mode 0600, encrypted where a passphrase was given
    state/ca/ca.crt     the CA's certificate
    state/ca/ca.db      SQLite: hosts, certificates, the last revocation list

The command line and the agent may use it at once. Nothing is ever taken out of the table of certificates before it expired.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from sealane.crypto.authority import (
    PASSPHRASE_BYTES_MIN,
    Authority,
    AuthorityLocked,
    create_authority,
    issue_host_certificate,
    issue_revocation_list,
    load_authority,
)
from sealane.crypto.chains import parse_certificates, parse_revocation_list
from sealane.errors import HostError, UsageError, make_error
from sealane.host.fleet.files import read_if_there, write_whole
from sealane.session.renewal import HostEntry
from sealane.session.vouching import Claims

_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS hosts (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, public_key BLOB NOT NULL, "
    "state TEXT NOT NULL, address TEXT, port INTEGER, reference TEXT NOT NULL, hardware_keys TEXT NOT NULL, "
    "changed_at TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS certificates (serial TEXT PRIMARY KEY, host TEXT NOT NULL, not_after TEXT NOT NULL, level INTEGER "
    "NOT NULL, issued_at TEXT NOT NULL, revoked_at TEXT) STRICT",
    "CREATE TABLE IF NOT EXISTS lists (number INTEGER PRIMARY KEY, pem TEXT NOT NULL, serials TEXT NOT NULL) STRICT",
)
State = Literal["approved", "revoked"]


@dataclass(frozen=True)
class FleetHost:
    """One host as the CA knows it; level and time are those of its last certificate."""

    name: str
    fingerprint: str
    public_key: bytes
    state: State
    address: str | None
    port: int | None
    reference: str
    hardware_keys: tuple[str, ...] = ()
    level: int | None = None
    not_after: datetime | None = None

    @property
    def entry(self) -> HostEntry:
        """As other hosts are told of it."""
        return HostEntry(
            name=self.name,
            fingerprint=self.fingerprint,
            address=self.address,
            port=self.port,
            reference=self.reference,
            hardware_keys=list(self.hardware_keys),
        )


class Registry:
    """A CA's files; `create` makes them once. Raises HostError `host.store`, `host.permission`, `ca.locked`; `ca.none`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: Authority | None = None

    @property
    def is_there(self) -> bool:
        """Whether this host has a CA."""
        return (self._directory / "ca.crt").exists()

    @property
    def certificate_pem(self) -> bytes:
        """The CA's certificate; raises `ca.none`."""
        pem = read_if_there(self._directory / "ca.crt")
        if not pem:
            raise make_error("ca.none", "this host has no CA; make one: sealane ca init")
        return pem

    @property
    def key_pem(self) -> bytes:
        """The key's file as it is."""
        return read_if_there(self._directory / "ca.key")

    def create(self, name: str, passphrase: bytes | None, *, now: datetime, lifetime: timedelta) -> Authority:
        """A new CA; raises `ca.exists`, and UsageError where the passphrase is too short."""
        if self.is_there or self.key_pem:
            raise make_error("ca.exists", f"there is a CA in {self._directory}")
        if passphrase is not None and len(passphrase) < PASSPHRASE_BYTES_MIN:
            raise UsageError("usage.argument", f"a passphrase of less than {PASSPHRASE_BYTES_MIN} bytes")
        authority = create_authority(name, now=now, lifetime=lifetime)
        write_whole(self._directory / "ca.key", authority.key_pem(passphrase))
        write_whole(self._directory / "ca.crt", authority.certificate_pem, mode=0o644)
        return authority

    def open(self, passphrase: bytes | None) -> Authority:
        """The CA, able to sign; raises `ca.locked`, `ca.none`. Deriving the key from a passphrase takes a moment, once."""
        certificate, key = self.certificate_pem, self.key_pem
        if self._opened is not None and self._opened.certificate_pem == certificate:
            return self._opened
        try:
            self._opened = load_authority(certificate, key, passphrase)
        except AuthorityLocked as error:
            raise HostError("ca.locked", str(error)) from None
        except ValueError as error:
            raise HostError("ca.locked", f"{self._directory}: {error}") from None
        return self._opened

    # Hosts

    def hosts(self) -> list[FleetHost]:
        """All, by name."""
        query = (
            "SELECT h.name, h.fingerprint, h.public_key, h.state, h.address, h.port, h.reference, "
            "h.hardware_keys, c.level, c.not_after FROM hosts h LEFT JOIN certificates c ON c.serial = (SELECT serial FROM "
            "certificates WHERE host = h.name ORDER BY issued_at DESC LIMIT 1) ORDER BY h.name"
        )
        with self._database() as db:
            return [_host(row) for row in db.execute(query)]

    def by_fingerprint(self, fingerprint: str) -> FleetHost | None:
        """The host with that certificate, whatever its state."""
        return next((host for host in self.hosts() if host.fingerprint == fingerprint), None)

    def enrol(self, host: FleetHost, *, now: datetime) -> None:
        """Approve a host that was not there, or again with the same fingerprint; raises `trust.exists`."""
        with self._database() as db:
            rows = db.execute("SELECT name, fingerprint FROM hosts WHERE name = ? OR fingerprint = ?",
                              (host.name, host.fingerprint)).fetchall()  # fmt: skip
            if any(row != (host.name, host.fingerprint) for row in rows):
                raise make_error("trust.exists", f"the CA knows {rows[0][0]} with {rows[0][1]}; remove it first")
            db.execute(
                "INSERT OR REPLACE INTO hosts VALUES (?, ?, ?, 'approved', ?, ?, ?, ?, ?)",
                (
                    host.name,
                    host.fingerprint,
                    host.public_key,
                    host.address,
                    host.port,
                    host.reference,
                    " ".join(host.hardware_keys),
                    _text(now),
                ),
            )

    def approve(self, name: str, *, now: datetime) -> None:
        """Let a revoked host have certificates again; raises `ca.host-unknown`."""
        self._set_state(name, "approved", now)

    def revoke(self, name: str, *, now: datetime) -> int:
        """Give no more certificates to a host, and revoke those that have not expired; how many. Raises `ca.host-unknown`."""
        self._set_state(name, "revoked", now)
        with self._database() as db:
            return db.execute(
                "UPDATE certificates SET revoked_at = ? WHERE host = ? AND revoked_at IS NULL AND not_after >= ?",
                (_text(now), name, _text(now)),
            ).rowcount

    def remove(self, name: str, *, now: datetime) -> None:
        """Revoke a host and forget it, so that the name is free; raises `ca.host-unknown`."""
        self.revoke(name, now=now)
        with self._database() as db:
            db.execute("DELETE FROM hosts WHERE name = ?", (name,))

    def note_address(self, name: str, address: str, port: int) -> None:
        """Where a host was last met."""
        with self._database() as db:
            db.execute("UPDATE hosts SET address = ?, port = ? WHERE name = ?", (address, port, name))

    def _set_state(self, name: str, state: State, now: datetime) -> None:
        with self._database() as db:
            if not db.execute(
                "UPDATE hosts SET state = ?, changed_at = ? WHERE name = ?", (state, _text(now), name)
            ).rowcount:
                raise make_error("ca.host-unknown", f"the CA knows no host {name}")

    # What is issued

    def issue(
        self, authority: Authority, host: FleetHost, claims: Claims, *, now: datetime, lifetime: timedelta
    ) -> bytes:
        """A host certificate (PEM), noted before it is given away; raises `ca.revoked` where the host is not approved now."""
        made = issue_host_certificate(
            authority, host.name, host.public_key, claims.encode(), now=now, lifetime=lifetime
        )
        with self._database() as db:
            noted = db.execute(
                "INSERT INTO certificates SELECT ?, name, ?, ?, ?, NULL FROM hosts WHERE name = ? AND fingerprint = ? "
                "AND state = 'approved'",
                (f"{made.serial:x}", _text(made.not_after), claims.level, _text(now), host.name, host.fingerprint),
            ).rowcount
        if not noted:
            raise make_error("ca.revoked", f"the CA gives {host.name} no certificate")
        return made.pem

    def revocations(self, authority: Authority, *, now: datetime, lifetime: timedelta) -> bytes:
        """The revocation list (PEM): the last one while it is of now and complete, or a new one with the next number."""
        with self._database() as db:
            rows = db.execute(
                "SELECT serial, revoked_at FROM certificates WHERE revoked_at IS NOT NULL AND not_after >= ? ORDER BY serial",
                (_text(now),),
            ).fetchall()
            serials = " ".join(serial for serial, _ in rows)
            last = db.execute("SELECT number, pem, serials FROM lists ORDER BY number DESC LIMIT 1").fetchone()
            if last is not None and last[2] == serials and _is_fresh(last[1].encode(), now, authority):
                return bytes(last[1].encode())
            number = 1 if last is None else last[0] + 1
            revoked = [(int(serial, 16), datetime.fromisoformat(moment)) for serial, moment in rows]
            pem = issue_revocation_list(authority, revoked, number=number, now=now, lifetime=lifetime)
            db.execute("DELETE FROM lists")
            db.execute("INSERT INTO lists VALUES (?, ?, ?)", (number, pem.decode(), serials))
        return pem

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        path = self._directory / "ca.db"
        if not self.is_there:
            raise make_error("ca.none", "this host has no CA; make one: sealane ca init")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            try:
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    db.execute(statement)
                yield db
                db.execute("COMMIT")
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise HostError("host.store", f"{path}: {error}") from error


def _is_fresh(pem: bytes, now: datetime, authority: Authority) -> bool:
    """Whether the list is this CA's, and less than half of its time is over."""
    last = parse_revocation_list(pem)
    if last.next_update is None or last.issuer != parse_certificates(authority.certificate_pem)[0].subject:
        return False
    return last.this_update <= now <= last.this_update + (last.next_update - last.this_update) / 2


def _host(row: Any) -> FleetHost:
    name, fingerprint, key, state, address, port, reference, hardware, level, not_after = row
    until = None if not_after is None else datetime.fromisoformat(not_after)
    keys = tuple(hardware.split())
    return FleetHost(name, fingerprint, key, state, address, port, reference, keys, level, until)


def _text(moment: datetime) -> str:
    """In UTC and in one width, so that the texts sort as the moments do."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
