"""A host's store and chain without an agent, and migrations that have ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealane.crypto.identity import Identity, create_identity, save_identity
from sealane.host.models import Migration, Result
from sealane.host.receipts.chain import Receipts
from sealane.host.receipts.verify import Report, verify_chain
from sealane.host.store import Store
from sealane.paths import Paths
from tests.host.factories import NOW, migration

LANES = "ab" * 32


@dataclass
class ReceiptHost:
    """One host's state directory with its chain."""

    paths: Paths
    identity: Identity
    store: Store
    receipts: Receipts

    def end(self, number: int, **changes: Any) -> Migration:
        """Journal a migration that has ended, and write its receipt."""
        return self.receipts.issue(self.journal(number, **changes))

    def journal(self, number: int, **changes: Any) -> Migration:
        facts = {"state": "completed", "runs_at": "destination", "ended_at": NOW, "epoch": 1, "stream_digest": LANES}
        done = migration(number, **{**facts, "result": Result(total_ms=4.0, bytes_wire=7), **changes})
        self.store.journal(done)
        return done

    def files(self) -> list[Path]:
        return sorted(self.receipts.directory.glob("*.dsse"))

    def verify(self, **options: Any) -> Report:
        return verify_chain(self.paths, **options)

    def kinds(self, **options: Any) -> set[str]:
        return {problem.kind for problem in self.verify(**options).problems}


def make_host(root: Path, name: str = "host-a") -> ReceiptHost:
    paths = Paths(root / name / "state", root / name / "run", root / name / "etc")
    identity = create_identity(name, now=NOW)
    save_identity(paths, identity)
    store = Store(paths.database, clock=lambda: NOW)
    return ReceiptHost(paths, identity, store, Receipts(paths.state, store, identity, name))
