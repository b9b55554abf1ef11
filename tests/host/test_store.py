"""The store: what it keeps, what it promises, how it fails."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.host.models import Peer, VmDefinition
from sealane.host.store import Store
from sealane.hypervisor.driver import MigrationSettings
from sealane.hypervisor.process import LaunchedMachine
from tests.host.factories import NOW, migration

BEFORE = MigrationSettings(frozenset({"auto-converge"}), {"max-bandwidth": 1 << 40, "mode": "normal"})


def test_keeps_everything_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sealane.db"
    peer = Peer(name="b", fingerprint="SHA256:" + "0" * 64, address="::1", port=1)
    vm = VmDefinition(name="web01", qmp="/q", launch_incoming=["qemu", "-m", "1"])
    with Store(path, clock=lambda: NOW) as store:
        store.put_peer(peer)
        store.add_vm(vm)
        store.journal(
            migration(1, state="copying"), qmp="/q", launched=LaunchedMachine(7, 9), epoch=4, qemu_before=BEFORE
        )
        store.journal(migration(1, state="handing-over"), epoch=3)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Store(path) as store:
        assert store.peers() == [peer]
        assert store.vms() == [vm]
        (entry,) = store.unfinished()
        assert (entry.migration.state, entry.qmp, entry.launched) == ("handing-over", "/q", LaunchedMachine(7, 9))
        assert entry.qemu_before == BEFORE
        assert store.epoch("web01") == 4  # never back
        assert store.epoch("other") == 0
        assert store.remove_vm("web01")
        assert not store.remove_vm("web01")
        assert store.epoch("web01") == 4
        assert store.remove_peer("b")


def test_history_and_references(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        assert store.next_number() == 1
        for number in (1, 2, 3):
            store.journal(
                migration(
                    number,
                    id=f"{number:x}".ljust(32, "a"),
                    vm="a" if number < 3 else "b",
                    state="aborted",
                    ended_at=NOW if number < 3 else None,
                )
            )
        assert store.next_number() == 4
        assert [m.number for m in store.migrations()] == [3, 2, 1]
        assert [m.number for m in store.migrations(vm="a", limit=1)] == [2]
        assert [e.migration.number for e in store.find("2")] == [2]
        assert [e.migration.number for e in store.find("3" + "a" * 7)] == [3]
        assert store.find("3" + "a" * 6) == []
        assert store.find("%") == []
        assert [entry.migration.number for entry in store.unfinished()] == [
            3
        ]  # aborted, and its VM still to be resumed


def test_the_journal_survives_the_death_of_the_process(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from pathlib import Path; from sealane.host.store import Store;"
        "from tests.host.factories import migration; store = Store(Path(sys.argv[1]));"
        "store.journal(migration(1, state='handing-over'), epoch=2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "db"], check=False)
    assert done.returncode == -signal.SIGKILL
    with Store(tmp_path / "db") as store:
        assert [entry.migration.state for entry in store.unfinished()] == ["handing-over"]
        assert store.epoch("web01") == 2


def test_commits_reach_the_disk(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        assert store._rows("PRAGMA synchronous") == [(2,)]
        assert store._rows("PRAGMA journal_mode") == [("wal",)]


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        store.journal(migration(1, state="copying"))
        pages = int(str(store._rows("PRAGMA page_count")[0][0]))
        store._rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(SealaneError) as raised:
            store.journal(migration(1, state="handing-over", detail="x" * 100_000), epoch=9)
        assert raised.value.code == "host.disk-full"
        assert raised.value.retryable
        assert store.unfinished()[0].migration.state == "copying"
        assert store.epoch("web01") == 0
        store.journal(migration(1, state="aborted"))  # usable afterwards


@pytest.mark.skipif(os.geteuid() != 0, reason="a tmpfs wants root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        with Store(tmp_path / "db") as store:
            store.journal(migration(1))
            with pytest.raises(SealaneError) as raised:
                store.journal(migration(1, detail="x" * 400_000))
            assert raised.value.code == "host.disk-full"
            assert store.unfinished()[0].migration.detail == ""
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database, and long enough to be seen as one" * 100)
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    for name in ("text", "newer", "text/below"):
        with pytest.raises(SealaneError) as raised:
            Store(tmp_path / name)
        assert raised.value.code == "host.store"
