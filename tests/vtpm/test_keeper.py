"""A keeper between QEMU, swtpm and enclaves: state leaves and enters only sealed, whole, and where it belongs."""

import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.vtpm.control import TPM_FAIL, BlobType, Command
from sealane.vtpm.envelope import Journey, StateSealer
from sealane.vtpm.launcher import KeeperLauncher
from sealane.vtpm.record import digest_of
from sealane.vtpm.swtpm import STATE_FILE, Swtpm, manufacture
from tests.vtpm.rig import (
    JOURNEY,
    READ_EK,
    SECRET,
    STARTUP,
    TYPES,
    EnclaveStandIn,
    KeeperProcess,
    QemuStandIn,
    running,
    wait_for_end,
)

Blobs = dict[BlobType, bytes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KeeperProcess, QemuStandIn]]:
    with running(tmp_path_factory.mktemp("s"), "create") as (keeper, qemu):
        assert qemu.init() == 0
        qemu.tpm(STARTUP)
        yield keeper, qemu


@pytest.fixture(scope="module")
def blobs(source: tuple[KeeperProcess, QemuStandIn]) -> Blobs:
    """What QEMU is given to carry."""
    keeper, qemu = source
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=True)
    found = {}
    for each in TYPES:
        result, found[each] = qemu.get(each)
        assert result == 0
    enclave.close()
    assert enclave.errors == []
    return found


def receive(root: Path) -> KeeperProcess:
    return KeeperProcess(root).start("receive", migration="m", version=5, ek_sha256="")


def test_without_a_migration_no_state_is_given_out(source: tuple[KeeperProcess, QemuStandIn]) -> None:
    _, qemu = source
    for each in TYPES:
        assert qemu.get(each) == (TPM_FAIL, b"")


def test_what_qemu_carries_is_sealed(source: tuple[KeeperProcess, QemuStandIn], blobs: Blobs) -> None:
    _, qemu = source
    ek = qemu.tpm(READ_EK)[12:]
    opened = {each: StateSealer(SECRET, JOURNEY, bytes).volatile_state_dec(each, blobs[each]) for each in TYPES}
    modulus = ek[-256:]
    assert modulus[:64] in opened[BlobType.PERMANENT]  # there it would be, in clear
    assert all(modulus[:16] not in blob for blob in blobs.values())
    assert opened[BlobType.VOLATILE][64:96] not in blobs[BlobType.VOLATILE]


def test_it_arrives_and_is_the_same_tpm(
    source: tuple[KeeperProcess, QemuStandIn], blobs: Blobs, tmp_path: Path
) -> None:
    ek = source[1].tpm(READ_EK)
    keeper = receive(tmp_path)
    qemu = QemuStandIn(keeper)
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
    assert [qemu.set(each, blobs[each]) for each in TYPES] == [0, 0, 0]
    assert qemu.init(incoming=True) == 0
    assert qemu.tpm(READ_EK) == ek
    keeper.call("taken", epoch=1, version=9)
    record = keeper.record()
    assert (record.status, record.epoch) == ("here", 1)
    assert record.version >= 9
    keeper.call("verify")
    enclave.close()
    # under its next key, between two commands of the guest's
    old = record
    keeper.call("rotate")
    assert qemu.tpm(READ_EK) == ek
    assert keeper.record().key.counter == old.key.counter + 1
    assert not old.path.exists()
    keeper.call("verify")
    # QEMU's end is the keeper's
    pid = keeper.call("status")["pid"]
    qemu.close()
    wait_for_end(pid)
    assert keeper.record().status == "here"
    with running(tmp_path, "open", epoch=1) as (again, qemu):
        assert qemu.init() == 0
        qemu.tpm(STARTUP)
        assert qemu.tpm(READ_EK) == ek
        again.call("verify")


def test_what_comes_is_noted_when_it_is_whole_and_not_while_its_vm_stands_still(blobs: Blobs, tmp_path: Path) -> None:
    keeper = receive(tmp_path)
    qemu = QemuStandIn(keeper)
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
    try:
        with pytest.raises(SealaneError, match=r"vtpm\.not-brought"):
            keeper.call("loaded")
        assert [qemu.set(each, blobs[each]) for each in TYPES] == [0, 0, 0]
        with pytest.raises(SealaneError, match=r"vtpm\.not-brought"):
            keeper.call("loaded")  # brought, and swtpm has not taken it
        assert qemu.init(incoming=True) == 0
        keeper.call("status")
        assert keeper.record().digest == ""
        keeper.call("loaded")
        record = keeper.record()
        assert (record.status, record.digest) == ("incoming", digest_of((record.path / STATE_FILE).read_bytes()))
        record.verify(keeper.order.vault().root_of(record.key).unwrap(record.key))  # its key is on the disk
    finally:
        qemu.close()
        enclave.close()
        keeper.end()


def test_a_key_that_cannot_be_kept_is_known_before_the_ticket(blobs: Blobs, tmp_path: Path) -> None:
    keeper = KeeperProcess(tmp_path).start("receive", migration="m", tcti="device:/dev/null")
    qemu = QemuStandIn(keeper)
    enclave = None
    try:
        with suppress(SealaneError):  # it may know already
            enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
            assert [qemu.set(each, blobs[each]) for each in TYPES] == [0, 0, 0]
            assert qemu.init(incoming=True) == 0
        for call in ("loaded", "taken"):
            with pytest.raises(SealaneError, match=r"vtpm\.(root|not-brought)"):
                keeper.call(call, epoch=1, version=1)
    finally:
        qemu.close()
        if enclave is not None:
            enclave.close()
        keeper.end()
    assert keeper.record().status == "incoming"
    keeper.order.vault().destroy()
    assert keeper.record().status == "gone"


def killed_between_a_write_and_its_note(root: Path) -> KeeperProcess:
    """A launch that ended with files which its record does not know."""
    keeper = KeeperProcess(root).start("create")
    qemu = QemuStandIn(keeper)
    assert qemu.init() == 0
    pid = keeper.call("status")["pid"]
    os.kill(pid, signal.SIGSTOP)
    qemu.tpm(STARTUP)  # which writes
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    qemu.close()
    return keeper


def test_a_keeper_that_was_killed_leaves_files_that_an_operator_may_take(tmp_path: Path) -> None:
    keeper = killed_between_a_write_and_its_note(tmp_path)
    record = keeper.record()
    path = record.path / STATE_FILE
    newest = path.read_bytes()
    assert record.running
    for how in ("open", "open"):
        with pytest.raises(SealaneError, match=r"vtpm\.ahead"):
            keeper.start(how)
    # what was never this launch's is not taken for it
    for other in (newest[:-1] + bytes([newest[-1] ^ 1]), b"\x01" + newest[1:], manufacture_into(tmp_path)):
        path.write_bytes(other)
        with pytest.raises(SealaneError, match=r"vtpm\.altered"):
            keeper.start("reopen")
    path.write_bytes(newest)
    keeper.start("reopen")
    try:
        assert keeper.record().ek_sha256 == record.ek_sha256
        assert record.digest in keeper.record().past
    finally:
        keeper.end()
    assert not keeper.record().running
    keeper.start("open").end()


def manufacture_into(root: Path) -> bytes:
    (root / "made").mkdir()
    return manufacture(root / "made")


def test_an_older_copy_is_not_taken_after_a_crash_either(tmp_path: Path) -> None:
    keeper = KeeperProcess(tmp_path).start("create")
    qemu = QemuStandIn(keeper)
    assert qemu.init() == 0
    keeper.call("verify")
    path = keeper.record().path / STATE_FILE
    old = path.read_bytes()
    qemu.tpm(STARTUP)
    keeper.call("verify")
    pid = keeper.call("status")["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    qemu.close()
    path.write_bytes(old)
    with pytest.raises(SealaneError, match=r"vtpm\.stale"):
        keeper.start("reopen")


def test_after_an_orderly_end_there_is_nothing_ahead_of_the_record(tmp_path: Path) -> None:
    keeper = killed_between_a_write_and_its_note(tmp_path)
    keeper.start("reopen").end()
    record = keeper.record()
    key = keeper.order.vault().root_of(record.key).unwrap(record.key)
    swtpm = Swtpm(record.path, key)  # somebody who has the key writes where nobody looks
    swtpm.control.start()
    swtpm.endorsement_key()
    swtpm.stop()
    with pytest.raises(SealaneError, match=r"vtpm\.altered"):
        keeper.start("reopen")


def test_keepers_outlive_their_launcher_and_another_takes_its_place(tmp_path: Path) -> None:
    launcher = KeeperLauncher()
    first, second = KeeperProcess(tmp_path, "web01"), KeeperProcess(tmp_path, "web02")
    second.order = replace(second.order, control_path=str(tmp_path / "c2"), admin_path=str(tmp_path / "a2"))
    try:
        launcher.launch(replace(first.order, how="create"), 2)
        assert launcher._process is not None
        launcher._process.kill()
        launcher._process.wait()
        launcher.launch(replace(second.order, how="create"), 2)
        launcher.stop()
        first.call("verify")
        second.call("verify")
    finally:
        launcher.stop()
        first.end()
        second.end()


def flipped(blobs: Blobs) -> Blobs:
    return {each: blob[:-1] + bytes([blob[-1] ^ 1]) for each, blob in blobs.items()}


def exchanged(blobs: Blobs) -> Blobs:
    return {**blobs, BlobType.PERMANENT: blobs[BlobType.VOLATILE]}


@pytest.mark.parametrize(
    ("change", "journey", "secret", "code"),
    [
        (flipped, JOURNEY, SECRET, "vtpm.blob-altered"),
        (exchanged, JOURNEY, SECRET, "vtpm.blob-type"),
        (dict, Journey("web02", 0, b"m" * 16), SECRET, "vtpm.blob-foreign"),
        (dict, Journey("web01", 1, b"m" * 16), SECRET, "vtpm.blob-epoch"),
        (dict, Journey("web01", 0, b"n" * 16), bytes(32), "vtpm.blob-migration"),
        (dict, JOURNEY, bytes(32), "vtpm.blob-altered"),
        (lambda blobs: dict.fromkeys(blobs, bytes(3000)), JOURNEY, SECRET, "vtpm.blob-malformed"),
    ],
)
def test_what_does_not_belong_there_is_refused_and_no_tpm_starts(
    blobs: Blobs, tmp_path: Path, change: Callable[[Blobs], Blobs], journey: Journey, secret: bytes, code: str
) -> None:
    keeper = receive(tmp_path)
    qemu = QemuStandIn(keeper)
    enclave = EnclaveStandIn(keeper, journey, is_source=False, secret=secret)
    try:
        assert qemu.set(BlobType.PERMANENT, change(blobs)[BlobType.PERMANENT]) == TPM_FAIL
        enclave.close()
        assert enclave.errors == [code]
        assert qemu.init(incoming=True) == TPM_FAIL
        directory = keeper.record().path
    finally:
        qemu.close()
        keeper.end()
    assert keeper.record().status == "incoming"
    keeper.order.vault().destroy()  # what the agent does then
    assert not directory.exists()
    assert keeper.record().status == "gone"
    assert list((tmp_path / "records").glob("*.key")) == []


@pytest.mark.parametrize("missing", [BlobType.PERMANENT, BlobType.VOLATILE])
def test_an_empty_tpm_does_not_take_its_place(blobs: Blobs, tmp_path: Path, missing: BlobType) -> None:
    keeper = receive(tmp_path)
    qemu = QemuStandIn(keeper)
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
    try:
        for each in TYPES:
            if each is not missing:
                taken = qemu.set(each, blobs[each]) == 0
                assert taken or missing is BlobType.PERMANENT  # without it swtpm takes no other state itself
        assert qemu.init(incoming=True) == TPM_FAIL
    finally:
        qemu.close()
        enclave.close()
        keeper.end()


def test_a_tpm_that_is_here_takes_no_state(source: tuple[KeeperProcess, QemuStandIn], blobs: Blobs) -> None:
    keeper, qemu = source
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
    try:
        assert qemu.raw(struct.pack(">I", Command.STOP)) == bytes(4)  # swtpm itself refuses it only while the TPM runs
        assert qemu.set(BlobType.PERMANENT, blobs[BlobType.PERMANENT]) == TPM_FAIL
    finally:
        enclave.close()
    assert qemu.init() == 0
    qemu.tpm(STARTUP)
    assert qemu.tpm(READ_EK)[6:10] == bytes(4)


def test_it_goes_to_one_destination(source: tuple[KeeperProcess, QemuStandIn]) -> None:
    keeper, qemu = source
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=True)
    try:
        with pytest.raises(SealaneError) as refused:
            EnclaveStandIn(keeper, Journey("web01", 0, b"other destination"[:16]), is_source=True)
        assert refused.value.code == "vtpm.two-migrations"
        with pytest.raises(SealaneError, match=r"vtpm\.busy"):
            keeper.call("rotate")
        assert qemu.get(BlobType.PERMANENT)[0] == 0
    finally:
        enclave.close()


def test_an_enclave_of_the_wrong_end_gives_nothing(source: tuple[KeeperProcess, QemuStandIn]) -> None:
    keeper, qemu = source
    enclave = EnclaveStandIn(keeper, JOURNEY, is_source=False)
    try:
        assert qemu.get(BlobType.PERMANENT) == (TPM_FAIL, b"")
    finally:
        enclave.close()
    assert enclave.errors == ["vtpm.blob-malformed"]


def test_a_second_swtpm_of_the_same_vm_does_not_start(source: tuple[KeeperProcess, QemuStandIn]) -> None:
    keeper, _ = source
    for how in ("open", "create", "receive"):
        with pytest.raises(SealaneError, match=r"vtpm\.busy"):
            KeeperProcess(keeper.root).start(how)
    keeper.call("verify")


def test_what_qemu_does_not_ask_ends_it(tmp_path: Path) -> None:
    with running(tmp_path, "create") as (keeper, qemu):
        pid = keeper.call("status")["pid"]
        assert qemu.raw(struct.pack(">I", 10)) == b""  # CMD_STORE_VOLATILE: it would write state in clear
        wait_for_end(pid)
    assert keeper.record().status == "here"


def test_a_copy_that_is_put_back_while_it_runs_is_not_taken_for_swtpms(tmp_path: Path) -> None:
    with running(tmp_path, "create") as (keeper, qemu):
        assert qemu.init() == 0
        keeper.call("verify")
        path = keeper.record().path / STATE_FILE
        old = path.read_bytes()
        qemu.tpm(STARTUP)  # which writes
        keeper.call("verify")
        good = keeper.record()
        assert path.read_bytes() != old
        (tmp_path / "old").write_bytes(old)
        os.replace(tmp_path / "old", path)
        with pytest.raises(SealaneError, match=r"vtpm\.stale"):
            keeper.call("verify")
    record = keeper.record()
    if path.read_bytes() == old:
        assert (record.digest, record.version) == (good.digest, good.version)
        with pytest.raises(SealaneError, match=r"vtpm\.stale"):
            KeeperProcess(tmp_path).start("open")
        return
    # swtpm 0.8 and newer shut their TPM down at their end, and so write what it has over what was put back
    assert record.digest == digest_of(path.read_bytes())
    assert record.version == good.version + 1
    with running(tmp_path, "open") as (keeper, qemu):
        assert qemu.init() == 0
        keeper.call("verify")


@pytest.mark.parametrize("call", ["nothing", "taken"])
def test_calls_that_do_not_fit(source: tuple[KeeperProcess, QemuStandIn], call: str) -> None:
    with pytest.raises(SealaneError, match=r"internal\.error"):
        source[0].call(call)
