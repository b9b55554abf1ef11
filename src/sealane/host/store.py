"""The agent's memory: peers, VMs, the journal of migrations, and each VM's epoch, in SQLite.

`journal` returns only when the entry is on the disk (WAL and synchronous=FULL: the log is fsynced at every commit), since
the hand-over's promises rest on it. All calls are synchronous and short; they belong to the thread that opened the store.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from sealane.errors import make_error
from sealane.host.models import Migration, Peer, PeerTrust, VmDefinition
from sealane.hypervisor.driver import MigrationSettings
from sealane.hypervisor.process import LaunchedMachine

SCHEMA: Final = """
CREATE TABLE peers (
    name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, address TEXT, port INTEGER, changed_at TEXT NOT NULL
) STRICT;
CREATE TABLE vms (
    name TEXT PRIMARY KEY, qmp TEXT NOT NULL UNIQUE, launch_incoming TEXT, changed_at TEXT NOT NULL
) STRICT;
CREATE TABLE epochs (vm TEXT PRIMARY KEY, epoch INTEGER NOT NULL, changed_at TEXT NOT NULL) STRICT;
CREATE TABLE migrations (
    id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, vm TEXT NOT NULL, role TEXT NOT NULL, peer TEXT NOT NULL,
    state TEXT NOT NULL, snapshot TEXT NOT NULL, qmp TEXT, launched_pid INTEGER, launched_start_ticks INTEGER,
    changed_at TEXT NOT NULL
) STRICT;
CREATE INDEX migrations_of_vm ON migrations (vm, number);
CREATE INDEX migrations_unfinished ON migrations (number) WHERE state NOT IN ('completed', 'aborted');
"""

# What each later version adds to the one before; never changed once released.
UPGRADES: Final = (
    """
ALTER TABLE vms ADD COLUMN least_level INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vms ADD COLUMN labels TEXT NOT NULL DEFAULT '{}';
CREATE TABLE receipts (
    sequence INTEGER PRIMARY KEY, digest TEXT NOT NULL, migration TEXT NOT NULL, state TEXT NOT NULL,
    noted_at TEXT NOT NULL, UNIQUE (migration, state)
) STRICT;
CREATE TABLE sightings (fingerprint TEXT PRIMARY KEY, trust TEXT NOT NULL, seen_at TEXT NOT NULL) STRICT;
""",
    """
ALTER TABLE vms ADD COLUMN vtpm TEXT;
""",
    """
ALTER TABLE migrations ADD COLUMN qemu_before TEXT;
""",
)
SCHEMA_VERSION: Final = 1 + len(UPGRADES)

HISTORY_LIMIT: Final = 200
ID_BEGINNING_MIN: Final = 8
_ARGV: Final = TypeAdapter(list[str])
_LABELS: Final = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class JournalEntry:
    """A migration as the journal knows it, with what a new agent needs to mend it.

    `qemu_before` is what the VM's QEMU was set to before the migration, where it was set anew for it.
    """

    migration: Migration
    qmp: str | None = None
    launched: LaunchedMachine | None = None
    qemu_before: MigrationSettings | None = None


def utc_now() -> datetime:
    """The system's clock, aware of its zone."""
    return datetime.now(UTC)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        name = getattr(error, "sqlite_errorname", "") or type(error).__name__
        if code == sqlite3.SQLITE_FULL:
            raise make_error("host.disk-full", f"no space is left for {path}") from error
        raise make_error("host.store", f"{path}: {error} ({name})") from error
    except OSError as error:
        raise make_error("host.store", f"{path}: {error.strerror}") from error


class Store:
    """One open database; `close` it, or use it with `with`."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._path = path
        self._clock = clock
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite's -wal takes this mode too
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if not 0 <= version <= SCHEMA_VERSION:
            detail = f"{self._path} has schema {version}; this Sealane knows {SCHEMA_VERSION}"
            raise make_error("host.store", detail, mend="use the Sealane version that wrote it, or a newer one")
        if version < SCHEMA_VERSION:
            # executescript would commit first; one transaction makes a half-made database impossible
            self._db.execute("BEGIN IMMEDIATE")
            for script in (SCHEMA, *UPGRADES)[version:]:
                for statement in script.split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
            self._db.execute("COMMIT")

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; harmless when done twice."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _translated(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLITE_FULL may have rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with _translated(self._path):
            return self._db.execute(query, values).fetchall()

    def _now(self) -> str:
        return self._clock().isoformat()

    # Peers

    def peers(self) -> list[Peer]:
        """All trusted hosts, by name."""
        rows = self._rows("SELECT name, fingerprint, address, port FROM peers ORDER BY name")
        return [
            Peer.model_validate(dict(zip(("name", "fingerprint", "address", "port"), row, strict=True))) for row in rows
        ]

    def put_peer(self, peer: Peer) -> None:
        """Add a peer or replace the one of that name."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?, ?)",
                (peer.name, peer.fingerprint, peer.address, peer.port, self._now()),
            )

    def remove_peer(self, name: str) -> bool:
        """Forget a peer; False when there was none."""
        with self._transaction() as db:
            return db.execute("DELETE FROM peers WHERE name = ?", (name,)).rowcount > 0

    # VMs

    def vms(self) -> list[VmDefinition]:
        """All registered VMs, by name."""
        query = "SELECT name, qmp, launch_incoming, least_level, labels, vtpm FROM vms ORDER BY name"
        return [
            VmDefinition.model_validate(
                {
                    "name": name,
                    "qmp": qmp,
                    "launch_incoming": _ARGV.validate_json(str(argv)) if argv else None,
                    "least_level": level,
                    "labels": _LABELS.validate_json(str(labels)),
                    "vtpm": vtpm,
                }
            )
            for name, qmp, argv, level, labels, vtpm in self._rows(query)
        ]

    def add_vm(self, vm: VmDefinition) -> None:
        """Register a VM; the caller has looked that its name and socket are free."""
        argv = None if vm.launch_incoming is None else _ARGV.dump_json(vm.launch_incoming).decode()
        labels = _LABELS.dump_json(vm.labels).decode()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO vms (name, qmp, launch_incoming, changed_at, least_level, labels, vtpm) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (vm.name, vm.qmp, argv, self._now(), vm.least_level, labels, vm.vtpm),
            )

    def remove_vm(self, name: str) -> bool:
        """Forget a VM; False when there was none. Its epoch is kept: it must never go back."""
        with self._transaction() as db:
            return db.execute("DELETE FROM vms WHERE name = ?", (name,)).rowcount > 0

    def epoch(self, vm: str) -> int:
        """How many times the VM was handed over, as far as this host knows."""
        rows = self._rows("SELECT epoch FROM epochs WHERE vm = ?", vm)
        return int(str(rows[0][0])) if rows else 0

    # The journal

    def next_number(self) -> int:
        """The number of the next migration; small, for people."""
        return int(str(self._rows("SELECT coalesce(max(number), 0) + 1 FROM migrations")[0][0]))

    def journal(
        self,
        migration: Migration,
        *,
        qmp: str | None = None,
        launched: LaunchedMachine | None = None,
        epoch: int | None = None,
        qemu_before: MigrationSettings | None = None,
    ) -> None:
        """Write where a migration stands; durable on return. None leaves what an earlier entry said.

        With `epoch` the VM's epoch moves in the same transaction; it never goes back.
        """
        now = self._now()
        pid, ticks = (launched.pid, launched.start_time_ticks) if launched else (None, None)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO migrations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "state = excluded.state, snapshot = excluded.snapshot, changed_at = excluded.changed_at, "
                "qmp = coalesce(excluded.qmp, qmp), launched_pid = coalesce(excluded.launched_pid, launched_pid), "
                "launched_start_ticks = coalesce(excluded.launched_start_ticks, launched_start_ticks), "
                "qemu_before = coalesce(excluded.qemu_before, qemu_before)",
                (
                    *(migration.id, migration.number, migration.vm, migration.role, migration.peer),
                    *(migration.state, migration.model_dump_json(), qmp, pid, ticks, now, _encoded(qemu_before)),
                ),
            )
            if epoch is not None:
                db.execute(
                    "INSERT INTO epochs VALUES (?, ?, ?) ON CONFLICT (vm) DO UPDATE SET "
                    "epoch = max(epoch, excluded.epoch), changed_at = excluded.changed_at",
                    (migration.vm, epoch, now),
                )

    def unfinished(self) -> list[JournalEntry]:
        """Migrations that have not ended, the oldest first.

        `completed` and `aborted` without an end are among them: who owns the VM is settled, and something is still to be
        done here (a paused copy to be ended, a VM to be resumed, a launched QEMU to be destroyed).
        """
        return self._entries(
            "WHERE state NOT IN ('completed', 'aborted') OR json_extract(snapshot, '$.ended_at') IS NULL ORDER BY number"
        )

    def migrations(self, *, vm: str | None = None, limit: int = HISTORY_LIMIT) -> list[Migration]:
        """The newest migrations, the newest first."""
        clause = "WHERE ?1 IS NULL OR vm = ?1 ORDER BY number DESC LIMIT ?2"
        return [entry.migration for entry in self._entries(clause, vm, limit)]

    def find(self, reference: str) -> list[JournalEntry]:
        """Migrations of that id, that number, or (only without those) that beginning of an id; two at most.

        A beginning needs eight digits, so that a mistyped number never finds a migration by chance.
        """
        exact = self._entries("WHERE id = ?1 OR CAST(number AS TEXT) = ?1", reference)
        if exact:
            return exact
        if len(reference) < ID_BEGINNING_MIN:
            return []
        return self._entries("WHERE substr(id, 1, length(?1)) = ?1 ORDER BY number LIMIT 2", reference)

    # Receipts: the chain's head and what is still to be written

    def receipt_head(self) -> tuple[int, str]:
        """Number and digest of the last receipt; 0 and zeros before the first."""
        rows = self._rows("SELECT sequence, digest FROM receipts ORDER BY sequence DESC LIMIT 1")
        return (int(str(rows[0][0])), str(rows[0][1])) if rows else (0, "0" * 64)

    def receipt_of(self, migration: str, state: str) -> int | None:
        """The receipt of a migration in that state, if there is one."""
        rows = self._rows("SELECT sequence FROM receipts WHERE migration = ? AND state = ?", migration, state)
        return int(str(rows[0][0])) if rows else None

    def without_receipt(self) -> list[Migration]:
        """Migrations that rest in a state for which no receipt was noted, the oldest first."""
        clause = (
            "WHERE (state = 'in-doubt' OR json_extract(snapshot, '$.ended_at') IS NOT NULL) AND NOT EXISTS (SELECT 1 FROM receipts "
            "WHERE receipts.migration = migrations.id AND receipts.state = migrations.state) ORDER BY number"
        )
        return [entry.migration for entry in self._entries(clause)]

    def note_receipt(self, sequence: int, digest: str, migration: Migration) -> None:
        """The chain's new head, and the snapshot that names it, in one transaction."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO receipts VALUES (?, ?, ?, ?, ?)",
                (sequence, digest, migration.id, migration.state, self._now()),
            )
            db.execute("UPDATE migrations SET snapshot = ? WHERE id = ?", (migration.model_dump_json(), migration.id))

    # What was last seen of the peers

    def note_sighting(self, fingerprint: str, trust: PeerTrust) -> None:
        """Keep what a peer's last evidence came to."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?, ?)", (fingerprint, trust.model_dump_json(), self._now())
            )

    def sightings(self) -> dict[str, PeerTrust]:
        """The last evidence of each peer, by fingerprint."""
        rows = self._rows("SELECT fingerprint, trust FROM sightings")
        return {str(fingerprint): PeerTrust.model_validate_json(str(trust)) for fingerprint, trust in rows}

    def _entries(self, clause: str, *values: object) -> list[JournalEntry]:
        columns = "snapshot, qmp, launched_pid, launched_start_ticks, qemu_before"
        query = f"SELECT {columns} FROM migrations {clause}"  # noqa: S608
        return [
            JournalEntry(
                Migration.model_validate_json(str(snapshot)),
                qmp if isinstance(qmp, str) else None,
                LaunchedMachine(pid, ticks) if isinstance(pid, int) and isinstance(ticks, int) else None,
                _decoded(settings) if isinstance(settings, str) else None,
            )
            for snapshot, qmp, pid, ticks, settings in self._rows(query, *values)
        ]


def _encoded(settings: MigrationSettings | None) -> str | None:
    if settings is None:
        return None
    return json.dumps({"capabilities": sorted(settings.capabilities), "parameters": dict(settings.parameters)})


def _decoded(text: str) -> MigrationSettings:
    stored = json.loads(text)
    return MigrationSettings(frozenset(stored["capabilities"]), stored["parameters"])
