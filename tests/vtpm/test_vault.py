"""Files and keys of a vTPM, with real swtpms: what is put back, exchanged or changed is refused, each in its own words."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.vtpm.control import BlobType
from sealane.vtpm.record import Record, Records, digest_of
from sealane.vtpm.swtpm import STATE_FILE, Swtpm, manufacture
from sealane.vtpm.vault import Launched, Vault
from tests.vtpm.conftest import MakeVault


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a new TPM, in clear; making one takes a second."""
    return manufacture(tmp_path_factory.mktemp("made"))


@pytest.fixture(params=["file", "tpm"])
def tcti(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "file" else str(request.getfixturevalue("host_tpm"))


def adopted(vault: Vault, plain: bytes) -> Record:
    """A vault with a TPM that was launched once and ended."""
    storage = vault._storage
    storage.mkdir(exist_ok=True)
    (storage / STATE_FILE).write_bytes(plain)
    return ended(vault.create(0, adopt=True))


def ended(launched: Launched) -> Record:
    launched.swtpm.stop()
    return launched.record


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(SealaneError) as found:
        yield
    assert found.value.code == code, found.value


def start_alone(files: Path, key: bytes | None) -> None:
    """What somebody with the files and no record would try; raises where swtpm does not take them."""
    swtpm = Swtpm(files, key)
    try:
        swtpm.control.start()
    finally:
        swtpm.stop()


def test_it_is_the_same_tpm_at_every_launch_under_another_key(
    make_vault: MakeVault, plain: bytes, tcti: str | None
) -> None:
    vault = make_vault(tcti=tcti)
    first = adopted(vault, plain)
    assert not (vault._storage / STATE_FILE).exists()  # what lay there in clear is gone
    launched = vault.open(0)
    try:
        state = launched.swtpm.control.tpm_state_read(BlobType.PERMANENT)
    finally:
        second = ended(launched)
    assert second.ek_sha256 == first.ek_sha256 != ""
    assert second.key.counter == first.key.counter + 1
    assert second.directory != first.directory
    assert [path.name for path in vault._storage.iterdir()] == [second.directory]
    assert state[:32] not in (second.path / STATE_FILE).read_bytes()
    assert vault.verify() == second
    with refused("vtpm.swtpm"):
        start_alone(second.path, None)


def test_an_older_copy_of_the_files_is_refused(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    old = (record.path / STATE_FILE).read_bytes()
    record = ended(vault.open(0))
    vault.verify()
    (record.path / STATE_FILE).write_bytes(old)
    for attempt in (vault.verify, lambda: vault.open(0)):
        with refused("vtpm.stale"):
            attempt()


def test_a_copy_within_one_launch_is_refused(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    adopted(vault, plain)
    launched = vault.open(0)
    path = launched.swtpm.state_path
    old = path.read_bytes()
    launched.swtpm.endorsement_key()  # TPM2_Startup writes
    new = ended(launched).written(vault.digest_now(launched.record)).authenticated(launched.key)
    assert path.read_bytes() != old
    vault.records.save(new)
    vault.verify()
    path.write_bytes(old)
    with refused("vtpm.stale"):
        vault.verify()


def test_another_vms_files_are_refused(make_vault: MakeVault, plain: bytes) -> None:
    vault, other = make_vault(), make_vault("web02")
    record, foreign = adopted(vault, plain), adopted(other, plain)
    shutil.copy(foreign.path / STATE_FILE, record.path / STATE_FILE)
    with refused("vtpm.foreign"):
        vault.verify()


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_bit_is_refused(make_vault: MakeVault, plain: bytes, at: int) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    path = record.path / STATE_FILE
    good = path.read_bytes()
    content = bytearray(good)
    content[at] ^= 1
    path.write_bytes(content)
    with refused("vtpm.altered"):
        vault.open(0)
    path.unlink()
    with refused("vtpm.altered"):
        vault.open(0)
    path.write_bytes(good)
    assert vault.verify() == record  # nothing but the bit was wrong, and being refused changed nothing


def test_state_in_clear_does_not_take_the_place_of_what_was_encrypted(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    path = record.path / STATE_FILE
    good = path.read_bytes()
    path.write_bytes(plain)
    with refused("vtpm.altered"):
        vault.open(0)
    assert path.read_bytes() == plain
    path.write_bytes(good)
    assert vault.verify() == record


def test_files_that_nothing_authenticates_are_not_taken_for_those_of_a_launch_that_crashed(
    make_vault: MakeVault, plain: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 of swtpm's files has no HMAC: whoever changes the number must not have spared himself the key."""
    vault = make_vault()
    record = adopted(vault, plain)
    path = record.path / STATE_FILE
    # An swtpm that reads whatever it finds.
    monkeypatch.setattr(vault, "_look_into", lambda content, key: (b"state", record.ek_sha256))
    content = path.read_bytes()
    for version, code in ((b"\x02", "vtpm.ahead"), (b"\x01", "vtpm.altered")):
        path.write_bytes(version + content[1:-1] + bytes([content[-1] ^ 1]))
        with refused(code):
            vault.verify()


def test_a_changed_record_is_refused(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    older = record.path / STATE_FILE
    content = bytearray(older.read_bytes())
    content[50] ^= 1
    older.write_bytes(content)
    vault.records.save(replace(record, digest=digest_of(bytes(content))))
    with refused("vtpm.altered"):
        vault.verify()


def snapshot(vault: Vault, into: Path) -> None:
    """A copy of all that the host has on its disk of it."""
    for place in (vault.records.directory, vault._storage):
        shutil.copytree(place, into / place.name, dirs_exist_ok=True)


def put_back(vault: Vault, kept: Path) -> None:
    for place in (vault.records.directory, vault._storage):
        shutil.rmtree(place)
        shutil.copytree(kept / place.name, place)


def test_with_a_host_tpm_a_whole_disk_put_back_is_refused(
    make_vault: MakeVault, plain: bytes, host_tpm: str, tmp_path: Path
) -> None:
    vault = make_vault(tcti=host_tpm)
    adopted(vault, plain)
    snapshot(vault, tmp_path / "kept")
    present = ended(vault.open(0))
    snapshot(vault, tmp_path / "present")
    put_back(vault, tmp_path / "kept")
    with refused("vtpm.old-record"):
        vault.open(0)
    put_back(vault, tmp_path / "present")
    assert vault.verify() == present


def test_with_a_host_tpm_the_key_itself_does_not_come_back(make_vault: MakeVault, plain: bytes, host_tpm: str) -> None:
    """Not our comparison but the TPM's policy: a record that claims the present counter does not open an earlier key."""
    vault = make_vault(tcti=host_tpm)
    first = adopted(vault, plain)
    key = vault.root_of(first.key).unwrap(first.key)
    assert len(key) == 32
    second = ended(vault.open(0))
    claimed = replace(first.key, counter=second.key.counter)
    with refused("vtpm.root"):
        vault.root_of(claimed).unwrap(claimed)


def test_without_one_it_is_not_noticed_and_said_so(make_vault: MakeVault, plain: bytes, tmp_path: Path) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    assert "no host TPM" in vault.root_of(record.key).words
    snapshot(vault, tmp_path / "kept")
    ended(vault.open(0))
    put_back(vault, tmp_path / "kept")
    vault.verify()


def test_what_left_cannot_be_started_again(
    make_vault: MakeVault, plain: bytes, tcti: str | None, tmp_path: Path
) -> None:
    vault = make_vault(tcti=tcti)
    record = adopted(vault, plain)
    key = vault.root_of(record.key).unwrap(record.key)
    snapshot(vault, tmp_path / "kept")
    vault.destroy()
    assert [path for path in vault._storage.rglob("*") if path.is_file()] == []
    assert list(vault.records.directory.glob("*.key")) == []
    with refused("vtpm.gone"):
        vault.open(0)
    # its files and its record, put back by somebody who kept them
    shutil.copytree(tmp_path / "kept" / "files", vault._storage, dirs_exist_ok=True)
    vault.records.save(record)
    with refused("vtpm.key-gone" if tcti is None else "vtpm.old-record"):
        vault.open(0)
    with refused("vtpm.swtpm"):
        start_alone(record.path, bytes(32))
    assert key != bytes(32)
    vault.destroy()
    vault.destroy()


def test_a_launch_that_fails_leaves_what_was(
    make_vault: MakeVault, plain: bytes, tcti: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = make_vault(tcti=tcti)
    record = adopted(vault, plain)

    def broken(_self: Vault, _record: Record) -> str:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Vault, "digest_now", broken)
        with pytest.raises(OSError, match="no space"):
            vault.open(0)
    assert vault.verify() == record
    assert [path.name for path in vault._storage.iterdir()] == [record.directory]


def test_an_agent_that_died_before_it_counted_counts_at_the_next_launch(
    make_vault: MakeVault, plain: bytes, host_tpm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = make_vault(tcti=host_tpm)
    adopted(vault, plain)
    with monkeypatch.context() as patch:
        patch.setattr("sealane.vtpm.roots.TpmRoot.advance", raising_after_one_call())
        with pytest.raises(OSError, match="power"):
            vault.open(0)
    second = ended(vault.open(0))
    assert vault.verify() == second


def raising_after_one_call() -> Callable[[object, object], None]:
    calls: list[int] = []

    def advance(_self: object, _reference: object) -> None:
        calls.append(1)
        if len(calls) > 1:  # the first is of the verification
            raise OSError("power")

    return advance


def test_a_tpm_that_is_here_is_not_lost_to_one_that_comes(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    record = adopted(vault, plain)
    with refused("vtpm.exists"):
        vault.receive(1, "m", version=1, ek_sha256="")
    with refused("vtpm.exists"):
        vault.create(0, adopt=False)
    assert vault.verify() == record


def test_state_in_clear_is_not_passed_over(make_vault: MakeVault, plain: bytes) -> None:
    vault = make_vault()
    vault._storage.mkdir()
    (vault._storage / STATE_FILE).write_bytes(plain)
    with refused("vtpm.adopt"):
        vault.create(0, adopt=False)
    assert (vault._storage / STATE_FILE).read_bytes() == plain
    taken = ended(vault.create(0, adopt=True))
    assert taken.ek_sha256 == adopted(make_vault("web02"), plain).ek_sha256 != ""


def is_free(records: Records, vm: str) -> bool:
    try:
        with records.locked(vm):
            return True
    except SealaneError as error:
        if error.code != "vtpm.busy":
            raise
        return False


def test_only_one_may_hold_it(make_vault: MakeVault) -> None:
    records = make_vault().records
    with records.locked("web01"):
        assert not is_free(records, "web01")
        assert is_free(records, "web02")
    assert is_free(records, "web01")
